"""One pass, kept and found again: the same whatever made it, nothing half-made, and no run loses its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recipe.data import prepare, tokenise
from recipe.data.pack import MicroBatches
from recipe.errors import UserError
from recipe.settings import from_dict
from tests.models import tiny_tokenizer

ROWS = 1700  # more than three chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path):
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, count):
    rows = ({"prompt": f"question {n}", "completion": f" answer {n % 7}" * (1 + n % 5)} for n in range(count))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(place, **data):
    values = {"path": str(place / "rows.jsonl"), "max_length": 128, **data}
    return from_dict(
        {"data": values, "paths": {"models": str(place / "models"), "runs": str(place / "runs")}}
    )


def make(place, model, run="run", **data):
    """The run's data folder."""
    settings = settings_of(place, **data)
    with prepare.prepared(settings, tiny_tokenizer(), model) as found:
        found.link_into(place / run)
    return place / run


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cached(place):
    return sorted(path.name for path in (place / "models" / "data-cache").iterdir())


def test_several_processes_make_the_bytes_that_one_makes(place, model, monkeypatch):
    alone = content(make(place, model))
    shutil.rmtree(place / "models")
    monkeypatch.setattr(tokenise, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert content(make(place, model, "again")) == alone


def test_what_was_made_is_found_again_and_another_setting_makes_another(place, model, monkeypatch):
    first = content(make(place, model))
    (name,) = cached(place)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_make", None)  # would fail
        assert content(make(place, model, "again")) == first
        assert prepare.is_cached(settings_of(place), model)
    make(place, model, "other", max_length=64)
    write(place, ROWS + 1)
    assert not prepare.is_cached(settings_of(place), model)
    make(place, model, "more")
    assert len(cached(place)) == 3 and name in cached(place)


def test_a_run_keeps_its_data_when_the_cache_is_deleted(place, model):
    run = make(place, model)
    before = content(run)
    assert all(path.stat().st_nlink == 2 for path in run.glob("*.bin")), "no second copy on disk"
    shutil.rmtree(place / "models")
    assert content(run) == before
    rows = MicroBatches.open(run, "train")
    assert rows[0]["seq_lengths"] and sum(len(row["seq_lengths"]) for row in rows) == round(ROWS * 0.9)


def test_the_cache_loses_what_was_used_longest_ago(place, model, monkeypatch):
    monkeypatch.setattr(prepare, "KEPT", 2)
    make(place, model, max_length=100)
    (first,) = cached(place)
    for length in (110, 100, 120):  # the first is used once more before the third comes
        make(place, model, max_length=length)
    assert len(cached(place)) == 2 and first in cached(place)


def test_the_held_out_share_is_that_of_torchs_permutation(place, model):
    import torch

    run = make(place, model)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(42))[: ROWS // 10]
    held = MicroBatches.open(run, "held_out")
    assert sorted(held.documents.rows[held.plan.order].tolist()) == sorted(order.tolist())


def test_the_stats_say_what_there_is(place, model):
    stats = json.loads((make(place, model) / "stats.json").read_text())
    rows = MicroBatches.open(place / "run", "train")
    assert stats["rows"] == ROWS - ROWS // 10 and stats["held_out_rows"] == ROWS // 10
    assert stats["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert stats["in_loss"] == sum(label != -100 for row in rows for label in row["labels"])
    assert sum(stats["lengths"]["counts"]) == stats["rows"]
    assert stats["lengths"]["edges"] == [0, 16, 32, 64, 128]
    assert stats["fill"] == pytest.approx(stats["tokens"] / (128 * len(rows)), abs=1e-4)


def test_a_bad_row_leaves_nothing(place, model, monkeypatch):
    with open(place / "rows.jsonl", "a") as file:
        file.write('{"prompt": 1, "completion": "x"}\n')
    for size in (tokenise.PARALLEL_BYTES, 0):
        monkeypatch.setattr(tokenise, "PARALLEL_BYTES", size)
        with pytest.raises(UserError, match=rf"rows\.jsonl:{ROWS + 1}: prompt is int, expected text"):
            make(place, model)
    assert sorted(path.name for path in place.iterdir()) == ["models", "rows.jsonl"]
    assert list((place / "models").iterdir()) == []


def test_where_the_models_may_only_be_read_it_is_made_beside_the_runs(place, model, monkeypatch):
    (place / "models").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path).name != "models")
    run = make(place, model)
    assert len(MicroBatches.open(run, "train")) > 0
    assert list((place / "models").iterdir()) == [] and not (place / "runs").exists()


SLOW = """
import sys
from pathlib import Path
from recipe.data import tokenise
from tests.data.test_data_prepared import make
tokenise.PARALLEL_BYTES = 0
if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_ctrl_c_leaves_nothing_half_made_and_no_process(place, model):
    write(place, 60_000)
    (place / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(place / "slow.py"), str(place), str(model)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while not any(path.stat().st_size for path in place.glob("models/data-cache/.*/ids.bin")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < limit:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    assert list((place / "models").iterdir()) == []


def test_arrays_are_mapped_not_read(place, model):
    rows = MicroBatches.open(make(place, model), "train")
    assert isinstance(rows.documents.ids, np.memmap) and isinstance(rows.plan.order, np.memmap)
