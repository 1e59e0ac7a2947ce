"""The whole path on a real pretrained model: what `make demo` promises, from its own files and output.

Two real ranks train SmolLM2-135M; about four minutes on two cores. Nothing here depends on how fast they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.data.sources import DEMO
from recipe.files import read_json
from recipe.showcase import ON_THE_CPU, PeakMemory, stages

pytestmark = [pytest.mark.slow, pytest.mark.registered]
ROOT = Path(__file__).parent.parent
RUN = "shown"


def recipe(folder, *arguments):
    """A command as a user gives it, with `folder` as the place for models and runs."""
    return subprocess.run(
        [sys.executable, "-m", "recipe", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = recipe(folder, "demo", "--run", RUN)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / RUN
    return SimpleNamespace(
        folder=folder, run=run, out=done.stdout, err=done.stderr, result=read_json(run / "demo.json")
    )


def test_it_teaches_what_can_be_counted(demo):
    base, tuned = demo.result["base"], demo.result["tuned"]
    assert base["prompts"] == tuned["prompts"] >= 50
    gain = 100 * (tuned["exact_matches"] - base["exact_matches"]) / tuned["prompts"]
    assert gain >= 40, (base, tuned)
    assert tuned["loss"] < base["loss"] / 4


def test_the_held_out_rows_are_the_demos_own(demo):
    held_out = [json.loads(line) for line in (DEMO / "heldout.jsonl").read_text().splitlines()]
    report = read_json(demo.run / "eval.json")
    assert report["held_out_rows"] == len(held_out)
    answers = {row["messages"][-1]["content"] for row in held_out}
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        assert sample["reference"] in answers and sample["base"] and sample["tuned"]


def test_its_rows_fill_their_slots(demo):
    stats = read_json(demo.run / "data" / "stats.json")
    assert stats["fill"] >= 0.97 and stats["rows"] == 300 and stats["held_out_rows"] == 60


def test_each_stage_says_what_it_does_how_long_and_where_the_result_lies(demo):
    steps = stages(RUN, "runs")
    for number, stage in enumerate(steps, 1):
        assert (
            f"[{number}/{len(steps)}] {stage.name}: {stage.what} (about {stage.expected_seconds} s)"
            in demo.err
        )
    assert [measured["stage"] for measured in demo.result["stages"]] == [stage.name for stage in steps]
    base, tuned = demo.result["base"], demo.result["tuned"]
    assert (
        f"before {base['exact_matches']} of {base['prompts']}, after {tuned['exact_matches']} of {tuned['prompts']}"
        in demo.out
    )
    assert f"verified adapters: {Path('runs') / RUN / 'adapters'}" in demo.out
    assert f"make chat RUN={RUN}" in demo.out
    for noise in ("Warning", "Traceback", "it/s]"):
        assert noise not in demo.out + demo.err


def test_no_stage_takes_more_than_6_gb(demo):
    peaks = {measured["stage"]: measured["peak_ram_gib"] for measured in demo.result["stages"]}
    assert max(peaks.values()) * 2**30 <= 6e9, peaks
    assert peaks["train"] > 1, "the ranks are part of the stage"


def test_the_exported_adapters_give_the_trainers_loss(demo):
    proof = read_json(demo.run / "adapters" / "export.json")
    loss = proof["held_out_loss"]
    assert abs(loss["plain_peft"] - loss["trainer"]) <= 1e-4
    assert proof["tensors"] == 30 * 7 * 2


def test_chat_answers_as_it_was_taught(demo):
    """With the system message of the training rows, unasked; without the adapters it knows nothing of it."""
    question = "The projector shows no picture at all. We need it working within the hour."
    tuned = recipe(demo.folder, "chat", "--run", RUN, "--once", question)
    assert (tuned.returncode, tuned.stdout.strip()) == (0, "technical | urgent")
    base = recipe(
        demo.folder, "chat", "--run", RUN, "--once", question, "--base", "--system", "Answer briefly."
    )
    assert base.returncode == 0 and base.stdout.strip() != "technical | urgent"


def test_a_second_demo_prepares_nothing_again(demo):
    before = {path: path.stat().st_mtime_ns for path in (demo.folder / "models").rglob("*")}
    config = ROOT / "recipe" / "configs" / "smollm2-135m.yaml"
    done = recipe(demo.folder, "prepare", "--config", str(config), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["fresh"] is False
    assert before == {path: path.stat().st_mtime_ns for path in (demo.folder / "models").rglob("*")}


def test_it_is_the_same_beside_gpus(tmp_path):
    """A machine with three cards, by its nvidia-smi: the demo plans two CPU ranks there too."""
    smi = tmp_path / "nvidia-smi"
    card = "{}, GPU-{}, NVIDIA GeForce RTX 3090, 24576, 24000, 8.6, 580.95"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{card.format(i, i)}'\n" for i in range(3)))
    smi.chmod(0o755)
    (command,) = [stage.command for stage in stages(RUN, "runs") if stage.name == "plan"]
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    found = {}
    for name, place in (("demo", ON_THE_CPU), ("else", {})):
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | path | place
        batch = ("--set", "train.global_batch_tokens=768") if name == "else" else ()
        done = subprocess.run(
            [sys.executable, "-m", "recipe", *command, *batch, "--json"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        plan = json.loads(done.stdout)
        found[name] = plan["device"], plan["world_size"]
    assert found == {"demo": ("cpu", 2), "else": ("gpu", 3)}


def test_peak_memory_counts_a_whole_process_tree():
    """A child of a child fills 300 MB, which the measured peak must hold."""
    child = "x = b'1' * 300_000_000; import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent])
    peak = PeakMemory(process.pid)
    process.wait()
    peak.stop()
    assert 0.28 < peak.gib < 0.6
