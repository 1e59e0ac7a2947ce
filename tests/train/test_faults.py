"""What breaks while two real ranks train: processes, disks, numbers. Nothing is lost beyond the last checkpoint."""

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from recipe.doctor.diagnose import all_marks, diagnose
from recipe.doctor.read import read_run
from recipe.train.checkpoint import damaged_files
from recipe.train.run import Run
from tests.train.faults import put_fault
from tests.train.tiny_run import (
    ROOT,
    WHOLE_STEPS,
    checkpoint_names,
    differing,
    end,
    family,
    jsonl,
    make_place,
    ranks,
    running,
    start_training,
    train,
    wait_for,
    wait_for_step,
    wait_gone,
    whole_run,
)

pytestmark = pytest.mark.slow


def kill_at_random(config, name, kills, seed, steps):
    """Train to the end through so many SIGKILLs, of one rank, after which all start again, or of all. What was hit.

    Each at a random moment from the start of the ranks on: loading, in a step, while saving. `steps`: of the whole run.
    """
    chance = random.Random(seed)
    run, hit, process = config.parent / "runs" / name, [], None
    for number in range(kills):
        process = process or start_training(config, name, "--set", f"train.restarts={kills}")
        wait_for(partial(both_run, process), process)
        # Steps are left for those that come later; a third of them is before the first step.
        step = durable(run) + chance.choice([0, 1, 1]) * chance.randint(1, steps // kills)
        while steps_done(run) < step and both_run(process):
            time.sleep(0.003)
        time.sleep(chance.uniform(0, 0.3))
        saved, one = durable(run), chance.random() < 0.7
        if one:
            chance.choice(ranks(process)).kill()
            wait_for(partial(restarted, run, 1 + sum(hit)), process)
        else:
            members = family(process)
            for member in running(members):
                member.kill()
            process.communicate()
            wait_gone(members)
            process = None
        hit.append(one)
        assert durable(run) >= saved, f"kill {number}: a checkpoint was lost"
    code, err = end(process or start_training(config, name))
    assert code == 0, err
    return hit


def both_run(process):
    return len(ranks(process)) == 2


def steps_done(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def durable(run):
    """The newest step whose checkpoint was said to be there."""
    path = run / "events.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines if b'"checkpoint"' in line and line.endswith(b"}")]
    return max((event["step"] for event in events if event["kind"] == "checkpoint"), default=0)


def restarted(run, times):
    path = run / "events.jsonl"
    return path.exists() and path.read_bytes().count(b'"kind": "restarted"') == times


def assert_as_undisturbed(run, whole=None):
    """Of two runs of one config; `whole` is the one that nobody disturbed."""
    whole = whole or whole_run()[0].parent / "runs" / "whole"
    last = checkpoint_names(whole)[-1]
    assert differing(run / "checkpoints" / last, whole / "checkpoints" / last) == []
    losses = [[(e["step"], e["loss"]) for e in jsonl(r / "metrics.jsonl")] for r in (run, whole)]
    assert losses[0] == losses[1], "each step once, as in the undisturbed run"
    assert not list((run / "checkpoints").glob(".*")), "what a killed save has left"


def test_killed_eight_times_at_random_it_ends_as_if_nothing_had_happened():
    config = whole_run()[0]
    hit = kill_at_random(config, "killed", 8, seed=8, steps=WHOLE_STEPS)
    run = config.parent / "runs" / "killed"
    assert len(hit) == 8 and set(hit) == {True, False}
    assert_as_undisturbed(run)
    told = [event for event in jsonl(run / "events.jsonl") if event["kind"] == "restarted"]
    for event in told:
        assert event["cause"] == "rank_died" and "was killed by SIGKILL" in event["message"], event
        assert "all ranks start again from the last checkpoint" in event["message"]


# The process that makes the disk, fills it and trains on it lives in a mount namespace of its own.
FULL_DISK = """
import json, os, psutil, signal, subprocess, sys, time
from pathlib import Path
config, root = sys.argv[1], Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", root], check=True)
run, filler = root / "r", root / "filler"

def events(kind):
    lines = (run / "events.jsonl").read_bytes().splitlines() if (run / "events.jsonl").exists() else []
    return [e for e in map(json.loads, [l for l in lines if l.endswith(b"}")]) if e["kind"] == kind]

def start(policy):
    command = [sys.executable, "-m", "recipe", "train", "--config", config, "--run", "r", "--set",
               f"paths.runs={root}", "--set", f"train.on_save_error={policy}", "--set", "train.keep_checkpoints=2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

def wait(what, process):
    limit = time.monotonic() + 90
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)

def fill(process):
    # The ranks stand still meanwhile: a training of this size would be done before.
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "recipe.train.worker" in p.cmdline()]
    for rank in ranks:
        rank.suspend()
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    for rank in ranks:
        rank.resume()

def names():
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))

process = start("continue")
wait(lambda: len(events("checkpoint")) >= 3, process)
fill(process)
wait(lambda: [e for e in events("warning") if e["cause"] == "save_failed"], process)
time.sleep(1)
full = names()
filler.unlink()
before = len(events("checkpoint"))
wait(lambda: len(events("checkpoint")) > before + 1, process)
process.send_signal(signal.SIGINT)
stopped = process.communicate()[1]
process = start("stop")
before = len(events("checkpoint"))
wait(lambda: len(events("checkpoint")) > before, process)
fill(process)
ended = process.communicate()[1]
code, kept = process.returncode, names()
filler.unlink()
process = start("stop")
finished = process.communicate()[1]
from recipe.train.checkpoint import damaged_files
damaged = [name for name in kept if (run / "checkpoints" / name).exists() and damaged_files(run / "checkpoints" / name)]
subprocess.run(["cp", "-r", run, sys.argv[3]], check=True)
print(json.dumps({"full": full, "stopped": stopped, "code": code, "ended": ended, "kept": kept, "damaged": damaged,
                  "finished": finished, "end": process.returncode}))
"""


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    """On a small tmpfs: training goes on, or stops, as set; with room again it ends as the undisturbed run."""
    config, disk, copy = whole_run()[0], tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK]
    done = subprocess.run(
        [*command, str(config), str(disk), str(copy)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["full"]) == 2, "both that were kept are there while the disk is full"
    warning = next(e for e in jsonl(copy / "events.jsonl") if e.get("cause") == "save_failed")
    assert (
        "No space left on device" in warning["message"]
        and "is untouched; training goes on" in warning["message"]
    )
    assert found["code"] == 1 and len(found["kept"]) == 2 and found["damaged"] == []
    said = found["ended"].splitlines()[-1]
    assert "the checkpoint could not be written" in said and "No space left on device" in said, said
    assert f"{found['kept'][-1]} is untouched; free some space" in said and "Traceback" not in found["ended"]
    assert found["end"] == 0, found["finished"]
    assert_as_undisturbed(copy)


# One step of one rank: its loss is no number.
NAN_ONCE = """
import os
_loss, _calls = VocabularyHead.loss, []
def loss(self, hidden, targets, *more):
    _calls.append(1)
    losses, gradient = _loss(self, hidden, targets, *more)
    if os.environ.get("RANK") == "1" and len(_calls) == int(os.environ["NAN_CALL"]):
        losses, gradient = losses * float("nan"), gradient * float("nan")
    return losses, gradient
VocabularyHead.loss = loss
"""


def test_a_step_that_is_no_number_is_left_out_and_counted(tmp_path, monkeypatch):
    # The rehearsal takes two passes of the head, the evaluation two, and a step two micro-batches.
    steps, bad = 6, 3
    monkeypatch.setenv("NAN_CALL", str(4 + 2 * bad))
    monkeypatch.setenv(*put_fault(tmp_path / "fault", "recipe.engine.head", NAN_ONCE).popitem())
    config = make_place(tmp_path, steps, on_nan="skip")
    code, _, err = train(config, "skips")
    assert code == 0, err
    run = tmp_path / "runs" / "skips"
    lines = {line["step"]: line for line in jsonl(run / "metrics.jsonl")}
    skipped = [step for step, line in lines.items() if line.get("skipped")]
    assert len(skipped) == 1 and len(lines) == steps
    step = skipped[0]
    assert lines[step]["loss"] is None and lines[step]["grad_norm"] is None
    assert all(0 < line["loss"] < 10 for number, line in lines.items() if number != step), (
        "the others have theirs"
    )
    saved = [run / "checkpoints" / f"step-{number:06d}" for number in (step - 1, step)]
    assert "adapters.safetensors" not in differing(*saved) and "optimizer.safetensors" not in differing(
        *saved
    )
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    warning = next(e for e in jsonl(run / "events.jsonl") if e.get("cause") == "nan_batch")
    assert warning["message"] == f"step {step}: the loss is nan, the step was left out (train.on_nan: skip)"
    assert [d.rule.name for d in diagnose(read_run(Run(run), all_marks()))] == ["nan_batch"]


# From step 4 on a layer takes far longer than anybody who stops wants to wait.
SLOW = """
import os, time
_forward = FusedLayer.forward
def forward(self, *arguments):
    if os.path.exists(os.environ["SLOW"]):
        time.sleep(300)
    return _forward(self, *arguments)
FusedLayer.forward = forward
"""


def test_a_stop_does_not_wait_for_a_long_micro_batch(tmp_path):
    number = signal.SIGTERM
    slow = tmp_path / "slow"
    fault = put_fault(tmp_path / "fault", "recipe.engine.layer", SLOW)
    config = make_place(tmp_path, 400, save_every=1000)
    process = start_training(config, "slow", environment={**fault, "SLOW": str(slow)})
    run = tmp_path / "runs" / "slow"
    wait_for_step(run, 3, process)
    slow.touch()
    time.sleep(2)
    members, done = family(process), len(jsonl(run / "metrics.jsonl"))
    asked = time.monotonic()
    process.send_signal(number)
    code, err = end(process)
    assert time.monotonic() - asked < 30
    assert code == 128 + number, err
    assert running(members) == []
    assert checkpoint_names(run) == [f"step-{done:06d}"], (
        "the last whole step, though none was to be saved yet"
    )
    assert damaged_files(run / "checkpoints" / f"step-{done:06d}") == []
    assert err.splitlines()[-1] == f"stopped, saved up to step-{done:06d}; go on with RUN=slow"
    assert f"stopped after step {done} of 400" in err
