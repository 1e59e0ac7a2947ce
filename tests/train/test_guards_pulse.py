"""What a rank's pulse says, and how ranks are judged by it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import timeit

import pytest
import torch

from recipe.errors import Refused, UserError
from recipe.plan.placement import Placement
from recipe.train import checkpoint, guard, worker
from recipe.train.guard import Guard, hung, oom_kills
from recipe.train.pulse import Beat, Card, Pulse, pulse_file, read_beats
from recipe.train.run import Run
from tests.train.tiny_run import ROOT, jsonl

RANK = """
import ctypes, os, sys, time
from pathlib import Path
from recipe.train.pulse import Pulse
from recipe.train.run import Run
pulse = Pulse(Run(Path(sys.argv[1])), 1)
pulse.start()
pulse.step, pulse.micro_batch = 12, 3
pulse.enter("train")
pulse.mark("forward layer", 17)
if sys.argv[2] == "forks" and os.fork() == 0:
    pulse.mark("of the child")
    time.sleep(60)
if sys.argv[2] == "holds":
    time.sleep(2.5)
    ctypes.PyDLL(None).sleep(60)  # unlike CDLL it keeps the interpreter's lock
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    return run


def beat(rank, position, operation="forward layer 3", **more):
    values = {"pid": 1, "born": 0.0, "host": f"host{rank}", "beat": 9, "alone": 0, "phase": "train"}
    values |= {"step": 7, "micro_batch": 2, "progress": 0.0, "available_gib": 10.0}
    return Beat(rank=rank, position=position, operation=operation, **(values | more))


def started(run, how):
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(run.folder), how], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while not (found := read_beats(run)) or found[1].operation != "forward layer 17":
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    return process


def test_a_pulse_says_where_its_rank_is_and_goes_on_beating(run):
    process = started(run, "waits")
    try:
        first = read_beats(run)[1]
        assert first.where == "step 12, micro-batch 3, forward layer 17"
        assert (first.rank, first.pid, first.ended) == (1, process.pid, None)
        assert first.host == os.uname().nodename and first.available_gib > 0
        time.sleep(2.5)
        later = read_beats(run)[1]
        assert later.beat > first.beat
        assert (later.position, later.progress) == (first.position, first.progress), "beating is no progress"
    finally:
        process.kill()
        process.wait()


def test_a_pulse_is_silent_while_the_interpreter_is_held_and_the_stacks_are_still_told(run):
    process = started(run, "holds")
    try:
        time.sleep(4)
        before = read_beats(run)[1].beat
        time.sleep(2.5)
        assert read_beats(run)[1].beat == before
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
    finally:
        process.kill()
    assert 'File "<string>", line' in process.communicate()[1]


def test_a_forked_child_writes_no_pulse(run):
    process = started(run, "forks")
    try:
        time.sleep(2.5)
        found = read_beats(run)[1]
        assert (found.pid, found.operation) == (process.pid, "forward layer 17")
    finally:
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        )
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
        process.wait()


def test_a_mark_costs_less_than_a_microsecond(run):
    pulse = Pulse(run, 0)
    seconds = min(timeit.repeat(lambda: pulse.mark("forward layer", 3), number=10_000, repeat=20)) / 10_000
    assert seconds < 1e-6


class Event:
    """Stands for a CUDA event: done when the card has come to it, which here the test says."""

    def __init__(self):
        self.recorded = self.done = False

    def record(self):
        self.recorded, self.done = True, False

    def query(self):
        if self.done is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.done


def test_on_a_gpu_a_mark_counts_when_the_card_has_come_to_it():
    events = [Event() for _ in range(3)]
    card = Card(events)
    assert card.reached() is None
    for number in range(5):
        card.record((number,))
    recorded = events[::-1]  # taken from the end
    assert all(event.recorded for event in events) and card.reached() is None
    recorded[1].done = True
    assert card.reached() is None, "in their order"
    recorded[0].done = True
    assert card.reached() == (1,)
    card.record((5,))
    recorded[2].done = True
    assert card.reached() == (2,), "3 and 4 found no free event; 5 has not come yet"
    recorded[1].done = None
    assert card.reached() == (2,), "a broken card stands where it broke"


def test_a_card_that_is_quicker_than_the_pulse_looks_loses_no_mark():
    events = [Event() for _ in range(3)]
    card = Card(events)
    for number in range(50):
        card.record((number,))
        for event in events:
            event.done = event.recorded
    assert card.reached() == (49,)


@pytest.mark.gpu
def test_a_real_card_is_followed(run):
    pulse = Pulse(run, 0)
    pulse.start()
    pulse.follow(torch.device("cuda"))
    x = torch.randn(8192, 8192, device="cuda")
    pulse.mark("first")
    torch.cuda.synchronize()
    for _ in range(400):
        x @ x
    pulse.mark("second")  # the host is here long before the card
    pulse._write()
    assert read_beats(run)[0].operation == "first"
    torch.cuda.synchronize()
    pulse._write()
    assert read_beats(run)[0].operation == "second"
    pulse.end(0)


def test_a_pulse_that_is_half_written_is_left_for_the_next_look(run):
    path = pulse_file(run, 0)
    path.parent.mkdir()
    path.write_text(json.dumps(vars(beat(0, 5)))[:40])
    pulse_file(run, 1).write_text(json.dumps(vars(beat(1, 5))) + " " * 300 + "\n")
    assert list(read_beats(run)) == [1]


def test_the_rank_that_the_others_wait_for_is_named():
    verdict = hung([beat(0, 21, "gather for forward layer 4"), beat(1, 20), beat(2, 21)], 45)
    assert (verdict.cause, verdict.rank) == ("rank_behind", 1)
    assert verdict.found.startswith(
        "rank 1 has stood at step 7, micro-batch 2, forward layer 3 for 45 s while the others wait for it"
    )
    assert verdict.place() == {
        "rank": 1,
        "host": "host1",
        "phase": "train",
        "step": 7,
        "micro_batch": 2,
        "operation": "forward layer 3",
    }


def test_where_all_ranks_stand_at_one_place_none_is_blamed():
    verdict = hung([beat(0, 20), beat(1, 20)], 45)
    assert (verdict.cause, verdict.rank) == ("rank_hung", None)
    assert "all 2 ranks stand at step 7, micro-batch 2, forward layer 3 for 45 s" in verdict.found
    assert hung([beat(0, 20)], 45).rank == 0


def test_a_rank_that_has_not_begun_is_the_one_that_is_waited_for():
    verdict = hung([beat(0, 2, "join the process group", phase="load")], 45, missing=[1])
    assert (verdict.cause, verdict.rank, verdict.place()) == ("rank_behind", 1, {"rank": 1})
    assert verdict.found == (
        "rank 1 has not begun for 45 s while the others wait for it at load: join the process group"
    )


def standing_guard(run, monkeypatch, phase, process):
    """A guard over a real process that makes no mark, in `phase`, and the time that it believes in."""
    clock = [1000.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    watching = Guard(run, process, 0)
    path = pulse_file(run, 0)
    path.parent.mkdir(exist_ok=True)
    born = guard.psutil.Process(process.pid).create_time()

    def seconds_later(seconds, position=20, operation="forward layer 3", meanwhile=lambda: None):
        values = {"pid": process.pid, "born": born, "phase": phase, "operation": operation}
        path.write_text(json.dumps(vars(beat(0, position, **values))))
        verdict = None
        for _ in range(0, seconds, 5):
            meanwhile()
            clock[0] += 5
            verdict = verdict or watching.look()
        return verdict

    return clock, seconds_later


SILENT = int(guard.SILENT_SECONDS)


@pytest.fixture
def child():
    """child(*command, **options): a process that is gone after the test."""
    begun = []

    def begin(*command, **options):
        begun.append(subprocess.Popen(command, **options))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("phase", ["load", "rehearsal", "evaluate", "train", "save", "end"])
def test_a_silence_is_noticed_in_every_phase_and_progress_begins_it_anew(run, monkeypatch, phase, child):
    clock, seconds_later = standing_guard(run, monkeypatch, phase, child("sleep", "60"))
    assert seconds_later(SILENT - 10) is None
    assert seconds_later(SILENT - 10, position=21) is None
    clock[0] += 3600  # the machine slept
    assert seconds_later(SILENT - 10, position=21) is None
    assert seconds_later(15, position=21).cause == "rank_hung"


# Writes as much as it is asked for, as one long call of a save does, and makes no mark.
WRITES = """
import sys
with open(sys.argv[1], "wb", buffering=0) as file:
    for line in sys.stdin:
        file.write(bytes(int(line)))
        print(flush=True)
"""


def test_bytes_that_go_to_a_disk_are_no_silence(run, monkeypatch, child, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = child(sys.executable, "-c", WRITES, str(tmp_path / "file"), **pipes)
    _, seconds_later = standing_guard(run, monkeypatch, "save", process)

    def writes(nbytes):
        def write():
            print(nbytes, file=process.stdin, flush=True)
            process.stdout.readline()

        return write

    assert seconds_later(4 * SILENT, meanwhile=writes(guard.MOVED_BYTES // 4)) is None
    assert seconds_later(SILENT + 10, meanwhile=writes(4096)).cause == "rank_hung", (
        "as much as a pulse writes"
    )


def flush(path):
    with open(path, "wb") as file:
        file.write(os.urandom(4 * guard.MOVED_BYTES))
        file.flush()
        os.fsync(file.fileno())


def test_a_long_fsync_is_no_silence(run, monkeypatch, child, tmp_path):
    process = child(sys.executable, "-c", "import time; time.sleep(60)")
    _, seconds_later = standing_guard(run, monkeypatch, "save", process)
    flushes = {"meanwhile": lambda: flush(tmp_path / "flushed")}
    assert seconds_later(2 * SILENT, operation=checkpoint.WAIT, **flushes) is None
    assert seconds_later(SILENT + 10, operation=checkpoint.WAIT).cause == "rank_hung", "a disk that is gone"
    assert seconds_later(SILENT + 10, position=21, **flushes).cause == "rank_hung", "no fsync of its own"


COMPUTES = "while True: pass"


def test_computing_is_no_silence_where_no_other_rank_is_waited_for(run, monkeypatch, child):
    monkeypatch.setattr(guard, "COMPUTED_SECONDS", 0.05)
    process = child(sys.executable, "-c", COMPUTES)
    _, seconds_later = standing_guard(run, monkeypatch, "load", process)
    computes = {"meanwhile": lambda: time.sleep(0.1)}
    assert seconds_later(SILENT + 10, operation=guard.COMPUTES[0], **computes) is None
    assert seconds_later(SILENT + 10, operation="join the process group", **computes).cause == "rank_hung"


def test_what_computes_alone_is_what_the_ranks_call_so():
    sources = [
        path.read_text() for folder in ("train", "engine") for path in (ROOT / "recipe" / folder).glob("*.py")
    ]
    for operation in guard.COMPUTES:
        assert any(re.search(rf'mark(_alone)?\("{operation}"\)', source) for source in sources), operation


@pytest.mark.parametrize(("does", "hangs"), [(COMPUTES, False), ("import time; time.sleep(60)", True)])
def test_before_its_first_mark_a_rank_gets_on_by_computing(run, monkeypatch, child, does, hangs):
    launcher = child("bash", "-c", f"RANK=0 {sys.executable} -c '{does}' {guard.WORKER} & wait")
    limit = time.monotonic() + 30
    while not (found := dict(guard.ranks_of(launcher))):
        assert time.monotonic() < limit
        time.sleep(0.05)
    monkeypatch.setattr(guard, "COMPUTED_SECONDS", 0.05)  # of some 2 s, on a machine that may be busy
    clock = [1000.0]
    watching, verdict = Guard(run, launcher, 0), None
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    watching._looked = watching._progress = clock[0]
    try:
        for _ in range(0, SILENT + 10, 5):
            clock[0] += 5
            verdict = verdict or watching.look()
            time.sleep(0.2)
        assert (verdict is not None) == hangs
        assert not hangs or verdict.found.startswith("no rank has begun for 4")
    finally:
        for pid in found:
            os.kill(pid, signal.SIGKILL)


class Kernel:
    name = "_swiglu_kernel"


def test_a_kernel_that_is_compiled_is_a_mark_and_is_compiled(run):
    pulse = Pulse(run, 0)
    before = pulse.alone
    said = pulse._compiling(
        key="", repr="", fn=Kernel, compile={}, is_manual_warmup=False, already_compiled=False
    )
    assert not said, "Triton leaves out what this returns true for"
    assert (pulse.doing, pulse.alone) == ("compile _swiglu_kernel", before + 1)


def test_a_hang_is_noticed_told_and_ended_within_a_minute():
    ending = 2 * guard.STACK_SECONDS + guard.DUMP_SECONDS + guard.GONE_SECONDS + guard.LOOK_SECONDS
    assert guard.SILENT_SECONDS + ending < 60 and guard.STOPPED_SECONDS + ending < 60
    assert guard.ALONE_SECONDS + guard.LAUNCHER_SECONDS + ending < 60


def test_a_rank_whose_launcher_has_died_is_no_orphan(run):
    process = started(run, "waits")
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    watching = Guard(run, launcher, 0)
    watching.pids = {1: process.pid}
    watching.beats = read_beats(run)
    assert watching.kill() == []
    assert not guard.psutil.pid_exists(process.pid)


def ended_guard(run, restarts=0):
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    return Guard(run, launcher, 0, restarts)


def test_a_killed_rank_is_the_kernels_where_ram_had_run_out(run):
    pulse_file(run, 1).parent.mkdir()
    watching = ended_guard(run)
    causes = []
    for available in (10.0, 0.1):
        pulse_file(run, 1).write_text(json.dumps(vars(beat(1, 5, available_gib=available))))
        causes.append(watching.died(1, "was killed by SIGKILL", signal.SIGKILL).cause)
    assert causes == ["rank_died", "out_of_host_memory"]
    assert watching.died(1, "was killed by SIGSEGV", signal.SIGSEGV).cause == "rank_died"


def test_a_restart_is_blamed_on_what_was_reported_since_the_last_start_alone(run):
    """A run may be started again in its folder, by us or by its launcher: earlier errors stay among its events."""
    run.log.touch()
    run.event("error", "of a start before", cause="out_of_host_memory")
    watching = ended_guard(run, restarts=5)
    watching._restarted(0.0)
    run.event("error", "OSError: of this start\nand more", cause="unexpected")
    watching._restarted(1.0)
    watching._restarted(2.0)
    run.event("error", "of a rank that was ended because another hung", cause="unexpected")
    watching._told = guard.Verdict("rank_hung", "all 2 ranks stand", "")
    watching._restarted(3.0)
    watching._restarted(4.0)
    told = [event for event in jsonl(run.events) if event["kind"] == "restarted"]
    assert [event["cause"] for event in told] == [
        "rank_died",
        "unexpected",
        "rank_died",
        "rank_hung",
        "rank_died",
    ]
    assert told[1]["message"].startswith("OSError: of this start; all ranks start again")


def test_the_kernels_count_of_what_it_killed_is_read(tmp_path):
    (tmp_path / "proc").mkdir()
    assert oom_kills(tmp_path) is None
    (tmp_path / "proc/vmstat").write_text("pgfault 77\noom_kill 3\noom_kill_x 9\n")
    assert oom_kills(tmp_path) == 3


def host_is_full():
    torch.empty(2**60, dtype=torch.uint8)


def python_is_full():
    bytearray(2**60)


def refused():
    raise Refused("host RAM: 9.0 GiB are needed for 3 offloaded layers, 1.0 GiB are available")


def request():
    raise UserError("config.yaml: no such file")


def bug():
    raise ValueError("a bug")


CAUSES = {
    host_is_full: ("out_of_host_memory", 1, "in the rehearsal before step 1: host RAM is full on rank 0"),
    python_is_full: ("out_of_host_memory", 1, "in the rehearsal before step 1: host RAM is full on rank 0"),
    refused: ("out_of_host_memory", 1, "in the rehearsal before step 1: host RAM: 9.0 GiB are needed"),
    request: ("request", 2, "in the rehearsal before step 1: config.yaml"),
    bug: ("unexpected", 1, "in the rehearsal before step 1: ValueError: a bug"),
}


@pytest.mark.parametrize(("fails", "expected"), CAUSES.items(), ids=[f.__name__ for f in CAUSES])
def test_an_error_has_its_cause_and_its_place(run, fails, expected, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(worker, "BLAME_SECONDS", 0.0)
    pulse = Pulse(run, 0)
    pulse.enter("rehearsal")
    pulse.mark("forward layer", 4)
    try:
        fails()
    except Exception as error:
        code = worker._report(error, run, Placement(2, 0), pulse)
    (event,) = jsonl(run.events)
    cause, exit_code, said = expected
    assert (event["kind"], event["cause"], event["exit_code"], code) == ("error", cause, exit_code, exit_code)
    assert event["message"].startswith(said) and "\n" not in event["message"]
    assert (event["rank"], event["step"], event["operation"]) == (0, 0, "forward layer 4")
    assert event["host"] == os.uname().nodename
    assert ("traceback" in event) == (cause == "unexpected")
