"""New tokens' rows on two ranks have the gradients of PEFT's trainable tokens, and none of them is lost in a checkpoint."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from recipe.data.new_tokens import add_new_tokens, token_ids
from recipe.data.pack import PackedCollator
from recipe.engine.build import Build
from recipe.engine.engine import Batch
from recipe.engine.load import load_sharded
from recipe.errors import UserError
from recipe.export.plain import load_plain
from recipe.plan.placement import Placement
from recipe.settings import PROJECTIONS
from recipe.train import checkpoint, start
from recipe.train.saver import Place, Saver
from tests.engine.steps import (
    CLIP,
    CPU,
    LAYERS,
    LONGEST,
    LORA,
    SEED,
    TOLERANCE,
    adapter,
    batch,
    documents,
    packed_row,
    trained,
)
from tests.engine.test_weighted_losses import plain_token_losses, weights_of
from tests.models import run_ranks, tiny_tokenizer

ROWS = (0, 2)  # a packed row for each of two ranks
NEVER = 300  # a token of no row: only the head has a gradient for it


def ids_of(number: int) -> list[int]:
    return [token for _, ids, _ in documents(number) for token in ids.tolist()]


# In the loss of one rank's row, twice in the other's, and in none.
IDS = tuple(sorted({ids_of(0)[-1], ids_of(2)[4], ids_of(2)[-2], NEVER}))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, nf4_model):
    assert NEVER not in ids_of(0) + ids_of(2) and len(IDS) == 4
    return nf4_model(num_hidden_layers=LAYERS, family="llama", tied=request.param), request.param


@pytest.fixture(scope="module")
def plain(folder):
    place, tied = folder
    both = {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
        trainable_token_indices=list(IDS) if tied else both,
    )
    model = get_peft_model(load_plain(place, torch.float32, None), config).train()
    for module in model.modules():
        if hasattr(module, "weight") and hasattr(module.weight, "quant_state"):
            module.weight.quant_state.dtype = torch.float32
    parameters = trained(model)
    begun = {name: p.detach().clone() for name, p in parameters.items() if "token_adapter" in name}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter(name, parameter.shape))
    losses = [plain_token_losses(model, number) for number in ROWS]
    sum((weights_of(n, len(part)) * part).sum() for n, part in zip(ROWS, losses, strict=True)).backward()
    with torch.no_grad(), model.disable_adapter():
        off = [plain_token_losses(model, number) for number in ROWS]
    gradients = {name: p.grad.cpu().clone() for name, p in parameters.items()}
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP).item()
    return {
        "begun": begun,
        "losses": [part.detach() for part in losses],
        "off": off,
        "gradients": gradients,
        "norm": norm,
        "clipped": {name: p.grad.cpu() for name, p in parameters.items()},
        "keys": get_peft_model_state_dict(model).keys(),
    }


def load(mesh, folder, device=CPU):
    placement = Placement(LAYERS, 1, 0, 2, 16, 3)
    build = Build(LORA, mesh, device, torch.float32, "sdpa", placement, LONGEST, token_ids=IDS)
    return load_sharded(folder, build, SEED)


def whole_gradients(model):
    return {name: checkpoint.gather(p.grad).cpu().clone() for name, p in trained(model).items()}


def set_all(model, mesh):
    """As `plain` has them: adapters in slices, rows of tokens whole."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            value = adapter(name, parameter.shape)
            if isinstance(parameter, DTensor):
                value = value.to(parameter.device)
                parameter, value = parameter.to_local(), distribute_tensor(value, mesh, [Shard(0)]).to_local()
            parameter.copy_(value)


def sharded(mesh, folder, saved):
    """A backward, and a step that is saved."""
    model = load(mesh, folder)
    adapters, parameters = model.engine.adapters, trained(model)
    found = {"begun": {name: p.detach().clone() for name, p in parameters.items() if "token_adapter" in name}}
    set_all(model, mesh)
    number = ROWS[mesh.get_local_rank()]
    mine = batch(number)
    found["off"] = model.engine.reference_losses(mine)
    losses = model.engine.losses(mine, training=True)
    (losses * weights_of(number, len(losses)) * mesh.size()).sum().backward()
    found |= {"losses": losses.detach(), "gradients": whole_gradients(model)}
    found["norm"] = adapters.clip(CLIP).item()
    found["clipped"] = whole_gradients(model)
    optimizer = torch.optim.AdamW(adapters.flats, lr=0.01, fused=True)
    optimizer.step()
    saver = Saver(model, adapters)
    saver.begin(saved, optimizer, Place.here(1, {}), json.dumps({}))
    saver.wait()
    assert saver.failure is None
    return found | {"state": state_of(model, optimizer)}


def state_of(model, optimizer):
    adapters = model.engine.adapters
    found = {name: value.clone() for name, value in checkpoint.gather_adapters(model).items()}
    for key in checkpoint.MOMENTS:
        states = [optimizer.state[flat][key] for flat in adapters.flats]
        for name, parameter in trained(model).items():
            found[f"{name}.{key}"] = checkpoint.gather(adapters.part_of_state(states, parameter)).clone()
    return found | {"steps": torch.stack([optimizer.state[flat]["step"] for flat in adapters.flats])}


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "checkpoints" / "step-000001"


@pytest.fixture(scope="module")
def ranks(folder, saved):
    return run_ranks(2, sharded, folder[0], saved)


def apart(ours, theirs):
    assert ours.keys() == theirs.keys() and all(value.norm() > 0 for value in theirs.values())
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


def test_losses_and_gradients_are_those_of_pefts_trainable_tokens(ranks, plain):
    for rank, losses, off in zip(ranks, plain["losses"], plain["off"], strict=True):
        assert rank["begun"].keys() == plain["begun"].keys()
        assert all(torch.equal(value, plain["begun"][name]) for name, value in rank["begun"].items())
        assert (rank["losses"] - losses).abs().max() < TOLERANCE
        assert (rank["off"] - off).abs().max() < TOLERANCE and (off - losses).abs().max() > 0.1
        assert apart(rank["gradients"], plain["gradients"]) < TOLERANCE
        assert rank["norm"] == pytest.approx(plain["norm"], rel=TOLERANCE)
        assert apart(rank["clipped"], plain["clipped"]) < TOLERANCE


def on_a_card(mesh, folder):
    """Both rows' losses and their gradients, on one GPU in fp32."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    mesh = dist.init_device_mesh("cuda", (mesh.size(),))
    model = load(mesh, folder, device)
    set_all(model, mesh)
    found = []
    for number in ROWS:
        losses = model.engine.losses(Batch.of(PackedCollator()([packed_row(number)]), device), training=True)
        (losses * weights_of(number, len(losses)).to(device)).sum().backward()
        found.append(losses.detach().cpu())
    gradients = whole_gradients(model)
    model.engine.close()
    return found, gradients


@pytest.mark.gpu
def test_on_a_gpu_they_are_the_same(folder, plain):
    ((losses, gradients),) = run_ranks(1, on_a_card, folder[0], method="spawn")
    for found, expected in zip(losses, plain["losses"], strict=True):
        assert (found - expected).abs().max() < TOLERANCE
    assert apart(gradients, plain["gradients"]) < TOLERANCE


def resumed(mesh, folder, saved):
    model = load(mesh, folder)
    optimizer = torch.optim.AdamW(model.engine.adapters.flats, lr=0.01, fused=True)
    checkpoint.load_parameters(saved, model)
    checkpoint.load_optimizer(saved, model, model.engine.adapters, optimizer)
    found = state_of(model, optimizer)
    # And adapters to start with, as an export has them.
    for flat in model.engine.adapters.flats:
        flat.detach().zero_()
    start.load(start.described(saved.parent / "peft"), model.engine.adapters)
    begun = {name: value.clone() for name, value in checkpoint.gather_adapters(model).items()}
    with pytest.raises(
        UserError, match=r"trainable_token_indices is \[7\], expected .* the rows of lora.new_tokens"
    ):
        start.load(start.described(saved.parent / "others"), model.engine.adapters)
    return found, begun


@pytest.mark.parametrize("world", [1, 3])
def test_a_checkpoint_has_the_rows_whole_for_any_number_of_ranks(folder, ranks, plain, saved, world):
    first, second = (rank["state"] for rank in ranks)
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "alike on all ranks"
    on_disk = load_file(saved / checkpoint.ADAPTERS) | load_file(saved / checkpoint.OPTIMIZER)
    assert load_file(saved / checkpoint.ADAPTERS).keys() == plain["keys"], "PEFT's own names"
    assert on_disk.keys() - {"step"} == first.keys() - {"steps"}
    assert all(torch.equal(on_disk[name], value) for name, value in first.items() if name != "steps")
    indices = list(IDS) if folder[1] else {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    for name, told in (("peft", indices), ("others", [7])):
        place = saved.parent / name
        place.mkdir(exist_ok=True)
        shutil.copyfile(saved / checkpoint.ADAPTERS, place / start.WEIGHTS)
        (place / start.CONFIG).write_text(json.dumps({start.TOKENS: told}))
    for state, begun in run_ranks(world, resumed, folder[0], saved):
        assert all(torch.equal(value, state[name]) for name, value in first.items())
        assert begun.keys() == plain["keys"] and all(torch.equal(begun[name], first[name]) for name in begun)


TOKENS = ["<|b|>", "<|im_end|>", "<|tool|>", "<|c|>"]


def test_new_tokens_take_reserved_rows_first_and_then_unused_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(3)]
    tokenizer.add_special_tokens({"extra_special_tokens": reserved, "pad_token": reserved[1]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 303}))
    for _ in range(2):  # the same ones each time
        loaded = type(tokenizer).from_pretrained(tmp_path)
        add_new_tokens(loaded, TOKENS, tmp_path)
        assert token_ids(loaded, TOKENS) == (299, 0, 301, 302)
    text = "yes<|tool|> no<|c|><|b|>"
    ids = loaded(text)["input_ids"]
    assert [token for token in ids if token > 298] == [301, 302, 299]
    assert loaded.decode(ids, skip_special_tokens=True) == text
    loaded.save_pretrained(tmp_path / "saved")
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"] == ids and len(again) == 303
    assert not {reserved[0], reserved[2]} & again.get_vocab().keys() and again.pad_token == reserved[1]
    with pytest.raises(
        UserError, match=r"has 4 that the tokenizer .* 2 reserved and 1 unused ones, expected"
    ):
        add_new_tokens(type(tokenizer).from_pretrained(tmp_path), ["<1>", "<2>", "<3>", "<4>"], tmp_path)
