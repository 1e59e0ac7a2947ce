"""Each rank's heartbeat: where it is, and whether it gets on. Written by the rank, judged by recipe.train.guard.

    runs/NAME/.pulse/rank-0     {"rank": 0, "pid": 4711, "beat": 311, "position": 5120, "phase": "train", "step": 12, ...}

The training marks what it begins (`mark`), which is a few attribute writes; a daemon thread writes the state once a
second. Where the interpreter is held by a long call in C the thread is silent too, and the launcher sees an old beat.
A forked child has no such thread, so it writes nothing.

On a GPU the host queues work far ahead of the card. There a mark counts when the card has come to it: each records a
CUDA event, and the thread asks which ones are done. A card that stands still in a collective is seen so, and a
micro-batch of a minute that gets on layer by layer is no hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recipe.train.run import Run

GIB = 2**30
BEAT_SECONDS = 1.0
ROOM_BYTES = 1024  # of a pulse's file: rewritten in place, so that a full disk does not silence it
EVENTS = 1024  # marks that the card may be behind the host; those beyond are left out
STACKS = signal.SIGUSR1  # makes a rank print the stacks of all its threads, even inside a call in C


@dataclass(frozen=True)
class Beat:
    """What a rank's pulse said last.

    beat: rounds of its thread. position: marks that all ranks make alike, so that ranks can be compared by it.
    alone: marks that only this rank makes. ended: the exit code that it is about to end with, once it is known.
    """

    rank: int
    pid: int
    born: float
    host: str
    beat: int
    position: int
    alone: int
    phase: str
    step: int
    micro_batch: int
    operation: str
    progress: float
    available_gib: float
    ended: int | None = None

    @property
    def where(self) -> str:
        """For a message: step, micro-batch and operation."""
        if self.phase != "train":
            return f"{self.phase}: {self.operation}" if self.operation else self.phase
        return f"step {self.step}, micro-batch {self.micro_batch}, {self.operation}"


class Pulse:
    """The heartbeat of this process, which is rank `rank`."""

    def __init__(self, run: Run, rank: int):
        self.rank, self.run = rank, run
        self.path = pulse_file(run, rank)
        self.phase, self.step, self.micro_batch = "start", 0, 0
        self.position = self.alone = 0
        self.operation: str | tuple[str, int] = ""
        self.ended: int | None = None
        self._beats = 0
        self._born = psutil.Process().create_time()
        self._reached: tuple[Any, ...] = ()
        self._progress = time.time()
        self._card: Card | None = None
        self._file = -1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)

    def start(self) -> None:
        """Write the first beat, go on with one a second, and answer to STACKS."""
        self.path.parent.mkdir(exist_ok=True)
        faulthandler.register(STACKS, file=sys.stderr, all_threads=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._write()
        self._thread.start()

    def follow(self, device: Any) -> None:
        """From now on a mark counts when the card has come to it; and each kernel that is compiled is marked."""
        if device.type == "cuda":
            import torch

            self._card = Card(torch.cuda.Event() for _ in range(EVENTS))
            with contextlib.suppress(ImportError):
                from triton import knobs

                knobs.runtime.jit_cache_hook = self._compiling

    def _compiling(self, *, fn: Any, **_: Any) -> None:
        """Triton's word before it compiles a kernel, some seconds each, in the first pass of all: a minute in one layer.

        It would leave the compilation out where this returned something true.
        """
        self.mark_alone(f"compile {fn.name}")

    # -- what the training says -----------------------------------------------------------------------------------

    def mark(self, operation: str, layer: int = -1) -> None:
        """`operation` begins (of a layer); all ranks make the same marks in the same order."""
        self.operation = operation if layer < 0 else (operation, layer)
        self.position += 1
        if self._card is not None:
            self._card.record((self.position, self.phase, self.step, self.micro_batch, self.operation))

    def mark_alone(self, operation: str, layer: int = -1) -> None:
        """`operation` begins on this rank only, the others wait meanwhile."""
        self.operation = operation if layer < 0 else (operation, layer)
        self.alone += 1

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.mark("begin")

    def end(self, code: int) -> None:
        """The last word: what this rank has to say is written, and its process ends with `code`."""
        self.phase, self.ended = "end", code
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_SECONDS)
            self._write()

    @property
    def doing(self) -> str:
        """The operation that was marked last."""
        return (
            self.operation if isinstance(self.operation, str) else f"{self.operation[0]} {self.operation[1]}"
        )

    # -- the thread -----------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._write()
            self._dump_if_asked()

    def _write(self) -> None:
        place = (self.position, self.phase, self.step, self.micro_batch, self.operation)
        if self._card is not None:
            place = self._card.reached() or place
        position, phase, step, micro_batch, operation = place
        if position == self.position:  # the card is not behind: what this rank does alone is the newest
            operation = self.operation
        if (place, self.alone) != self._reached:
            self._reached, self._progress = (place, self.alone), time.time()
        self._beats += 1
        beat = Beat(
            rank=self.rank,
            pid=os.getpid(),
            born=self._born,
            host=socket.gethostname(),
            beat=self._beats,
            position=position,
            alone=self.alone,
            phase=phase if self.ended is None else "end",
            step=step,
            micro_batch=micro_batch,
            operation=operation if isinstance(operation, str) else f"{operation[0]} {operation[1]}",
            progress=round(self._progress, 3),
            available_gib=round(psutil.virtual_memory().available / GIB, 3),
            ended=self.ended,
        )
        text = json.dumps(vars(beat)).encode()
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text.ljust(ROOM_BYTES - 1) + b"\n", 0)

    def _dump_if_asked(self) -> None:
        """The last collectives of this rank, as torch recorded them, where the launcher asks for them."""
        target = flight_record(self.run, self.rank)
        if dump_request(self.run).exists() and not target.exists():
            with contextlib.suppress(OSError, RuntimeError):
                target.write_bytes(_collectives(self._card is not None))


class Card:
    """Which marks a GPU has come to: a CUDA event for each, asked by the pulse's thread."""

    def __init__(self, events: Iterable[Any]):
        self._free = deque(events)
        self._pending: deque[tuple[Any, tuple]] = deque()
        self._last: tuple | None = None
        self._lock = threading.Lock()

    def record(self, place: tuple) -> None:
        """From the training's thread: on the stream that computes."""
        if not self._free:  # small layers come faster than the pulse looks
            self.reached()
        if self._free:
            event = self._free.pop()
            event.record()
            self._pending.append((event, place))

    def reached(self) -> tuple | None:
        """The place of the last mark that is done. A broken card stands where it broke."""
        with self._lock, contextlib.suppress(RuntimeError):
            while self._pending and self._pending[0][0].query():
                event, self._last = self._pending.popleft()
                self._free.append(event)
        return self._last


def _collectives(nccl: bool) -> bytes:
    """torch's flight recorder as JSON; its functions have no public name (torch 2.11 to 2.13)."""
    import torch._C._distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace_json" if nccl else "_dump_fr_trace_json", None)
    return dump() if dump is not None else b"{}"


def pulse_file(run: Run, rank: int) -> Path:
    return run.folder / ".pulse" / f"rank-{rank}"


def dump_request(run: Run) -> Path:
    """While it is there, every rank writes what its flight recorder holds."""
    return run.folder / ".pulse" / "dump"


def flight_record(run: Run, rank: int) -> Path:
    return run.folder / f"flight-recorder-rank-{rank}.json"


def read_beats(run: Run) -> dict[int, Beat]:
    """The last beat of every rank that has begun. A file that is being written is left for the next look."""
    beats = {}
    for path in (run.folder / ".pulse").glob("rank-*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text()))
            beats[beat.rank] = beat
    return beats
