"""`prepare.keep_source: false`: the 16-bit files of a hub model come, are quantised and go, one after the other."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading

import pytest

from recipe.errors import UserError
from recipe.prepare import prepare
from recipe.prepare.quantise import quantise
from recipe.prepare.source import find_source
from recipe.settings import Prepare, Quantization
from tests.models import PRELOADED
from tests.prepare.fake_hub import settings_for, weights_of


def sizes(folder):
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # went meanwhile
                found += os.stat(os.path.join(parent, name)).st_size
    return found


class Watched:
    """Samples the bytes under a folder every two milliseconds, and how many whole source files lie there."""

    def __init__(self, folder, names):
        self.folder, self.names, self.most_bytes, self.most_files = folder, names, 0, 0

    def __enter__(self):
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        self.thread.join()

    def sample(self):
        while not self.stop.wait(0.002):
            self.most_bytes = max(self.most_bytes, sizes(self.folder))
            there = [p for p in self.folder.glob(".org--tiny.source/*.safetensors")]
            self.most_files = max(self.most_files, len(there))


@pytest.fixture
def many(hub):
    """The model in six files of about the same size, 200 KB each."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in hub.folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    names = sorted(tensors, key=lambda name: tensors[name].nbytes)
    index = {}
    for number in range(6):
        file = f"model-{number + 1:05d}-of-00006.safetensors"
        part = {name: tensors[name] for name in names[number::6]}
        save_file(part, hub.folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return hub


def test_keeping_is_the_default_and_said_in_the_help():
    assert Prepare().keep_source is True


def test_nothing_of_the_source_stays_and_little_of_it_is_there_at_a_time(many, tmp_path):
    files = {path.name: path.stat().st_size for path in many.folder.glob("*.safetensors")}
    many.seconds_per_chunk = 0.005
    models = tmp_path / "models"
    models.mkdir()
    with Watched(models, files) as watched:
        prepared = prepare(settings_for(tmp_path, keep=False))
    assert [path.name for path in models.iterdir()] == [prepared.folder.name]
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))
    assert 1 <= watched.most_files <= 2
    output = sizes(prepared.folder)
    two = sum(sorted(files.values())[-2:])
    assert watched.most_bytes <= output + two + 2**16  # listing, tokenizer and headers
    assert watched.most_bytes < output + sum(files.values()) * 0.8  # and that says something
    assert {r.file for r in many.bodies()} == set(files)
    assert len(many.bodies()) == len(files)

    kept = prepare(settings_for(tmp_path / "kept"))
    assert weights_of(kept.folder) == weights_of(prepared.folder)


def prepare_and_die(settings, url, before_replace):
    """In a process of its own: SIGKILL before the n-th time that a shard or a record gets its final name."""
    replace, count = os.replace, 0

    def counting(source, target):
        nonlocal count
        if ".partial" in str(source) and ".source" not in str(source):
            count += 1
        if count == before_replace:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counting
    from huggingface_hub import constants

    constants.ENDPOINT = url
    prepare(settings)


@pytest.mark.parametrize("moment", [1, 5, 7])
def test_killed_it_goes_on_and_fetches_nothing_again_that_was_consumed(many, tmp_path, moment):
    settings = settings_for(tmp_path, keep=False)
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(
        target=prepare_and_die, args=(settings, many.url, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    partial = tmp_path / "models" / ".org--tiny-nf4.partial"
    record = partial / "prepare.json"
    done = json.loads(record.read_text())["files"] if record.exists() else {}
    assert len(done) == (moment - 1) // 3  # the shard, its checksums, the record
    consumed = set(done)  # one output shard per source file here, of the same name

    asked = len(many.requests)
    prepared = prepare(settings)
    again = {r.file for r in many.requests[asked:]}
    assert again.isdisjoint(consumed)
    assert len([n for n in again if n.endswith(".safetensors")]) <= 6 - len(consumed)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [prepared.folder.name]
    assert weights_of(prepared.folder) == weights_of(prepare(settings_for(tmp_path / "kept")).folder)


def test_a_file_that_fills_several_shards_goes_after_the_last_of_them(many, tmp_path):
    source = find_source(settings_for(tmp_path, keep=False))
    quantise(source, tmp_path / "models" / "nf4", Quantization(), shard_bytes=40_000)
    shards = list((tmp_path / "models" / "nf4").glob("*.safetensors"))
    assert len(shards) > 6
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["nf4"]
    assert len(many.bodies()) == 6


def test_a_copy_that_is_kept_is_used_and_stays(hub, expected, tmp_path):
    shutil.rmtree(prepare(settings_for(tmp_path)).folder)
    asked = len(hub.requests)
    assert weights_of(prepare(settings_for(tmp_path, keep=False)).folder) == expected
    assert {r.file for r in hub.requests[asked:]} == {"listing"}
    assert weights_of(tmp_path / "models" / "org--tiny") == weights_of(hub.folder)


def test_a_local_folder_is_never_touched(hub, expected, tmp_path):
    before = {path.name: path.read_bytes() for path in hub.folder.iterdir()}
    prepared = prepare(settings_for(tmp_path, keep=False, model=str(hub.folder)))
    assert weights_of(prepared.folder) == expected
    assert {path.name: path.read_bytes() for path in hub.folder.iterdir()} == before


@pytest.mark.parametrize("keep", [True, False])
def test_the_disk_must_hold_the_result_and_the_files_that_lie_there_together(
    many, tmp_path, monkeypatch, keep
):
    files = sorted(path.stat().st_size for path in many.folder.glob("*.safetensors"))
    output = sizes(prepare(settings_for(tmp_path / "sized")).folder)
    needed = output + sum(files if keep else files[-2:])
    asked = []

    def usage(path, real=shutil.disk_usage):
        asked.append(path)
        return real(path)._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    many.requests.clear()
    free = int(needed * 0.85)
    with pytest.raises(UserError, match=r"GiB free, expected .* for the NF4 model org--tiny-nf4") as caught:
        prepare(settings_for(tmp_path, keep=keep))
    assert ("keep_source=false" in str(caught.value)) == keep
    assert not many.bodies()
    free = int(needed * 1.3)
    prepare(settings_for(tmp_path, keep=keep))


def test_what_is_nf4_on_the_hub_already_is_fetched_and_kept(hub, expected, tmp_path):
    quantised = prepare(settings_for(tmp_path / "made", model=str(hub.folder))).folder
    (quantised / "prepare.json").unlink()
    hub.folder = quantised
    hub.requests.clear()
    found = prepare(settings_for(tmp_path, keep=False))
    assert found.folder == tmp_path / "models" / "org--tiny" and not found.fresh
    assert weights_of(found.folder) == expected
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["org--tiny"]
