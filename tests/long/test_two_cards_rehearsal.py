"""`recipe bench --suite two-cards`, rehearsed as a whole on two CPU ranks: each stage for real, at a tiny shape."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from recipe.bench import drill

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REHEARSAL = ("bench", "--suite", "two-cards", "--gpus", "0", "--model-shape", "tiny", "--tokens", "64")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(folder of the results, its JSON, what was printed)."""
    folder = tmp_path_factory.mktemp("suite") / "results"
    done = subprocess.run(
        [sys.executable, "-m", "recipe", *REHEARSAL, "--steps", "1", "--output", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "two-cards.json").read_text()), done.stdout


def test_all_stages_run_and_nothing_is_judged(rehearsed):
    _, document, printed = rehearsed
    assert [row["name"] for row in document["results"]] == ["ours", "article", "fsdp_qlora", "ours p2p"]
    assert all(row["status"] == "measured" and row["ranks"] == 2 for row in document["results"])
    assert document["results"][0]["checkpoint"] == "cold" and document["disk"]["bytes_per_second"] > 0
    assert {stage["name"] for stage in document["stages"]} >= {"checkpoint", "parity", "drill", "disk"}
    assert {verdict["met"] for verdict in document["verdicts"]} == {None}
    assert printed.count("rehearsal\n") == len(document["verdicts"]) > 10


def test_two_ranks_give_the_gradients_of_one(rehearsed):
    one, two = rehearsed[1]["parity"]["fp32"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["matrices"] == 2 * 14 and two["worst"] < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_the_drill_hurts_a_run_twice_and_loses_nothing(rehearsed):
    found = rehearsed[1]["drill"]
    assert "rank 1 was killed by SIGKILL" in found["killed"]["message"]
    assert "was stopped (SIGSTOP)" in found["stopped"]["message"]
    for name, step in (("killed", drill.KILL_AT), ("stopped", drill.STOP_AT)):
        hurt = found[name]
        assert hurt["exit_code"] == 1 and hurt["of"] == 2 and hurt["ranks_left"] == 0
        assert hurt["noticed_seconds"] < 60 and hurt["steps_done"] >= step
        assert hurt["steps_done"] - int(hurt["last_checkpoint"].removeprefix("step-")) <= drill.SAVE_EVERY
    assert found["resumed"]["exit_code"] == 0 and found["resumed"]["each_step_once"]
    assert found["resumed"]["last_loss"] < found["resumed"]["first_loss"] - 1
    assert found["export"]["exit_code"] == 0


def test_what_comes_back_is_little_and_well_formed(rehearsed):
    folder = rehearsed[0]
    assert {path.name for path in folder.iterdir()} == {
        "two-cards.json",
        "report.txt",
        "speed.svg",
        "time.svg",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    for name in ("speed.svg", "time.svg"):
        assert xml.etree.ElementTree.parse(folder / name).getroot().tag.endswith("svg")
