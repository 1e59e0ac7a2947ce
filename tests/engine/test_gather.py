"""No rank's slice of an adapter is lost: every byte is found again in what is exported, saved and resumed from.

(accelerate PR 4206: there, with FSDP2 and PEFT, only rank 0's slice was saved, half the adapter, without a word.)
"""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor

from recipe.engine.build import Build
from recipe.engine.load import load_sharded
from recipe.errors import UserError
from recipe.plan.placement import Placement
from recipe.settings import Lora
from recipe.train import checkpoint
from recipe.train.saver import Place, Saver
from tests.models import run_ranks

# 4 rows of A: two ranks hold 2 and 2 of them, three ranks 2, 2 and 0.
LORA = Lora(rank=4, alpha=8, dropout=0.0)
WORLDS = [1, 2, 3]


@pytest.fixture(scope="module")
def folder(nf4_model):
    return nf4_model(family="llama", tied=True)


def load(mesh, folder, seed=0, lora=LORA):
    placement = Placement(2, offload_layers=1)
    build = Build(lora, mesh, torch.device("cpu"), torch.float32, "sdpa", placement, max_tokens=64)
    return load_sharded(folder, build, seed)


def pattern(rank, number, count):
    """`count` random bytes of one rank and one parameter."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def gathered_patterns(mesh, folder):
    model = load(mesh, folder)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(checkpoint.trained_parameters(model)):
            local = parameter.to_local()
            mine = pattern(mesh.get_local_rank(), number, local.nbytes)
            local.copy_(mine.view(torch.float32).view(local.shape))
    return checkpoint.gather_adapters(model)


@pytest.mark.parametrize("world", WORLDS)
def test_every_byte_of_every_rank_is_in_its_place(folder, world):
    ranks = run_ranks(world, gathered_patterns, folder)
    assert len(ranks[0]) == 2 * 7 * 2  # layers, projections, A and B
    for found in ranks:
        for number, (name, whole) in enumerate(found.items()):
            assert whole.dtype == torch.float32
            slices = torch.empty(whole.shape).chunk(world)
            expected = [pattern(rank, number, piece.nbytes) for rank, piece in enumerate(slices)]
            assert torch.equal(whole.view(torch.uint8).flatten(), torch.cat(expected)), name


def adamw(model):
    return torch.optim.AdamW([model.engine.adapters.flat], lr=1e-2, fused=True)


def step(model, optimizer, mesh, seed):
    """An optimizer step with gradients that depend on the parameter and `seed`, not on the number of ranks."""
    model.engine.adapters.begin_backward()
    for number, (_, parameter) in enumerate(checkpoint.trained_parameters(model)):
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        parameter.grad.to_local().copy_(distribute_tensor(whole, mesh, [Shard(0)]).to_local())
    optimizer.step()
    optimizer.zero_grad()


def adapters_of(model):
    """Copies: on one rank the gathered tensors are the parameters themselves."""
    return {name: value.clone() for name, value in checkpoint.gather_adapters(model).items()}


def moments(model, optimizer):
    adapters = model.engine.adapters
    held = optimizer.state[adapters.flat]
    found = {
        f"{name}.{key}": checkpoint.gather(adapters.part_of(held[key], parameter)).clone()
        for name, parameter in checkpoint.trained_parameters(model)
        for key in checkpoint.MOMENTS
    }
    return found | {"step": held["step"].clone()}


def train_and_save(mesh, folder, saved):
    """Two steps, a checkpoint, and one step more."""
    model = load(mesh, folder)
    optimizer = adamw(model)
    for seed in (1, 2):
        step(model, optimizer, mesh, seed)
    torch.manual_seed(50 + mesh.get_local_rank())
    at_save = adapters_of(model), moments(model, optimizer)
    saver = Saver(model, model.engine.adapters)
    saver.begin(saved, optimizer, Place.here(2, {}), json.dumps({"global_step": 2}))
    # What comes next does not wait for the disk, and what is written does not change with it.
    drawn = torch.rand(4)
    step(model, optimizer, mesh, 3)
    saver.wait()
    assert saver.failure is None
    return *at_save, drawn, adapters_of(model)


def resume(mesh, folder, saved):
    model = load(mesh, folder, seed=99)
    optimizer = adamw(model)
    checkpoint.load_parameters(saved, model)
    checkpoint.load_optimizer(saved, model, model.engine.adapters, optimizer)
    at_save = adapters_of(model), moments(model, optimizer)
    had_random_state = checkpoint.load_random_state(saved, dist.get_rank())
    drawn = torch.rand(4) if had_random_state else None
    step(model, optimizer, mesh, 3)
    return *at_save, drawn, adapters_of(model)


@pytest.fixture(scope="module")
def saved_by_two(folder, tmp_path_factory):
    saved = tmp_path_factory.mktemp("run") / "checkpoints" / "step-000002"
    return saved, run_ranks(2, train_and_save, folder, saved)


def test_a_checkpoint_holds_all_adapters_and_moments(saved_by_two):
    saved, ranks = saved_by_two
    for adapters, states, _, _ in ranks:
        on_disk = load_file(saved / checkpoint.ADAPTERS)
        assert on_disk.keys() == adapters.keys()
        assert all(torch.equal(on_disk[name], adapters[name]) for name in adapters)
        on_disk = load_file(saved / checkpoint.OPTIMIZER)
        assert on_disk.keys() == states.keys()
        assert all(torch.equal(on_disk[name], states[name].reshape(on_disk[name].shape)) for name in states)
    assert checkpoint.damaged_files(saved) == []
    assert not [path for path in saved.iterdir() if path.suffix not in (".safetensors", ".json")]
    assert not any("base_layer" in name or "embed" in name for name in load_file(saved / checkpoint.ADAPTERS))


@pytest.mark.parametrize("world", WORLDS)
def test_another_number_of_ranks_goes_on_exactly(folder, saved_by_two, world):
    saved, before = saved_by_two
    adapters, states, _, after = before[0]
    for rank, (found, found_states, drawn, found_after) in enumerate(run_ranks(world, resume, folder, saved)):
        assert found.keys() == adapters.keys() and found_states.keys() == states.keys()
        assert all(torch.equal(found[name], adapters[name]) for name in adapters)
        assert all(torch.equal(found_states[name], states[name]) for name in states)
        torch.testing.assert_close(found_after, after, rtol=1e-6, atol=1e-8)
        assert any(not torch.equal(found_after[name], adapters[name]) for name in adapters)
        if rank < 2:
            assert torch.equal(drawn, before[rank][2])
        else:
            assert drawn is None


def refused(mesh, folder, saved):
    try:
        checkpoint.load_parameters(saved, load(mesh, folder, lora=Lora(rank=8)))
    except UserError as error:
        return str(error)


def test_adapters_of_another_rank_are_refused(folder, saved_by_two):
    for message in run_ranks(2, refused, folder, saved_by_two[0]):
        assert "of shape [4, 64], expected shape [8, 64]; it is of another run" in message


def test_a_changed_byte_is_found_and_the_checkpoint_before_is_used(folder, saved_by_two, tmp_path):
    for name in ("step-000001", "step-000002"):
        shutil.copytree(saved_by_two[0], tmp_path / "checkpoints" / name)
    newest = tmp_path / "checkpoints" / "step-000002"
    content = bytearray((newest / checkpoint.OPTIMIZER).read_bytes())
    content[-1] ^= 1
    (newest / checkpoint.OPTIMIZER).write_bytes(content)
    found, notes = checkpoint.newest_sound(tmp_path)
    assert found == tmp_path / "checkpoints" / "step-000001"
    assert len(notes) == 1 and "step-000002: optimizer.safetensors is damaged" in notes[0]
