"""The launcher's watch over the ranks: who died, was stopped, hangs or has fallen behind; and the end of all of them.

Once a second it reads the pulses (recipe.train.pulse) and looks at the processes. What it compares with is its own
memory of the last look, never another process's clock; after a pause of its own it begins afresh.

A rank that loads, saves or compiles may take as long as it likes: only a silence is limited. The next mark ends it, and
so do bytes that go to or come from a disk, since one tensor of 2 GB may take minutes on a slow one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from recipe.errors import Refused
from recipe.train import checkpoint
from recipe.train.alarms import PAGE_BYTES
from recipe.train.pulse import STACKS, Beat, dump_request, flight_record, read_beats
from recipe.train.run import Run, Tail

WORKER = "recipe.train.worker"
LOOK_SECONDS = 1.0
# Without any mark or other sign of life (`Signs`) of any rank, whatever it is at. A layer of a 70B takes less than one
# second, also offloaded on a 3090, a kernel is compiled in some, and a collective waits for the slowest rank only: 45
# leave room for a bus that others use too, and for the 15 that dumping and ending take within a minute.
SILENT_SECONDS = 45.0
MOVED_BYTES = 2**20  # far more than a pulse writes meanwhile, and a dying disk still reads it
COMPUTED_SECONDS = 1.0
# Long calls in which a rank computes and waits for no other: to build the model registers tens of GB of host memory.
COMPUTES = (
    "build the model",
    "check embedding",
    "start adapters",
    "hash what was read back",
)
STOPPED_SECONDS = 20.0  # the others wait for a rank that stands still, their GPUs at work, without a word
# A rank that has lost its peers fails within one. One that waits for them inside NCCL does not hear the launcher either,
# which would give it 30 seconds (33 were measured on two GPUs).
ALONE_SECONDS = 5.0
LAUNCHER_SECONDS = 10.0  # torchrun sees a dead rank ten times a second, and ends when all ranks have
RESTART_SECONDS = 60.0  # more, where it is to start them again: it waits 30 for those that do not hear it
PAUSE_SECONDS = 10.0  # between two looks: then this process itself was stopped, or the machine slept
DUMP_SECONDS = 3.0  # for the flight recorders: three rounds of a pulse
STACK_SECONDS = (
    0.3  # for one rank's stacks, which come in pieces: those of two at once would be mixed in the log
)
GONE_SECONDS = 10.0  # a killed process that is still there sits in the driver or in a dead file system
FULL_GIB = 0.5  # of RAM available when a rank was last heard: the kernel had begun to kill
# torchrun's word to the others; who has failed it says when all are gone.
CLOSING = re.compile(rb"Sending process \d+ closing signal")


@dataclass(frozen=True)
class Verdict:
    """Why a training must end: the event's cause, what was found in words, and where the rank to blame was."""

    cause: str
    found: str
    remedy: str
    beat: Beat | None = None
    rank: int | None = None

    def place(self) -> dict[str, Any]:
        values: dict[str, Any] = {} if self.rank is None else {"rank": self.rank}
        if self.beat is not None:
            values |= {"host": self.beat.host, "phase": self.beat.phase, "step": self.beat.step}
            values |= {"micro_batch": self.beat.micro_batch, "operation": self.beat.operation}
        return values


@dataclass(frozen=True)
class Signs:
    """What a process has done until now that tells of life where it makes no mark.

    flushed_bytes: what the machine has written back, which the kernel does not count by process.
    """

    stored_bytes: int
    flushed_bytes: int
    cpu_seconds: float

    @classmethod
    def of(cls, pid: int, root: Path = Path("/")) -> Signs:
        with contextlib.suppress(psutil.Error, OSError, RuntimeError):
            process = psutil.Process(pid)
            moved, cpu = process.io_counters(), process.cpu_times()
            return cls(
                moved.read_bytes + moved.write_bytes,
                (_vmstat("nr_written", root) or 0) * PAGE_BYTES,
                cpu.user + cpu.system,
            )
        return cls(0, 0, 0.0)

    def since(self, before: Signs, beat: Beat | None) -> bool:
        """Whether the process, a rank with this `beat`, got on since `before`."""
        if self.stored_bytes - before.stored_bytes >= MOVED_BYTES:
            return True
        # Before its first mark it imports. Else computing says nothing: NCCL waits by looking again and again.
        if beat is None or beat.operation in COMPUTES:
            return self.cpu_seconds - before.cpu_seconds >= COMPUTED_SECONDS
        # An fsync in rank 0's other thread, which writes nothing more meanwhile.
        waits = beat.operation == checkpoint.WAIT
        return waits and self.flushed_bytes - before.flushed_bytes >= MOVED_BYTES


class Guard:
    """Over the ranks below `process`, torchrun or accelerate, of a run whose log had `log_start` bytes before.

    restarts: times that the launcher starts all ranks again where one has failed.
    """

    def __init__(self, run: Run, process: subprocess.Popen, log_start: int, restarts: int = 0):
        self.run, self.process, self.log_start, self.restarts_left = run, process, log_start, restarts
        self.beats: dict[int, Beat] = {}
        self.pids: dict[int, int] = {}  # every rank that was seen, whether it runs still or not
        self._log_position = log_start
        self._events = Tail(run.events)
        self._events.read()  # an error of an earlier start is no cause of what happens now
        self._looked = self._progress = time.monotonic()
        self._key: object = None
        self._signs: dict[int, Signs] = {}  # by rank, of when the last one got on
        self._stopped: dict[int, float] = {}  # since when, by process
        self._told: Verdict | None = None  # why all ranks were ended to be started again
        self._failed: float | None = None  # when the first rank was seen dead, or torchrun said so
        self._oom_kills = oom_kills()

    def look(self) -> Verdict | None:
        """Cheap to ask: it looks once a second. A verdict where the training cannot go on by itself."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        paused, self._looked = now - self._looked > PAUSE_SECONDS, now
        children = {rank: pid for pid, rank in ranks_of(self.process)}
        if any(self.pids.get(rank, pid) != pid for rank, pid in children.items()):
            self._restarted(now)
        # A pulse of a rank that was replaced stays until the new one writes its own.
        beats = read_beats(self.run)
        self.beats = {rank: beat for rank, beat in beats.items() if children.get(rank, beat.pid) == beat.pid}
        self.pids |= {beat.rank: beat.pid for beat in self.beats.values()} | children
        alive = {rank: pid for rank, pid in self.pids.items() if self._runs(rank)}
        stopped = {rank for rank, pid in alive.items() if is_stopped(pid)}
        if paused or (
            stopped and len(stopped) == len(alive)
        ):  # where all are stopped, somebody wants the GPUs
            self._progress, self._stopped = now, {}
            return None
        verdict = self._after_failure(alive, now) or self._standing(stopped, now) or self._hanging(alive, now)
        if verdict is not None and self.restarts_left and alive:
            self._dump()
            self._told = verdict
            for pid in alive.values():  # then the launcher starts all of them again
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._failed = now
            return None
        return verdict

    # -- started again --------------------------------------------------------------------------------------------

    def _restarted(self, now: float) -> None:
        """The launcher has started all ranks again: say why, and begin afresh."""
        self.restarts_left -= 1
        verdict = self._told or self._blame()
        self.run.event(
            "restarted",
            f"{verdict.found}; all ranks start again from the last checkpoint ({self.restarts_left} more times)",
            cause=verdict.cause,
            **verdict.place(),
        )
        self.log_start = self._log_position = self.run.log.stat().st_size
        self._events.read()
        self._failed = self._told = None
        self._key, self._progress, self._stopped, self.pids, self.beats = None, now, {}, {}, {}

    def _blame(self) -> Verdict:
        """Who failed first, by the launcher's log, else by what a rank has reported itself since the last start."""
        if (failed := self.failed_rank()) is not None and failed[0] < 0 and not self.has_reported(failed[1]):
            code, rank = failed
            return self.died(rank, f"was killed by {signal.Signals(-code).name}", -code)
        reported = [event for event in self._events.read() if event["kind"] == "error"]
        if reported:
            return Verdict(reported[-1]["cause"], reported[-1]["message"].splitlines()[0], "", None, None)
        return Verdict("rank_died", "a rank has ended", "", None, None)

    def failed_rank(self) -> tuple[int, int] | None:
        """Exit code and rank of the first one that the launcher saw fail."""
        log = self.run.log.read_bytes()[self.log_start :].decode(errors="replace")
        found = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", log)
        return (int(found[1]), int(found[2])) if found else None

    def _runs(self, rank: int) -> bool:
        beat = self.beats.get(rank)
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pids[rank])
            if beat is not None and process.create_time() != beat.born:
                return False
            return process.status() != psutil.STATUS_ZOMBIE
        return False

    # -- died -----------------------------------------------------------------------------------------------------

    def _after_failure(self, alive: dict[int, int], now: float) -> Verdict | None:
        """Ends the ranks that a failed one has left behind; torchrun then says how that one ended."""
        if self._failed is None:
            self._failed = (
                now if self._closing() or any(self._has_failed(r, alive) for r in self.pids) else None
            )
            return None
        if now - self._failed < ALONE_SECONDS:
            return None
        for pid in alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        patience = ALONE_SECONDS + LAUNCHER_SECONDS + (RESTART_SECONDS if self.restarts_left else 0)
        if now - self._failed < patience:
            return None
        for rank in sorted(self.pids):
            if self._died(rank, alive):
                return self.died(rank, "has died")
        self.kill()  # what the failed rank has written says why
        return None

    def _has_failed(self, rank: int, alive: dict[int, int]) -> bool:
        beat = self.beats.get(rank)
        return self._died(rank, alive) or (beat is not None and bool(beat.ended))

    def _died(self, rank: int, alive: dict[int, int]) -> bool:
        """Gone without a last word."""
        beat = self.beats.get(rank)
        return rank not in alive and beat is not None and beat.ended is None

    def has_reported(self, rank: int) -> bool:
        """Whether it has said itself what went wrong; then it was ended because its way out hung."""
        beat = self._last_beat(rank)
        return beat is not None and bool(beat.ended)

    def _last_beat(self, rank: int) -> Beat | None:
        """Of this start of the rank, not of one before."""
        beat = read_beats(self.run).get(rank)
        return beat if beat is not None and self.pids.get(rank, beat.pid) == beat.pid else None

    def _closing(self) -> bool:
        """Whether the log's new whole lines have torchrun's word."""
        if not self.run.log.exists():
            return False
        with open(self.run.log, "rb") as log:
            log.seek(self._log_position)
            lines, newline, _ = log.read().rpartition(b"\n")
        self._log_position += len(lines) + len(newline)
        return CLOSING.search(lines) is not None

    def died(self, rank: int, how: str, number: int = 0) -> Verdict:
        """The verdict on a rank that is gone, `number` the signal that ended it where it is known."""
        beat = self._last_beat(rank)
        last = f"; it was last at {beat.where}" if beat else "; it had not begun"
        before = self._oom_kills
        killed = before is not None and (oom_kills() or 0) > before
        full = beat is not None and beat.available_gib < FULL_GIB
        if number == signal.SIGKILL and (killed or full):
            left = f", {beat.available_gib:.1f} GiB of RAM were left" if beat else ""
            return Verdict(
                "out_of_host_memory",
                f"rank {rank} {how}: the kernel's, when RAM ran out{last}{left}",
                "end other programs, add RAM or set compute.offload_layers lower",
                beat,
                rank,
            )
        hint = "; often the kernel's, when RAM runs out (see dmesg)" if number == signal.SIGKILL else ""
        return Verdict("rank_died", f"rank {rank} {how}{hint}{last}", "find out what ended it", beat, rank)

    # -- stopped --------------------------------------------------------------------------------------------------

    def _standing(self, stopped: set[int], now: float) -> Verdict | None:
        """A rank whose process was stopped while others go on: no collective ends then, and none fails for minutes."""
        self._stopped = {rank: self._stopped.get(rank, now) for rank in stopped}
        for rank, since in self._stopped.items():
            if now - since >= STOPPED_SECONDS:
                beat = self.beats.get(rank)
                at = f" at {beat.where}," if beat else ""
                return Verdict(
                    "rank_stopped",
                    f"rank {rank} (process {self.pids[rank]}) was stopped (SIGSTOP){at} for {STOPPED_SECONDS:.0f} s while "
                    "the others waited for it",
                    "find out what stopped it",
                    beat,
                    rank,
                )
        return None

    # -- hangs or has fallen behind -------------------------------------------------------------------------------

    def _hanging(self, alive: dict[int, int], now: float) -> Verdict | None:
        """No rank has given a sign of life for SILENT_SECONDS."""
        beats = {rank: beat for rank, beat in self.beats.items() if rank in alive}
        key = {
            rank: (pid, beats[rank].position, beats[rank].alone) if rank in beats else pid
            for rank, pid in alive.items()
        }
        signs = {rank: Signs.of(pid) for rank, pid in alive.items()}
        if key != self._key or any(signs[rank].since(self._signs[rank], beats.get(rank)) for rank in alive):
            self._key, self._signs, self._progress = key, signs, now
        seconds = now - self._progress
        if not alive or seconds < SILENT_SECONDS:
            return None
        return hung(list(self.beats.values()), seconds, [rank for rank in sorted(alive) if rank not in beats])

    # -- the end --------------------------------------------------------------------------------------------------

    def end(self, verdict: Verdict) -> Refused:
        """Write down what all ranks were doing, end them all, and give the error to raise."""
        self._dump()
        left = self.kill()
        orphan = (
            f"; process {left[0]} cannot be ended: it sits in the kernel, restart the machine" if left else ""
        )
        where = f" on {verdict.beat.host}" if verdict.beat else ""
        records = [p.name for r in self.pids if (p := flight_record(self.run, r)).exists()]
        stacks = f"; stacks: {self.run.log}" + (
            f"; collectives: {', '.join(sorted(records))}" if records else ""
        )
        text = f"{verdict.found}{where}"
        self.run.event("error", text, cause=verdict.cause, exit_code=1, **verdict.place())
        return Refused(
            f"training ended: {text}{stacks}{orphan}; {verdict.remedy}, then go on with RUN={self.run.name}"
        )

    def _dump(self) -> None:
        """Stacks of all ranks to the log; and their flight recorders, from those that still can."""
        if not any(self._runs(rank) for rank in self.pids):
            return
        with contextlib.suppress(OSError):
            dump_request(self.run).touch()
        for rank in sorted(self.beats):
            if self._runs(rank):
                with contextlib.suppress(OSError):
                    with open(self.run.log, "a", encoding="utf-8") as log:
                        log.write(f"stacks of rank {rank} (process {self.pids[rank]}):\n")
                    os.kill(self.pids[rank], STACKS)
                    time.sleep(STACK_SECONDS)
        time.sleep(DUMP_SECONDS)

    def kill(self) -> list[int]:
        """End the launcher, the ranks and all below them, also ranks whose launcher is gone. Those that will not end."""
        roots = [pid for rank, pid in self.pids.items() if self._runs(rank)]
        if self.process.poll() is None:
            roots.append(self.process.pid)
        members: dict[int, psutil.Process] = {}
        for pid in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                members |= {p.pid: p for p in (root, *root.children(recursive=True))}
        for member in members.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE_SECONDS)
        others = [member for pid, member in members.items() if pid != self.process.pid]
        _, alive = psutil.wait_procs(others, timeout=GONE_SECONDS)
        return [p.pid for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def prepare(run: Run) -> None:
    """Before the ranks start: what earlier ones have left there says nothing about these."""
    shutil.rmtree(run.folder / ".pulse", ignore_errors=True)
    for record in run.folder.glob("flight-recorder-rank-*.json"):
        record.unlink()


def hung(beats: Iterable[Beat], seconds: float, missing: Sequence[int] = ()) -> Verdict:
    """Which rank is to blame, where none has got on for `seconds`: the one that all others wait for, if there is one.

    All ranks make the same marks in the same order, so the one that has made fewest has not come to where they wait.
    `missing` are those that have not begun to make any.
    """
    ranks = sorted(beats, key=lambda beat: beat.position)
    for_seconds = f"for {seconds:.0f} s"
    if not ranks:
        return Verdict("rank_hung", f"no rank has begun {for_seconds}", "see the log for what they wait for")
    if missing:
        names = " and ".join(map(str, missing))
        found = f"rank {names} has not begun {for_seconds} while the others wait for it at {ranks[-1].where}"
        return Verdict(
            "rank_behind", found, "see the log and its stack for what it waits for", None, missing[0]
        )
    first = ranks[0]
    behind = [beat for beat in ranks if beat.position == first.position]
    if len(behind) == len(ranks) and len(ranks) > 1:
        return Verdict(
            "rank_hung",
            f"all {len(ranks)} ranks stand at {first.where} {for_seconds}",
            "look at the stacks and at the link between the GPUs (make preflight)",
            replace(first, host=", ".join(sorted({beat.host for beat in ranks}))),
        )
    if len(ranks) == 1:
        return Verdict(
            "rank_hung",
            f"rank {first.rank} stands at {first.where} {for_seconds}",
            "look at its stack",
            first,
            first.rank,
        )
    names = " and ".join(str(beat.rank) for beat in behind)
    return Verdict(
        "rank_behind",
        f"rank {names} has stood at {first.where} {for_seconds} while the others wait for it at {ranks[-1].where}",
        "look at its stack",
        first,
        first.rank,
    )


def is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def ranks_of(process: subprocess.Popen) -> Iterator[tuple[int, int]]:
    """(process, rank) of the ranks that run now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if _is_rank(child.cmdline()) and "RANK" in (environment := child.environ()):
                    yield child.pid, int(environment["RANK"])


def _is_rank(arguments: list[str]) -> bool:
    launchers = ("torch.distributed.run", "accelerate.commands.launch")
    return WORKER in arguments and not any(name in arguments for name in launchers)


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes that the kernel has ended for want of memory since it started, of a cgroup's or of the machine's."""
    return _vmstat("oom_kill", root)


def _vmstat(name: str, root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/vmstat").read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return None
