"""One, two and three ranks compute what plain transformers + PEFT computes on the same NF4 checkpoint.

Loss within 1e-5 and each LoRA gradient within 1e-5 relative (fp32), gradient clipping included, although every rank
has other data, in packed rows, and holds only its slice.
"""

import hashlib
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from recipe.engine.attention import attention_name
from recipe.engine.load import Checkpoint, checkpoint_name, initial_lora, load_sharded, peft_config
from recipe.engine.nf4 import NF4Linear
from recipe.export.plain import load_plain
from recipe.settings import PROJECTIONS, Lora
from recipe.train.checkpoint import adapter_name, gather_adapters
from recipe.train.data import IGNORED, PackedCollator
from recipe.train.trainer import ShardedSFTTrainer
from tests.models import run_ranks

# Rank 4 over three ranks is 2, 2 and 0 rows of each A: the last rank holds nothing of it.
LORA = Lora(rank=4, alpha=8, dropout=0.0)
SEED = 7
CLIP = 0.05
MODELS = {
    "tied": {"family": "llama", "tied": True},
    "untied": {"family": "llama", "tied": False},
    "biases": {"family": "qwen2", "tied": False},
    "bf16": {
        "family": "llama",
        "tied": True,
        "dtype": torch.bfloat16,
    },  # the checkpoint's dtype, not the run's
}
# Packed rows, by the lengths of their documents: 6 micro-batches of a step, in turn to the ranks.
ROWS = [[5, 17, 9], [30], [2, 3, 4, 20], [12, 12], [8], [21, 6]]
WITHOUT_LABELS = 4  # a row none of whose tokens are in the loss


def packed_row(number):
    """input_ids, labels (a prompt of a third of each document is not in the loss) and seq_lengths."""
    generator = torch.Generator().manual_seed(number)
    ids, labels = [], []
    for length in ROWS[number]:
        document = torch.randint(0, 512, (length,), generator=generator).tolist()
        ids += document
        prompt = length if number == WITHOUT_LABELS else max(1, length // 3)
        labels += [IGNORED] * prompt + document[prompt:]
    return {"input_ids": ids, "labels": labels, "seq_lengths": ROWS[number]}


def documents():
    for number in range(len(ROWS)):
        row, start = packed_row(number), 0
        for length in row["seq_lengths"]:
            piece = slice(start, start + length)
            yield torch.tensor(row["input_ids"][piece]), torch.tensor(row["labels"][piece])
            start += length


LABELS = sum(int((labels[1:] != IGNORED).sum()) for _, labels in documents())


def adapter(name, shape):
    """A value for each adapter, B too, so that no gradient is zero."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def trained(model):
    return {adapter_name(name): p for name, p in model.named_parameters() if p.requires_grad}


# -- the other tool: one process, one document at a time ----------------------------------------------------------


@pytest.fixture(scope="module")
def plain(nf4_model):
    """plain(model): loss, gradients, total norm and clipped gradients of plain transformers + PEFT."""
    made = {}

    def get(model_name):
        if model_name not in made:
            made[model_name] = plain_step(nf4_model(**MODELS[model_name]))
        return made[model_name]

    return get


def plain_step(folder):
    model = get_peft_model(load_plain(folder, torch.float32, None), peft_config(LORA)).train()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes rounds to the checkpoint's dtype in the backward pass only, whatever it computes in.
            module.weight.quant_state.dtype = torch.float32
    parameters = trained(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter(name, parameter.shape))
    loss = 0.0
    for ids, labels in documents():
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum") / LABELS
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
    return SimpleNamespace(
        loss=loss.item(),
        gradients=gradients,
        norm=norm.item(),
        clipped={name: parameter.grad.clone() for name, parameter in parameters.items()},
    )


# -- ours: a rank of a real process group -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(nf4_model):
    """sharded(model, world): what each rank returned from sharded_step."""
    made = {}

    def get(model_name, world):
        if (model_name, world) not in made:
            made[model_name, world] = run_ranks(world, sharded_step, nf4_model(**MODELS[model_name]))
        return made[model_name, world]

    return get


def load(mesh, folder, lora=LORA):
    return load_sharded(
        folder, lora, mesh, torch.device("cpu"), torch.float32, attention_name("sdpa"), seed=SEED
    )


def set_adapters(model, mesh):
    with torch.no_grad():
        for name, parameter in trained(model).items():
            whole = adapter(name, parameter.shape)
            parameter.to_local().copy_(distribute_tensor(whole, mesh, [Shard(0)]).to_local())


def accumulate(model, mesh):
    """The micro-batches of this rank as the trainer runs them, reduced at the last; the sum of their losses."""
    trainer = SimpleNamespace(model=model, step_tokens=0)
    numbers = range(mesh.get_local_rank(), len(ROWS), mesh.size())
    loss = 0.0
    for number in numbers:
        model.set_requires_gradient_sync(number == numbers[-1])
        inputs = PackedCollator()([packed_row(number)])
        part = ShardedSFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=LABELS)
        part.backward()
        loss += part.item()
    return loss


def gradients_of(model):
    return {name: parameter.grad.full_tensor().clone() for name, parameter in trained(model).items()}


def sharded_step(mesh, folder):
    model = load(mesh, folder).train()
    start = {name: value.clone() for name, value in gather_adapters(model).items()}
    whole = [
        name for name, p in model.named_parameters() if not isinstance(p, DTensor) or p.to_local().is_meta
    ]
    packed = {
        f"{checkpoint_name(name)}.weight": m.weight.to_local().clone().view(torch.uint8).flatten()
        for name, m in model.named_modules()
        if isinstance(m, NF4Linear)
    }
    set_adapters(model, mesh)
    loss = accumulate(model, mesh)
    gradients = gradients_of(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return SimpleNamespace(
        start=start,
        whole=whole,
        packed=packed,
        loss=loss,
        gradients=gradients,
        norm=norm.full_tensor().item(),
        clipped=gradients_of(model),
    )


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(PROJECTIONS) * 2
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        error = ((ours[name] - expected).norm() / expected.norm()).item()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("model", "world"),
    [(model, world) for model in ("tied", "untied", "biases") for world in (1, 2, 3)] + [("bf16", 2)],
)
class TestSharded:
    def test_loss_is_that_of_the_plain_model(self, plain, sharded, model, world):
        losses = [rank.loss for rank in sharded(model, world)]
        assert sum(losses) / world == pytest.approx(plain(model).loss, abs=1e-5)
        assert world == 1 or len(set(losses)) == world  # every rank has other data

    def test_each_gradient_is_that_of_the_plain_model(self, plain, sharded, model, world):
        for rank in sharded(model, world):
            assert_close(rank.gradients, plain(model).gradients)

    def test_clipping_is_that_of_the_plain_model(self, plain, sharded, model, world):
        assert plain(model).norm > 2 * CLIP  # or nothing would be clipped
        for rank in sharded(model, world):
            assert rank.norm == pytest.approx(plain(model).norm, rel=1e-5)
            assert_close(rank.clipped, plain(model).clipped)

    def test_a_rank_holds_its_slice_of_every_parameter_and_no_more(self, sharded, nf4_model, model, world):
        ranks = sharded(model, world)
        assert [rank.whole for rank in ranks] == [[]] * world
        with Checkpoint(nf4_model(**MODELS[model])) as checkpoint:
            names = [name for name in checkpoint.files if f"{name}.absmax" in checkpoint.files]
            assert {name for rank in ranks for name in rank.packed} == set(names)
            for name in names:
                stored = checkpoint._slice(name)[:].flatten()
                slices = [rank.packed[name] for rank in ranks]
                assert torch.equal(torch.cat(slices), stored)
                largest = -(-len(stored) // 4 // world) * 4  # whole fp32 rows
                assert [len(piece) for piece in slices[:-1]] == [largest] * (world - 1)
                assert len(slices[-1]) == len(stored) - largest * (world - 1)

    def test_adapters_start_alike_on_any_number_of_ranks(self, sharded, model, world):
        alone = sharded("tied" if model == "bf16" else model, 1)[0].start
        for rank in sharded(model, world):
            assert rank.start.keys() == alone.keys()
            assert all(torch.equal(rank.start[name], alone[name]) for name in alone)


def test_adapters_start_as_peft_starts_them(sharded, nf4_model):
    """A uniform within 1/sqrt(inputs), each its own; B zero, so that training starts at the base model."""
    start = sharded("untied", 2)[0].start
    theirs = trained(
        get_peft_model(load_plain(nf4_model(**MODELS["untied"]), torch.float32, None), peft_config(LORA))
    )
    assert start.keys() == theirs.keys()
    firsts = set()
    for name, value in start.items():
        assert value.dtype == torch.float32 and value.shape == theirs[name].shape
        if ".lora_B." in name:
            assert not value.any()
            continue
        bound = theirs[name].shape[1] ** -0.5
        assert value.abs().max() <= bound and theirs[name].abs().max() <= bound
        assert value.std() == pytest.approx(theirs[name].std().item(), rel=0.2)
        firsts.add(value.flatten()[0].item())
    assert len(firsts) == len(start) // 2
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default"
    first = start[f"{adapter_name(name)}.weight"]
    assert torch.equal(initial_lora(name, first, SEED), first)
    assert not torch.equal(initial_lora(name, first, SEED + 1), first)


def step_with_dropout(mesh, folder, checkpointing):
    model = load(mesh, folder, Lora(rank=4, alpha=8, dropout=0.3)).train()
    set_adapters(model, mesh)
    if checkpointing:
        model.activation_checkpointing_enable()  # as transformers' Trainer does
    torch.manual_seed(mesh.get_local_rank())
    runs = {name: 0 for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    for name, module in model.named_modules():
        if name in runs:
            module.register_forward_pre_hook(lambda m, x, name=name: runs.update({name: runs[name] + 1}))
    loss = accumulate(model, mesh)
    return loss, gradients_of(model), sum(runs.values())


def test_activation_checkpointing_changes_no_gradient_dropout_included(nf4_model):
    folder = nf4_model(**MODELS["untied"])
    kept = run_ranks(2, step_with_dropout, folder, False)
    recomputed = run_ranks(2, step_with_dropout, folder, True)
    for (loss, gradients, runs), (loss_again, gradients_again, runs_again) in zip(
        kept, recomputed, strict=True
    ):
        assert runs_again == 2 * runs  # it did recompute
        assert loss_again == loss
        assert_close(gradients_again, gradients)
