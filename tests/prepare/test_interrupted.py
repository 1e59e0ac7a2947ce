"""Preparing 70B takes long: what a kill leaves behind is gone on with, and the result is the same to the byte."""

import multiprocessing
import shutil
import signal

import pytest

from recipe.errors import UserError
from recipe.files import read_json, sha256_of
from recipe.prepare import RECORD, _check_sizes
from recipe.prepare.quantise import quantise
from recipe.prepare.source import Source
from recipe.settings import Quantization
from tests.dying import die_before_replace
from tests.models import PRELOADED, tiny_checkpoint

SHARD_BYTES = 100_000
SHARDS = 5
# One os.replace for each shard, its checksums and the record (1 to 15), then config.json, index, record, folder (19).
REPLACES = 3 * SHARDS + 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("interrupted") / "tiny", shard_size="200KB")
    return Source(folder, "tiny", None)


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("uninterrupted") / "tiny-nf4"
    quantise(source, target, Quantization(), SHARD_BYTES)
    assert len(list(target.glob("*.safetensors"))) == SHARDS
    return contents(target)


def contents(folder):
    """Everything but how long it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {
        RECORD: {key: value for key, value in read_json(folder / RECORD).items() if key != "rates"}
    }


def quantise_and_die(source, target, before_replace):
    """In a process of its own."""
    die_before_replace(before_replace)
    quantise(source, target, Quantization(), SHARD_BYTES)


def killed(source, target, before_replace):
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(
        target=quantise_and_die, args=(source, target, before_replace)
    )
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", [1, 2, 3, 6, 11, 15, 16, 17, 18, 19])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(
    source, uninterrupted, tmp_path, moment
):
    target = tmp_path / "tiny-nf4"
    assert killed(source, target, moment)
    assert not target.exists()
    partial = tmp_path / ".tiny-nf4.partial"
    record = partial / RECORD
    done = [n for n in read_json(record)["files"] if n.endswith(".safetensors")] if record.exists() else []
    assert len(done) == min((moment - 1) // 3, SHARDS)
    before = {name: (partial / name).stat().st_mtime_ns for name in done}

    quantise(source, target, Quantization(), SHARD_BYTES)

    assert contents(target) == uninterrupted
    assert {name: (target / name).stat().st_mtime_ns for name in done} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-nf4"]
    _check_sizes(target)
    recorded = {name: file["sha256"] for name, file in read_json(target / RECORD)["files"].items()}
    assert recorded == {name: sha256_of(target / name) for name in recorded}


def test_no_kill_means_no_kill(source, tmp_path):
    assert not killed(source, tmp_path / "tiny-nf4", REPLACES + 1)


def test_a_source_that_has_changed_since_is_quantised_afresh(source, tmp_path):
    other = tiny_checkpoint(tmp_path / "source", seed=1)
    moved = Source(other, "tiny", None)
    assert killed(moved, tmp_path / "out" / "tiny-nf4", 7)
    shutil.rmtree(other)
    tiny_checkpoint(other, seed=2)
    quantise(moved, tmp_path / "out" / "tiny-nf4", Quantization(), SHARD_BYTES)
    quantise(moved, tmp_path / "fresh" / "tiny-nf4", Quantization(), SHARD_BYTES)
    resumed, fresh = (contents(tmp_path / name / "tiny-nf4") for name in ("out", "fresh"))
    assert resumed == fresh


def test_a_half_written_shard_is_written_again(source, uninterrupted, tmp_path):
    target, partial = tmp_path / "tiny-nf4", tmp_path / ".tiny-nf4.partial"
    assert killed(source, target, 7)
    first = min(partial.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:1000])
    quantise(source, target, Quantization(), SHARD_BYTES)
    assert contents(target) == uninterrupted


def test_a_disk_without_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"0\.0 GiB free, expected .* GiB for the NF4 model tiny-nf4"):
        quantise(source, tmp_path / "tiny-nf4", Quantization(), SHARD_BYTES)
    assert not list(tmp_path.rglob("*.safetensors"))
