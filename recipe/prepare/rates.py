"""How fast each stage of the preparation is, and which one the others wait for.

A stage's rate is what it would do if it never had to wait: bytes over the seconds in which it worked (over the mean of
its workers' seconds where several work at once). All rates are in bytes of the 16-bit source, so that they can be held
against each other and against the whole: a stage that writes 0.3 bytes for each byte of the source at 300 MiB/s keeps up
with reads at 1000 MiB/s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from recipe.files import GIB
from recipe.hardware import resident_bytes

MIB = 2**20
SAMPLE_SECONDS = 0.1


@dataclass
class Stage:
    """One stage: who does it, with how many workers, for how long they have worked together, on how much."""

    name: str
    where: str = ""
    workers: int = 1
    busy_seconds: float = 0.0
    bytes: int = 0
    lock: Any = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def working(self, size: int = 0) -> Iterator[None]:
        """Around the work proper, not around the waiting for it; `size` in bytes of whatever the stage handles."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        with self.lock:
            self.busy_seconds += seconds
            self.bytes += size

    @property
    def seconds(self) -> float:
        """How long the stage would take alone, with all its workers busy."""
        return self.busy_seconds / self.workers

    def to_dict(self, source_bytes: int) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "busy_seconds": round(self.seconds, 3),
            "workers": self.workers,
            "source_mib_per_second": _mib_per_second(source_bytes, self.seconds),
        } | ({"where": self.where} if self.where else {})


def summary(stages: list[Stage], source_bytes: int, seconds: float, peak_bytes: int) -> dict[str, Any]:
    """What prepare.json keeps under `rates`: the whole, each stage, the slowest and the share of it that was reached."""
    worked = [stage for stage in stages if stage.busy_seconds > 0]
    slowest = max(worked, key=lambda stage: stage.seconds)
    return {
        "source_bytes": source_bytes,
        "seconds": round(seconds, 3),
        "source_mib_per_second": _mib_per_second(source_bytes, seconds),
        "stages": {stage.name: stage.to_dict(source_bytes) for stage in worked},
        "slowest": slowest.name,
        "share_of_slowest": round(slowest.seconds / seconds, 3),
        "peak_ram_gib": round(peak_bytes / GIB, 3),
    }


def render(rates: dict[str, Any]) -> str:
    """Two lines for people."""
    stages = ", ".join(
        f"{name} {_speed(stage['source_mib_per_second'])}"
        + (f" ({stage['where']})" if stage.get("where") else "")
        for name, stage in rates["stages"].items()
    )
    return (
        f"quantised {_size(rates['source_bytes'])} in {rates['seconds']:.0f} s "
        f"({_speed(rates['source_mib_per_second'])}), {rates['share_of_slowest']:.0%} of what the slowest stage, "
        f"{rates['slowest']}, can do; peak RAM {rates['peak_ram_gib']:.2f} GiB\n"
        f"  per byte of the source: {stages}"
    )


class PeakMemory:
    """The most anonymous and shared memory that this process held inside the block, page cache left out."""

    def __enter__(self) -> PeakMemory:
        self.bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, resident_bytes())


def _mib_per_second(size: int, seconds: float) -> float:
    return round(size / MIB / max(seconds, 1e-6), 1)


def _speed(mib_per_second: float) -> str:
    return f"{mib_per_second / 1024:.1f} GiB/s" if mib_per_second >= 1024 else f"{mib_per_second:.0f} MiB/s"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"
