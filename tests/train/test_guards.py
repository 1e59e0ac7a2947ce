"""Two real ranks of a tiny model that are killed, stopped, made to hang, slowed, given no disk and broken numbers.

What a rank does wrong is put into it by a sitecustomize module of the test's: the code that trains has no switch for it.
"""

import contextlib
import json
import os
import re
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

from recipe.train import guard
from recipe.train.pulse import read_beats
from recipe.train.run import Run
from tests.train.faults import put_fault
from tests.train.tiny_run import family, jsonl, make_place, running, start_training, train

pytestmark = pytest.mark.slow

STEPS = 400
# A rank that sleeps for ever within a layer; rehearsal, evaluation and the first steps are before.
SLEEPS = """
import os, time
_forward, _calls = FusedLayer.forward, []
def forward(self, x, layer, step, keep):
    _calls.append(1)
    if os.environ.get("RANK") == "1" and len(_calls) > 40 and layer.index == 1:
        open(os.environ["SLEPT"], "w").close()
        time.sleep(3600)
    return _forward(self, x, layer, step, keep)
FusedLayer.forward = forward
"""
# Four of these make a micro-batch that takes longer than a rank may be silent.
SLOW = """
import time
_forward, _backward = FusedLayer.forward, FusedLayer.backward
def forward(self, *arguments):
    time.sleep(12)
    return _forward(self, *arguments)
def backward(self, *arguments):
    time.sleep(12)
    return _backward(self, *arguments)
FusedLayer.forward, FusedLayer.backward = forward, backward
"""
# A weight of the head that goes bad after some passes, as a bit of memory may.
GOES_BAD = """
_loss, _calls = VocabularyHead.loss, []
def loss(self, hidden, targets, *more):
    _calls.append(1)
    if len(_calls) > 15:
        self.weight[0, 0] = float("nan")
    return _loss(self, hidden, targets, *more)
VocabularyHead.loss = loss
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("guards"), STEPS, save_every=2, keep_checkpoints=500)


def run_of(config, name):
    return Run(config.parent / "runs" / name)


def last_error(run):
    return [event for event in jsonl(run.events) if event["kind"] == "error"][-1]


class Disturbed(threading.Thread):
    """Sends rank 1 a signal when it has come to step 3; knows when that was, and all that ran for the run then."""

    def __init__(self, run, number):
        super().__init__(daemon=True)
        self.run_, self.number = run, number
        self.sent, self.members = 0.0, []

    def run(self):
        beats = {}
        while 1 not in beats or beats[1].phase not in ("train", "save") or beats[1].step < 3:
            time.sleep(0.2)
            beats = read_beats(self.run_)
        ranks = [psutil.Process(beat.pid) for beat in beats.values()]
        self.members = [*ranks, ranks[0].parent()]
        os.kill(beats[1].pid, self.number)
        self.sent = time.monotonic()

    def judged(self, code, err, ended):
        """The run and its last line, where it has ended as promised."""
        assert code == 1, err
        assert ended - self.sent < 60
        assert len(self.members) == 3 and running(self.members) == [], "an orphan"
        return self.run_, err.splitlines()[-1]


PLACE = r"(step \d+, micro-batch \d+, [a-z', -]+( \d+)?|(save|evaluate): [a-z -]+)"


@pytest.fixture(scope="module")
def killed(config):
    thread = Disturbed(run_of(config, "killed"), signal.SIGKILL)
    thread.start()
    code, _, err = train(config, "killed")
    return thread.judged(code, err, time.monotonic())


class Background:
    """A training beside the tests: those below mostly wait, for limits as they are."""

    def __init__(self, config, name, *words, environment=None):
        self.run = run_of(config, name)
        self.process = start_training(config, name, *words, environment=environment)
        self.waiting = ThreadPoolExecutor(1)
        self.future = self.waiting.submit(self._wait)

    def _wait(self):
        _, err = self.process.communicate(timeout=400)
        return self.process.returncode, err, time.monotonic()

    def end(self):
        """Where a test has failed before it ended."""
        if self.process.poll() is None:
            for member in family(self.process):
                member.kill()
        self.waiting.shutdown()


@pytest.fixture(scope="module")
def beside(config, killed, tmp_path_factory):
    """By name: `stopped`, `hangs` and `slow`, begun together when the first run has shown that all else works."""
    root = tmp_path_factory.mktemp("faults")
    sleeps = put_fault(root / "sleeps", "recipe.engine.layer", SLEEPS) | {"SLEPT": str(root / "slept")}
    slow = put_fault(root / "slow", "recipe.engine.layer", SLOW)
    disturbed = Disturbed(run_of(config, "stopped"), signal.SIGSTOP)
    disturbed.start()
    runs = {
        "stopped": Background(config, "stopped", "--set", "train.rehearsal=false"),
        "hangs": Background(config, "hangs", environment=sleeps),
        "slow": Background(config, "slow", *ONE_SLOW_MICRO_BATCH, environment=slow),
    }
    yield SimpleNamespace(**runs, disturbed=disturbed, slept=root / "slept")
    for background in runs.values():
        background.end()
    for member in running(disturbed.members):
        member.kill()


ONE_SLOW_MICRO_BATCH = [
    word
    for setting in (
        "train.steps=1",
        "train.warmup_steps=0",
        "train.global_batch_tokens=128",
        "train.rehearsal=false",
        "data.eval_fraction=0",
        "compute.processes=1",
    )
    for word in ("--set", setting)
]


@pytest.fixture(scope="module")
def stopped(beside):
    return beside.disturbed.judged(*beside.stopped.future.result())


def test_a_killed_rank_is_named_with_its_place(killed):
    run, said = killed
    host = os.uname().nodename
    assert re.fullmatch(
        rf"error: training ended: rank 1 was killed by SIGKILL; .*; it was last at {PLACE} on {host}; .*RUN=killed",
        said,
    ), said
    event = last_error(run)
    assert (event["cause"], event["rank"], event["host"]) == ("rank_died", 1, host)
    assert event["step"] >= 3 and event["operation"]


@pytest.mark.usefixtures("beside")
def test_a_loss_that_is_no_number_ends_the_run_without_a_checkpoint_of_it(config, tmp_path, monkeypatch):
    monkeypatch.setenv(*put_fault(tmp_path, "recipe.engine.head", GOES_BAD).popitem())
    code, _, err = train(config, "broken")
    run = run_of(config, "broken")
    said = err.splitlines()[-1]
    event = next(event for event in jsonl(run.events) if event["kind"] == "error")
    assert code == 1 and event["cause"] == "nan_loss"
    assert re.search(
        r"step \d: the loss is nan; nothing of that state was saved, the last good checkpoint is step-00000\d",
        said,
    )
    assert "RUN=broken" in said and "Traceback" not in err
    bad = event["step"]
    saved = sorted(int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoints").iterdir())
    assert saved and max(saved) < bad and f"step-{max(saved):06d}" in said
    assert [line["step"] for line in jsonl(run.metrics)] == list(range(1, bad))


@contextlib.contextmanager
def files_of_at_most(nbytes):
    """For this process and those that it starts: what a full disk does to a large file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_cannot_work_is_found_before_step_1(config):
    with files_of_at_most(2**20):
        code, _, err = train(config, "no-space", "--set", "lora.rank=128", "--set", "compute.processes=1")
    run = run_of(config, "no-space")
    said = err.splitlines()[-1]
    assert code == 1 and re.search(
        r"in the rehearsal before step 1: .*no-space: a checkpoint cannot be written \(.*\); free some space",
        said,
    ), said
    assert jsonl(run.metrics) == [] and not (run.folder / "checkpoints").exists()
    assert not [path for path in run.folder.iterdir() if "rehearsal" in path.name]


def test_a_stopped_rank_is_named_with_its_place(stopped):
    run, said = stopped
    host = os.uname().nodename
    assert re.fullmatch(
        rf"error: training ended: rank 1 \(process \d+\) was stopped \(SIGSTOP\) at {PLACE}, for 20 s while .* on {host}; "
        r"stacks: .*train\.log.*RUN=stopped",
        said,
    ), said
    event = last_error(run)
    assert (event["cause"], event["rank"], event["host"]) == ("rank_stopped", 1, host)
    assert event["step"] >= 3 and event["operation"]
    assert "Current thread" in run.log.read_text() or "Thread 0x" in run.log.read_text(), (
        "the other rank's stacks"
    )


def test_a_rehearsal_changes_no_byte_of_what_follows(killed, stopped):
    """One of them has rehearsed, the other not; dropout is on."""
    with_it, without = killed[0], stopped[0]
    kinds = [[event["kind"] for event in jsonl(run.events)] for run in (with_it, without)]
    assert "rehearsed" in kinds[0] and "rehearsed" not in kinds[1]
    assert kinds[0].index("rehearsed") < kinds[0].index("begun")
    for name in ("adapters.safetensors", "optimizer.safetensors", "rng.safetensors"):
        left, right = (run.checkpoint(2) / name for run in (with_it, without))
        assert left.read_bytes() == right.read_bytes(), name
    losses = [[line["loss"] for line in jsonl(run.metrics)][:2] for run in (with_it, without)]
    assert losses[0] == losses[1]
    assert not (with_it.folder / ".rehearsal").exists()
    event = next(event for event in jsonl(with_it.events) if event["kind"] == "rehearsed")
    assert event["seconds"] > 0 and event["checkpoint_bytes"] > 10_000 and "vram_reserved_gib" in event
    rows = [sum(row) for row in _rows(with_it)]
    assert event["tokens"] == max(rows)


def _rows(run):
    from recipe.data.pack import MicroBatches

    return [row["seq_lengths"] for row in MicroBatches.open(run.folder / "data", "train")]


def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(beside):
    code, err, ended = beside.hangs.future.result()
    assert ended - (beside.slept.stat().st_mtime - time.time() + time.monotonic()) < 60
    said = err.splitlines()[-1]
    assert code == 1 and re.fullmatch(
        r"error: training ended: rank 1 has stood at step \d, micro-batch \d, forward layer 1 for \d+ s while the others wait "
        r"for it at step \d, micro-batch \d, [a-z, ]+( \d)? on .*; stacks: .*; collectives: flight-recorder-rank-0\.json, "
        r"flight-recorder-rank-1\.json; .*RUN=hangs",
        said,
    ), said
    run = beside.hangs.run
    event = last_error(run)
    assert (event["cause"], event["rank"], event["operation"]) == ("rank_behind", 1, "forward layer 1")
    stacks = run.log.read_text().partition("stacks of rank 1 (process ")[2]
    assert re.search(r'File "<string>", line \d+ in forward\n', stacks), "the stack of the one that sleeps"
    collectives = json.loads((run.folder / "flight-recorder-rank-0.json").read_text())
    assert collectives["entries"]
    assert all(not psutil.pid_exists(beat.pid) for beat in read_beats(run).values())


def test_slow_is_no_hang(beside):
    """A micro-batch of 48 s: it gets on layer by layer."""
    code, err, _ = beside.slow.future.result()
    assert code == 0, err
    (line,) = jsonl(beside.slow.run.metrics)
    assert line["step_seconds"] > guard.SILENT_SECONDS
