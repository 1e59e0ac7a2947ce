"""Two real ranks: what a run leaves behind, and that it ends the same whatever happened on the way."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipe.cli import main
from recipe.errors import Refused
from recipe.settings import Lora, load
from recipe.train import guard, launch
from recipe.train.checkpoint import damaged_files
from recipe.train.run import Run
from tests.train.tiny_run import (
    NO_DROPOUT,
    PLAIN_STEPS,
    WHOLE_STEPS,
    checkpoint_names,
    differing,
    end,
    family,
    flip_a_byte,
    jsonl,
    make_place,
    plain_run,
    ranks,
    running,
    start_training,
    train,
    wait_for,
    wait_for_step,
    wait_gone,
    whole_run,
    words_below,
)

STEPS = WHOLE_STEPS
STATE_FILES = {
    "adapters.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "trainer_state.json",
}
METRICS = [
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "vram_allocated_gib",
    "vram_reserved_gib",
    "host_ram_gib",
]


@pytest.fixture(scope="module")
def place():
    """A config, and how its undisturbed run `whole` has ended."""
    return whole_run()


@pytest.fixture
def config(place):
    return place[0]


@pytest.fixture
def runs(config):
    return config.parent / "runs"


def adapters(run, step=STEPS):
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "adapters.safetensors")


def test_the_run_folder_is_as_promised(place, runs):
    config, _ = place
    run = runs / "whole"
    assert load(run / "config.yaml") == load(config)
    written = yaml.safe_load((run / "config.yaml").read_text())["lora"]
    assert set(written) == {field.name for field in dataclasses.fields(Lora)}, "fully resolved"
    manifest = json.loads((run / "manifest.json").read_text())
    for key in (
        "git_commit",
        "lock_sha256",
        "image_digest",
        "model",
        "data",
        "gpus",
        "driver",
        "versions",
        "seed",
    ):
        assert key in manifest
    assert manifest["world_size"] == 2
    assert re.fullmatch("[0-9a-f]{64}", manifest["data"]["sha256"])
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in manifest["model"]["sha256"].values())
    assert "model-00001-of-00001.safetensors" in manifest["model"]["sha256"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert (run / "train.log").exists()
    assert checkpoint_names(run) == [f"step-{step:06d}" for step in range(1, STEPS + 1)]
    for checkpoint in (run / "checkpoints").iterdir():
        assert {path.name for path in checkpoint.iterdir()} == STATE_FILES
        assert damaged_files(checkpoint) == []
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["compute_dtype"]) == (STEPS, "float32")
    losses = [line["loss"] for line in jsonl(run / "metrics.jsonl")]
    assert summary["train_loss"] == pytest.approx(sum(losses) / STEPS)


def test_every_step_has_its_line_of_metrics(runs):
    lines = jsonl(runs / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    parts = json.loads((runs / "whole" / "plan.json").read_text())["host_parts"]
    planned = sum(part["gib"] for part in parts if part["name"] != "launcher")  # which is no rank
    for line in lines:
        assert list(line) == METRICS
        assert 0 < line["tokens"] <= 512
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"], rel=0.01)
        assert line["host_ram_gib"] == pytest.approx(planned, rel=0.2), "as the plan counts it"
    rates = [line["learning_rate"] for line in lines]
    assert rates[1] < rates[2] and max(rates) == pytest.approx(5e-3) and rates[-1] < rates[-2]


def test_it_learns(runs):
    lines = jsonl(runs / "whole" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    before, after = (e["loss"] for e in jsonl(runs / "whole" / "events.jsonl") if e["kind"] == "evaluation")
    assert after < before / 2
    assert json.loads((runs / "whole" / "summary.json").read_text())["held_out_loss"] == after


def test_results_go_to_standard_output_and_progress_to_standard_error(place):
    _, out, err = place[1]
    assert out.startswith(f"run whole: {STEPS} steps, held-out loss ") and len(out.splitlines()) == 1
    assert "make export-adapters RUN=whole" in out
    assert "the first rows as the model sees them ([[...]]: not in the loss)" in err
    assert re.search(rf"step 5/{STEPS}: loss \d+\.\d+, \d+ tokens/s, \d+:\d\d left", err)
    assert "Warning" not in err and "Traceback" not in err


def test_a_finished_run_is_not_trained_again(config, runs, capsys):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert main(["train", "--config", str(config), "--run", "whole"]) == 2
    assert capsys.readouterr().err.startswith("error: RUN=whole: is finished already")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_one_rank_and_two_ranks_train_alike(tmp_path):
    """The same global batch, no dropout: only rounding may differ (within an epoch; its odd pack is left out)."""
    two = plain_run()
    code, _, err = train(
        make_place(tmp_path, PLAIN_STEPS, save_every=8), "plain", *NO_DROPOUT, "--set", "compute.processes=1"
    )
    assert code == 0, err
    one = tmp_path / "runs" / "plain"
    lines = [jsonl(run / "metrics.jsonl") for run in (one, two)]
    assert len(lines[0]) == len(lines[1]) == PLAIN_STEPS
    for left, right in zip(*lines, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["tokens"] == right["tokens"]
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    left, right = (adapters(run, PLAIN_STEPS) for run in (one, two))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-4, rtol=0)

    # Two ranks go on from a checkpoint that one has written: the same rows in the same steps.
    (one / "summary.json").unlink()
    shutil.rmtree(one / "checkpoints" / f"step-{PLAIN_STEPS:06d}")
    code, _, err = train(tmp_path / "config.yaml", "plain", *NO_DROPOUT)
    assert code == 0, err
    assert "step-000008 was written by 1 ranks, and 2 go on: the global batch and its rows stay" in err
    lines[0] = jsonl(one / "metrics.jsonl")
    assert [line["tokens"] for line in lines[0]] == [line["tokens"] for line in lines[1]]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], abs=1e-4)
    assert load(one / "config.yaml").compute.processes == "auto"


def test_where_a_layer_lies_changes_no_byte(tmp_path):
    """Offloaded and computed again, dropout on, on two ranks: the same adapters as with everything here and kept."""
    steps, ended = 4, []
    for name, placed in (
        ("here", ["compute.keep_layers=2"]),
        ("elsewhere", ["compute.offload_layers=2", "compute.keep_layers=0"]),
    ):
        config = make_place(tmp_path / name, steps, save_every=steps)
        code, _, err = train(config, "run", *(word for text in placed for word in ("--set", text)))
        assert code == 0, err
        run = tmp_path / name / "runs" / "run"
        ended.append((adapters(run, steps), [line["loss"] for line in jsonl(run / "metrics.jsonl")], err))
    (here, losses, said), (elsewhere, same_losses, told) = ended
    assert "0 of 2 layers offloaded, 2 keep their activations" in said
    assert "2 of 2 layers offloaded, 0 keep their activations" in told
    assert losses == same_losses and here.keys() == elsewhere.keys()
    assert all(torch.equal(here[name], elsewhere[name]) for name in here)


def test_the_plain_kernels_train_as_the_fused_ones(tmp_path):
    """Within a whole training, whose trainer may change the modules that they borrow."""
    steps = 4
    code, _, err = train(
        make_place(tmp_path, steps, save_every=steps), "run", *NO_DROPOUT, "--set", "compute.kernels=plain"
    )
    assert code == 0, err
    plainly, fused = (
        jsonl(run / "metrics.jsonl")[:steps] for run in (tmp_path / "runs" / "run", plain_run())
    )
    # The rates are the same while both warm up and one step longer.
    for left, right in list(zip(plainly, fused, strict=True))[:3]:
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_without_held_out_rows_it_trains_and_evaluates_nothing(tmp_path):
    nothing = ["data.eval_fraction=0", "train.eval_every=1", "compute.processes=1"]
    config = make_place(tmp_path, 2)
    code, out, err = train(config, "run", *(word for text in nothing for word in ("--set", text)))
    assert code == 0, err
    assert "0 rows held out" in err
    run = tmp_path / "runs" / "run"
    assert [line["step"] for line in jsonl(run / "metrics.jsonl")] == [1, 2]
    kinds = [event["kind"] for event in jsonl(run / "events.jsonl")]
    assert kinds == ["loaded", "rehearsed", "begun", "checkpoint", "checkpoint", "finished"]
    assert json.loads((run / "summary.json").read_text())["held_out_loss"] is None
    assert "an evaluation" not in err and "nan" not in err + out


@pytest.mark.slow
def test_stopped_killed_and_damaged_it_ends_as_if_nothing_had_happened(config, runs, capsys):
    """Ctrl-C, SIGTERM, a rank killed, all killed, a damaged checkpoint: bit for bit the undisturbed run, dropout on."""
    run, whole = runs / "disturbed", runs / "whole"

    for number, code, name in ((signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")):
        process = start_training(config, "disturbed")
        wait_for_step(run, 3 if number == signal.SIGINT else 8, process)
        if number == signal.SIGINT:
            before = (run / "config.yaml").read_bytes()
            assert main(["train", "--config", str(config), "--run", "disturbed"]) == 2
            assert "another process trains this run now" in capsys.readouterr().err
            assert (run / "config.yaml").read_bytes() == before
        members = family(process)
        process.send_signal(number)
        ended, err = end(process)
        assert ended == code, (name, err)
        assert "stopping, with a checkpoint of the last step" in err
        assert running(members) == []
        last = checkpoint_names(run)[-1]
        assert err.splitlines()[-1] == f"stopped, saved up to {last}; go on with RUN=disturbed"
        assert len(jsonl(run / "metrics.jsonl")) == int(last.removeprefix("step-")) < STEPS
        assert differing(run / "checkpoints" / last, whole / "checkpoints" / last) == [], name

    process = start_training(config, "disturbed")
    wait_for_step(run, 13, process)
    members = family(process)
    ranks(process)[1].kill()
    ended, err = end(process)
    assert ended == 1, err
    assert re.fullmatch(
        r"error: training ended: rank 1 was killed by SIGKILL.*RUN=disturbed", err.splitlines()[-1]
    ), err
    assert "Traceback" not in err
    assert running(members) == [], "an orphan"

    process = start_training(config, "disturbed")
    wait_for_step(run, 18, process)
    members = family(process)
    process.kill()  # alone: its ranks live on, and a second training beside them would write into the same folder
    end(process)
    assert main(["train", "--config", str(config), "--run", "disturbed"]) == 2
    assert "another process trains this run now" in capsys.readouterr().err
    for member in running(members):
        member.kill()
    wait_gone(members)

    for name in ("events.jsonl", "metrics.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 19, "kind')  # a line that a crash has cut

    newest, before = checkpoint_names(run)[-1:-3:-1]
    flip_a_byte(run / "checkpoints" / newest / "optimizer.safetensors")
    code, _, err = train(config, "disturbed")
    assert code == 0, err
    assert f"{newest}: optimizer.safetensors is damaged; the checkpoint before it is used" in err
    assert f"run disturbed goes on from {before}" in err
    for name in checkpoint_names(whole):
        assert differing(run / "checkpoints" / name, whole / "checkpoints" / name) == [], name
    losses = [
        [(line["step"], line["loss"]) for line in jsonl(folder / "metrics.jsonl")] for folder in (run, whole)
    ]
    assert losses[0] == losses[1], "each step once, as in the undisturbed run"
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", sorted(STATE_FILES))
def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(name, runs, tmp_path):
    checkpoint = shutil.copytree(
        runs / "whole" / "checkpoints" / f"step-{STEPS:06d}", tmp_path / "step-000001"
    )
    flip_a_byte(checkpoint / name)
    assert damaged_files(checkpoint) == [name]


def test_a_changed_number_in_the_state_is_found(runs, tmp_path):
    checkpoint = shutil.copytree(
        runs / "whole" / "checkpoints" / f"step-{STEPS:06d}", tmp_path / "step-000001"
    )
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": 3}))
    assert damaged_files(checkpoint) == ["state.json"]


def test_a_run_by_epochs_says_how_far_it_will_go(tmp_path):
    settings = ["--set", "train.steps=null", "--set", "train.epochs=0.3", "--set", "train.log_every=1"]
    code, _, err = train(make_place(tmp_path, 1, warmup_steps=0), "epochs", *settings)
    assert code == 0, err
    steps = json.loads((tmp_path / "runs" / "epochs" / "summary.json").read_text())["steps"]
    assert f"training to step {steps}" in err and f"step 1/{steps}: " in err


ABORTED = "failed (exitcode: -6) local_rank: 0 (pid: 1)\n"
LOADED = {"kind": "loaded", "message": ""}
STOPPED = {"kind": "stopped", "message": ""}
ENDINGS = {
    "finished, then aborted": (True, [LOADED], [], None, ""),
    "stopped, then aborted": (False, [LOADED, STOPPED], [15], launch.Stopped, "go on with RUN=judged"),
    "aborted while stopping": (False, [LOADED], [15], Refused, "rank 0 was killed by SIGABRT"),
    "aborted": (False, [LOADED], [], Refused, "rank 0 was killed by SIGABRT"),
    "stopped before it was loaded": (False, [], [2], launch.Stopped, "before anything was to be saved"),
}


@pytest.mark.parametrize(
    ("finished", "events", "stops", "ending", "said"), ENDINGS.values(), ids=ENDINGS.keys()
)
def test_what_the_ranks_have_written_counts_not_how_they_ended(
    finished, events, stops, ending, said, tmp_path
):
    run = Run(tmp_path / "judged")
    run.folder.mkdir()
    run.log.write_text(ABORTED)
    if finished:
        run.summary.write_text("{}")
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(ending, match=said) if ending else contextlib.nullcontext():
        launch._judge(run, events, stops, guard.Guard(run, ended, 0), 1)


def test_ctrl_c_before_the_ranks_have_started_is_not_lost(config, runs):
    process = start_training(config, "early")
    wait_for(lambda: "torch.distributed.run" in words_below(process), process)
    members = family(process)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    code, err = end(process)
    assert code == 130, err
    assert time.monotonic() - started < 45
    assert not (runs / "early" / "summary.json").exists()
    assert running(members) == []


def test_a_rank_that_alone_stands_still_is_found(monkeypatch, tmp_path):
    """Real processes that look like ranks below a launcher; where all of them are stopped, somebody meant it."""
    monkeypatch.setattr(guard, "STOPPED_SECONDS", 0.0)
    monkeypatch.setattr(guard, "LOOK_SECONDS", 0.0)
    rank = f"RANK=$r {sys.executable} -c 'import time; time.sleep(60)' {guard.WORKER} &"
    launcher = subprocess.Popen(["bash", "-c", f"for r in 0 1; do {rank} done; wait"])
    watching = guard.Guard(Run(tmp_path), launcher, 0)
    try:
        limit = time.monotonic() + 10
        while len(found := {rank: pid for pid, rank in guard.ranks_of(launcher)}) < 2:
            assert time.monotonic() < limit
        assert watching.look() is None
        os.kill(found[1], signal.SIGSTOP)
        while not guard.is_stopped(found[1]):
            assert time.monotonic() < limit
        verdict = watching.look()
        assert (verdict.cause, verdict.rank) == ("rank_stopped", 1) and f"process {found[1]}" in verdict.found
        os.kill(found[0], signal.SIGSTOP)
        while not guard.is_stopped(found[0]):
            assert time.monotonic() < limit
        assert watching.look() is None
    finally:
        for member in family(launcher):
            member.kill()
        launcher.wait()


HANGS = """import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_a_rank_that_hears_nothing_does_not_wait_for_a_dead_one(monkeypatch, tmp_path):
    """As inside NCCL: the launcher would give it 30 seconds. Who died first is still named."""
    monkeypatch.setattr(guard, "ALONE_SECONDS", 1.0)
    run = Run(tmp_path)
    (tmp_path / "hangs.py").write_text(HANGS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(run.log, "wb") as log:
        launcher = subprocess.Popen(
            [*torchrun, str(tmp_path / "hangs.py"), guard.WORKER], stdout=log, stderr=log
        )
    watching, closing = guard.Guard(run, launcher, 0), None
    while launcher.poll() is None:
        assert watching.look() is None
        closing = closing or (time.monotonic() if guard.CLOSING.search(run.log.read_bytes()) else None)
        time.sleep(0.1)
    assert time.monotonic() - closing < 15
    assert watching.failed_rank() == (-9, 1)
