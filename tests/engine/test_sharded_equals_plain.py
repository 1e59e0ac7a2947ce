"""One, two and three ranks compute what plain transformers + PEFT computes on the same NF4 checkpoint.

Loss within 1e-5 and each LoRA gradient within 1e-5 relative (fp32), gradient clipping and the step after an optimizer's
included, although every rank has other data, in packed rows, and holds only its slice: wherever a plan puts weights
and activations, and whatever it keeps. The last tests break the engine, and see the comparison fail.
"""

import gc
import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.tensor import DTensor

from recipe.data.pack import PackedCollator
from recipe.engine import load, lora
from recipe.engine.attention import Documents
from recipe.engine.build import initial_lora, peft_config
from recipe.engine.checkpoint import Checkpoint
from recipe.engine.engine import Batch
from recipe.engine.layout import Layout
from recipe.engine.lora import Adapters
from recipe.engine.rows import rows_of_rank
from recipe.engine.weights import LayerStore
from recipe.export.plain import load_plain
from recipe.plan.placement import Placement
from recipe.plan.shapes import read_config, shape_from_config
from recipe.train.checkpoint import gather_adapters
from tests.engine.steps import (
    CLIP,
    CPU,
    LABELS,
    LAYERS,
    LORA,
    ROWS,
    SEED,
    TOLERANCE,
    WITHOUT_LABELS,
    accumulate,
    differences,
    documents,
    error,
    packed_row,
    plain_steps,
    set_adapters,
    sharded_model,
    sharded_steps,
    trained,
)
from tests.models import run_ranks

WORLDS = (1, 2, 3)
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "llama", "tied": True},
    "untied": {"family": "llama"},
    "biases": {"family": "qwen2"},
    "norms": {"family": "qwen3"},
    "window": {"family": "mistral", "sliding_window": 6},
    "bf16": {"family": "llama", "dtype": torch.bfloat16},  # the checkpoint's dtype, not the run's
}
PLACEMENTS: dict[str, dict[str, int]] = {
    "resident": {},
    "some of all": {"offload_layers": 2, "away_layers": 2, "keep_layers": 2, "mlp_chunk": 7},
    "all offloaded": {"offload_layers": 4, "away_layers": 4, "keep_layers": 4, "slots": 1},
    "all kept here": {"keep_layers": 4, "mlp_chunk": 7, "slots": 1},
    "inputs away": {"offload_layers": 3, "away_layers": 4, "slots": 1},
}
FEW = ("resident", "some of all")
# (model, placements of the fused kernels, placements of the plain ones)
MATRIX = {
    "tied": (("resident", "some of all", "all offloaded", "all kept here", "inputs away"), ("some of all",)),
    "untied": (FEW, ()),
    "biases": (("all kept here",), ("some of all",)),
    "norms": (("some of all",), ("some of all",)),
    "window": (("some of all",), ("some of all",)),
    "bf16": (("all offloaded",), ()),
}
CASES = [
    (name, kernels, placement)
    for name, (fused, plainly) in MATRIX.items()
    for kernels, placements in (("fused", fused), ("plain", plainly))
    for placement in placements
]
MODELS_AND_WORLDS = [(name, world) for name in MODELS for world in WORLDS if name != "bf16" or world == 2]


@pytest.fixture(scope="module")
def folder_of(nf4_model):
    return lambda name: nf4_model(num_hidden_layers=LAYERS, **MODELS[name])


@pytest.fixture(scope="module")
def plain(folder_of):
    """plain(model): what plain transformers + PEFT computes."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = plain_steps(folder_of(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def sharded(folder_of):
    """sharded(model, world): what each rank returned, by kernels and placement."""
    made = {}

    def get(name, world):
        if (name, world) not in made:
            cases = [(kernels, placement) for model, kernels, placement in CASES if model == name]
            made[name, world] = run_ranks(world, steps_of_cases, folder_of(name), cases)
        return made[name, world]

    return get


def steps_of_cases(mesh, folder, cases):
    model = sharded_model(mesh, folder, Placement(LAYERS, offload_layers=1))
    found = {"start": gather_adapters(model), "bytes": bytes_of_weights(model)}
    return found | {case: steps_and_memory(mesh, folder, *case) for case in cases}


def bytes_of_weights(model):
    """Bytes of all uint8 tensors in this process, as the storages that they lie in, and of those the engine's slices,
    buffers and pools are."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in tensors
        if found.dtype == torch.uint8 and not found.is_meta
    }
    store = model.engine.store
    known = [shard for shard, away in zip(store.shards, store.offloaded, strict=True) if not away]
    known += [store.pool._whole, *(buffer.run for buffer in store._buffers)]
    known += [buffer.staging for buffer in store._buffers if buffer.staging is not None]
    return sum(storages.values()), sum(tensor.nbytes for tensor in known)


def steps_and_memory(mesh, folder, kernels, placement):
    model = sharded_model(mesh, folder, Placement(LAYERS, **PLACEMENTS[placement]), kernels)
    store = model.engine.store
    memory = SimpleNamespace(
        shards=[shard.clone() for shard in store.shards],
        pool=store.pool.nbytes,
        in_pool=[within(shard, store.pool._whole) for shard in store.shards],
        activations=model.engine.activations.pool.nbytes,
        not_meta=[
            name for name, p in model.named_parameters() if not isinstance(p, DTensor) and not p.is_meta
        ],
        buffers=[buffer.run.numel() for buffer in store._buffers],
        head=tuple(model.engine.head.weight.shape),
    )
    found = sharded_steps(mesh, model)
    found.memory = memory
    model.engine.close()
    return found


def within(tensor, whole):
    begin = whole.data_ptr()
    return begin <= tensor.data_ptr() < begin + whole.nbytes


# -- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "world", "kernels", "placement"),
    [(name, world, *case[1:]) for name, world in MODELS_AND_WORLDS for case in CASES if case[0] == name],
)
def test_two_steps_are_those_of_the_plain_model(plain, sharded, model, kernels, placement, world):
    ranks = [rank[kernels, placement] for rank in sharded(model, world)]
    assert differences(ranks, plain(model)) == {}
    assert plain(model).norm > 2 * CLIP  # or nothing would be clipped
    assert world == 1 or len({rank.losses[0] for rank in ranks}) == world  # every rank has other data
    # The step between them matters, or the second would prove nothing.
    assert error(plain(model).gradients[1], plain(model).gradients[0]) > 100 * TOLERANCE


def test_the_window_is_smaller_than_a_document_and_matters(plain, folder_of):
    assert MODELS["window"]["sliding_window"] < max(length for row in ROWS for length in row)
    assert abs(plain("window").losses[0] - plain("untied").losses[0]) > 100 * TOLERANCE


def losses_one_by_one(mesh, folder):
    """The loss of each packed row, and of its documents alone, without gradients."""
    model = sharded_model(mesh, folder, Placement(LAYERS))
    set_adapters(model, mesh)

    def loss(input_ids, labels, seq_lengths):
        row = {"input_ids": input_ids, "labels": labels, "seq_lengths": seq_lengths}
        return model.engine.loss(Batch.of(PackedCollator()([row]), CPU), training=False).item()

    with torch.no_grad():
        packed = [loss(**packed_row(number)) for number in range(len(ROWS))]
        alone = [
            sum(loss(ids.tolist(), labels.tolist(), [len(ids)]) for _, ids, labels in documents(number))
            for number in range(len(ROWS))
        ]
    return packed, alone


def test_packed_documents_have_the_losses_that_they_have_alone(folder_of, plain):
    packed, alone = run_ranks(1, losses_one_by_one, folder_of("untied"))[0]
    assert packed == pytest.approx(alone, rel=1e-6)
    assert packed[WITHOUT_LABELS] == 0
    assert sum(packed) / LABELS == pytest.approx(plain("untied").losses[0], abs=TOLERANCE)


# -- what a rank holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "world"), MODELS_AND_WORLDS)
def test_a_rank_holds_its_slice_of_every_layer_and_no_more(sharded, folder_of, model, world):
    folder = folder_of(model)
    shape = shape_from_config(read_config(folder / "config.json"), "config.json")
    layout = Layout.of(shape, world, nested=True)
    for kernels, placement in [case[1:] for case in CASES if case[0] == model]:
        ranks = [rank[kernels, placement].memory for rank in sharded(model, world)]
        with Checkpoint(folder) as checkpoint:
            for layer in range(LAYERS):
                run = torch.cat([rank.shards[layer] for rank in ranks])
                assert len(run) == layout.size
                for piece in layout.pieces.values():
                    stored = checkpoint.read(f"model.layers.{layer}.{piece.key}").view(-1).view(torch.uint8)
                    assert torch.equal(run[piece.start : piece.end], stored)
        offloaded = PLACEMENTS[placement].get("offload_layers", 0)
        for place, rank in enumerate(ranks):
            assert [len(shard) for shard in rank.shards] == [layout.slice_bytes] * LAYERS
            assert rank.pool == offloaded * layout.slice_bytes
            assert rank.in_pool == list(Placement(LAYERS, offload_layers=offloaded).offloaded)
            # Whole layers exist in two buffers, only while they pass through.
            travelling = offloaded if world == 1 else LAYERS
            assert rank.buffers == [layout.size] * min(2, travelling)
            assert (rank.activations > 0) == ("away_layers" in PLACEMENTS[placement])
            assert rank.not_meta == []
            first, last = rows_of_rank(shape.vocab, world, place)
            assert rank.head == (last - first, shape.hidden)


@pytest.mark.parametrize(("model", "world"), MODELS_AND_WORLDS)
def test_nothing_else_of_a_layer_is_on_a_rank(sharded, model, world):
    """Looked for among all tensors of the process: a layer that loading forgot would be there."""
    for rank in sharded(model, world):
        everything, known = rank["bytes"]
        assert known == everything


def test_vocabulary_is_cut_unevenly_where_it_must(sharded):
    heads = [rank["fused", "resident"].memory.head[0] for rank in sharded("untied", 3)]
    assert heads == [171, 171, 170]


# -- how adapters start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "world"), MODELS_AND_WORLDS)
def test_adapters_start_alike_on_any_number_of_ranks(sharded, model, world):
    alone = sharded("untied" if model == "bf16" else model, 1)[0]["start"]
    for rank in sharded(model, world):
        assert rank["start"].keys() == alone.keys()
        assert all(torch.equal(rank["start"][name], alone[name]) for name in alone)


def test_adapters_start_as_peft_starts_them(sharded, folder_of):
    """A uniform within 1/sqrt(inputs), each its own; B zero, so that training starts at the base model."""
    start = sharded("untied", 2)[0]["start"]
    theirs = trained(get_peft_model(load_plain(folder_of("untied"), torch.float32, None), peft_config(LORA)))
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
    first = start["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert torch.equal(initial_lora(name, tuple(first.shape), SEED), first)
    assert not torch.equal(initial_lora(name, tuple(first.shape), SEED + 1), first)


# -- interruptions ------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted_steps(mesh, folder):
    """A forward or backward that ends in an exception in one layer, then a step as if nothing had been."""
    model = sharded_model(mesh, folder, Placement(LAYERS, offload_layers=2, away_layers=2, keep_layers=2))
    arithmetic = type(model.engine.arithmetic)
    found = {}
    for way, layer in itertools.product(("forward", "backward"), (0, 2, 3)):
        original = getattr(arithmetic, way)

        def failing(self, *args, way=way, layer=layer, original=original):
            view = args[1] if way == "forward" else args[3]
            if view.index == layer:
                raise Interrupted
            return original(self, *args)

        with mock.patch.object(arithmetic, way, failing), pytest.raises(Interrupted):
            accumulate(model, mesh)
        model.zero_grad()
        found[way, layer] = sharded_steps(mesh, model)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_pass_does_not_spoil_the_next_one(folder_of, plain, world):
    ranks = run_ranks(world, interrupted_steps, folder_of("untied"))
    for case in ranks[0]:
        assert differences([rank[case] for rank in ranks], plain("untied")) == {}, case


# -- the comparison fails where the engine is wrong -----------------------------------------------------------------


def head_of_the_next_rank():
    return mock.patch.object(
        load,
        "rows_of_rank",
        lambda vocab, world, rank: rows_of_rank(vocab, world, (rank + 1) % world),
    )


def only_the_own_gradient():
    def keep_own(out, runs, group, async_op):
        out.copy_(runs.view(dist.get_world_size(), -1)[dist.get_rank()])
        return SimpleNamespace(wait=lambda: None)

    return mock.patch.object(lora, "dist", SimpleNamespace(reduce_scatter_tensor=keep_own))


def one_layer_unscaled():
    original = Adapters._finish

    def finish(self, pending):
        work, mine, layer = pending
        if layer != OFFLOADED:
            return original(self, pending)
        work.wait()
        self.gradients[layer].add_(mine)

    return mock.patch.object(Adapters, "_finish", finish)


def absmax_of_the_next_rank():
    original = load.read_layers

    def read(model, checkpoint, rank):
        original(model, checkpoint, rank)
        store = model.engine.store
        shard = store.shards[OFFLOADED]
        everyones = torch.empty(store.layout.world, len(shard), dtype=torch.uint8)
        dist.all_gather_into_tensor(everyones.flatten(), shard)
        for piece, start, end, place in store.layout.of_rank(rank):
            if piece.key.endswith(".absmax"):
                there = slice(place, place + end - start)
                shard[there] = everyones[(rank + 1) % store.layout.world, there]

    return mock.patch.object(load, "read_layers", read)


def no_document_boundaries():
    original = Documents.of
    return mock.patch.object(Documents, "of", lambda starts, device: original([0, starts[-1]], device))


def stale_adapters():
    return mock.patch.object(LayerStore, "begin", lambda self, reference: None)


OFFLOADED = 3  # the layer that Placement(4, offload_layers=1) offloads
STEP = {"loss 1", "gradients 1", "loss 2", "gradients 2", "norm", "clipped"}
BREAKS = {
    head_of_the_next_rank: STEP,
    only_the_own_gradient: STEP - {"loss 1"},
    one_layer_unscaled: STEP - {"loss 1"},
    absmax_of_the_next_rank: STEP,
    no_document_boundaries: STEP,
    stale_adapters: {"loss 2", "gradients 2"},
}


def broken_steps(mesh, folder, breaks):
    found = {}
    for broken in breaks:
        with broken():
            model = sharded_model(mesh, folder, Placement(LAYERS, offload_layers=1))
            assert model.engine.store.offloaded.index(True) == OFFLOADED
            found[broken.__name__] = sharded_steps(mesh, model)
    found["nothing"] = sharded_steps(mesh, sharded_model(mesh, folder, Placement(LAYERS, offload_layers=1)))
    return found


@pytest.fixture(scope="module")
def broken(folder_of):
    return run_ranks(2, broken_steps, folder_of("untied"), list(BREAKS))


@pytest.mark.parametrize("way", BREAKS, ids=lambda way: way.__name__)
def test_what_is_wrong_shows(broken, plain, way):
    assert differences([rank[way.__name__] for rank in broken], plain("untied")).keys() == BREAKS[way]


def test_without_a_fault_nothing_shows(broken, plain):
    assert differences([rank["nothing"] for rank in broken], plain("untied")) == {}
