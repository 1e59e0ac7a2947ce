"""Host memory is what was asked for, is refused before it is taken, and the embedding takes none."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.engine import memory
from recipe.engine.checkpoint import Checkpoint
from recipe.engine.memory import SPARE_BYTES, EmbeddingTable, HostPool
from recipe.errors import Refused
from recipe.plan.placement import Placement, kept_bytes
from recipe.plan.shapes import read_config, shape_from_config
from tests.engine.steps import LAYERS, LONGEST, sharded_model
from tests.models import run_ranks

MIB = 2**20
CPU = torch.device("cpu")


def resident(kind: str) -> float:
    """MiB of this process's memory now: Anon (its own) or File (page cache that it has mapped)."""
    found = re.search(rf"Rss{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


# -- the pool -----------------------------------------------------------------------------------------------------


def test_a_pool_takes_exactly_what_it_was_asked_for():
    """Three slices of 100 MiB are 300 MiB, not the 384 that powers of two would be."""
    before = resident("Anon")
    pool = HostPool(300 * MIB, CPU, "a test")
    assert resident("Anon") - before < 10  # nothing is touched that is not used
    slices = [pool.take(100 * MIB) for _ in range(3)]
    for number, piece in enumerate(slices):
        piece.fill_(number + 1)
    assert 295 < resident("Anon") - before <= 310
    assert [piece[::MIB].unique().tolist() for piece in slices] == [[1], [2], [3]]  # none lies on another
    pool.close()
    del pool, slices, piece
    assert resident("Anon") - before < 10


def test_what_does_not_fit_into_the_pool_is_not_given():
    pool = HostPool(100, CPU, "a test")
    pool.take(60)
    with pytest.raises(AssertionError, match="too small"):
        pool.take(41)


def test_an_empty_pool_takes_nothing(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    pool = HostPool(0, CPU, "nothing")
    assert pool.take(0).numel() == 0
    pool.close()


def no_mapping(*args, **kwargs):
    raise AssertionError("memory was taken")


def test_a_host_with_too_little_memory_is_refused_before_any_is_taken(monkeypatch):
    available = 300 * MIB + SPARE_BYTES
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    HostPool(300 * MIB, CPU, "a test")  # just fits
    monkeypatch.setattr(memory.mmap, "mmap", no_mapping)
    with pytest.raises(AssertionError, match="was taken"):
        HostPool(300 * MIB, CPU, "a test")
    with pytest.raises(Refused) as refused:
        HostPool(300 * MIB + 1, CPU, "5 offloaded layers")
    message = str(refused.value)
    assert "\n" not in message
    for part in ("5 offloaded layers", "0.3 GiB are needed", "1.3 GiB are available", "offload_layers"):
        assert part in message


def refusals(mesh, folder):
    """What loading says where the host has no memory to spare, by placement."""
    said: list[str | None] = []
    no_memory = SimpleNamespace(available=SPARE_BYTES)
    with mock.patch.object(memory.psutil, "virtual_memory", lambda: no_memory):
        for options in ({}, {"offload_layers": 1}, {"away_layers": 1}):
            try:
                sharded_model(mesh, folder, Placement(LAYERS, **options))
                said.append(None)
            except Refused as refused:
                said.append(str(refused))
    return said


def test_loading_is_refused_only_where_a_placement_needs_the_host(nf4_model):
    ((resident_layers, offloaded, away),) = run_ranks(1, refusals, nf4_model(num_hidden_layers=LAYERS))
    assert resident_layers is None
    assert "1 offloaded layers" in offloaded
    assert "activations kept on the host" in away


def pools(mesh, folder, options):
    engine = sharded_model(mesh, folder, Placement(LAYERS, **options)).engine
    return engine.store.pool.nbytes, engine.store.layout.slice_bytes, engine.activations.pool.nbytes


def test_pools_are_as_large_as_the_placement_says(nf4_model):
    folder = nf4_model(num_hidden_layers=LAYERS)
    shape = shape_from_config(read_config(folder / "config.json"), "config.json")
    placement = {"offload_layers": 3, "away_layers": 3, "keep_layers": 2}
    for weights, slice_bytes, activations in run_ranks(2, pools, folder, placement):
        assert weights == 3 * slice_bytes
        kept = [kept_bytes(shape, keep, LONGEST, 4) for keep in Placement(LAYERS, **placement).keep[:3]]
        assert activations == sum(kept)


# -- the embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_lookups_are_those_of_an_embedding(tmp_path, stored, computed):
    table = torch.randn(100, 16).to(stored)
    save_file({"before": torch.zeros(7, dtype=torch.uint8), "table": table}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        mapped = EmbeddingTable.from_checkpoint(checkpoint, "table", (100, 16))
    ids = torch.tensor([0, 99, 5, 5, 42])
    found = mapped.lookup(ids, CPU, computed)
    assert found.dtype == computed
    assert torch.equal(found, torch.nn.functional.embedding(ids, table).to(computed))


def grown_by_lookups(mesh, file):
    """MiB by which a process's own and its mapped memory grow when every row was looked up."""
    table = EmbeddingTable(file, 0, (65536, 512), torch.bfloat16)
    table.lookup(torch.zeros(64, dtype=torch.int64), CPU, torch.bfloat16)
    before = resident("Anon"), resident("File")
    for start in range(0, 65536, 64):
        table.lookup(torch.arange(start, start + 64), CPU, torch.bfloat16)
    return resident("Anon") - before[0], resident("File") - before[1]


def test_its_pages_belong_to_the_file_not_to_the_process(tmp_path):
    """64 MiB of it, all touched: page cache that the ranks of a host share and the system may take back."""
    file = tmp_path / "table"
    file.write_bytes(bytes(64 * MIB))
    ((own, mapped),) = run_ranks(1, grown_by_lookups, file)
    assert own < 4
    assert mapped > 60


def looked_up(mesh, folder):
    engine = sharded_model(mesh, folder, Placement(LAYERS)).engine
    return engine.embedding.lookup(torch.arange(512), CPU, torch.float32)


def test_the_engine_looks_up_in_the_checkpoint_itself(nf4_model):
    folder = nf4_model(num_hidden_layers=LAYERS)
    expected = load_file(next(folder.glob("*.safetensors")))["model.embed_tokens.weight"]
    for found in run_ranks(2, looked_up, folder):
        assert torch.equal(found, expected)
