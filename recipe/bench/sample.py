"""What a measurement takes from its host and how busy its GPUs are, looked at from outside five times a second.

Host RAM is what the processes of the tree hold alone (RssAnon) and what they share, counted once. CUDA's pinned
buffers count as shared memory, although one process maps them. Pages of files, such as libraries, do not count: the
kernel can drop them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
INTERVAL_SECONDS = 0.2
# Reading smaps_rollup walks the process's page tables under its memory lock, 0.1 s and more for tens of GiB: this
# keeps it under 2 % of the time.
ROLLUP_REST = 50


@dataclass
class Host:
    """Bytes of a process tree at one moment."""

    anonymous: int = 0
    shared: int = 0
    files: int = 0  # not counted: mostly libraries, and once per process that maps them

    @property
    def total(self) -> int:
        return self.anonymous + self.shared


@dataclass
class Samples:
    peak: Host = field(default_factory=Host)
    # (time.monotonic(), mean utilisation of the GPUs in percent)
    utilisation: list[tuple[float, float]] = field(default_factory=list)

    def mean_utilisation(self, start: float, end: float) -> float | None:
        values = [value for moment, value in self.utilisation if start <= moment <= end]
        return sum(values) / len(values) if values else None


class Sampler:
    """`with Sampler(pid, gpu_uuids) as samples:` watches that process and its children in a thread."""

    def __init__(self, pid: int, gpu_uuids: list[str]):
        self.samples = Samples()
        self._memory = TreeMemory(pid)
        self._gpu_uuids = gpu_uuids
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Samples:
        self._thread.start()
        return self.samples

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        gpus = open_gpus(self._gpu_uuids)
        while not self._ended.wait(INTERVAL_SECONDS):
            now = self._memory.read()
            if now.total > self.samples.peak.total:
                self.samples.peak = now
            if gpus is not None and (value := gpus.utilisation()) is not None:
                self.samples.utilisation.append((time.monotonic(), value))


class TreeMemory:
    """Memory of a process and all below it."""

    def __init__(self, pid: int):
        self.pid = pid
        self._counted_twice = 0
        self._next_rollup = 0.0

    def read(self) -> Host:
        pids = self._pids()
        sizes = [_kib_fields(f"/proc/{pid}/status", ("RssAnon", "RssShmem", "RssFile")) for pid in pids]
        shared = sum(size.get("RssShmem", 0) for size in sizes)
        if shared and len(pids) > 1 and time.monotonic() >= self._next_rollup:
            self._look_at_sharing(pids)
        return Host(
            anonymous=sum(size.get("RssAnon", 0) for size in sizes),
            shared=max(0, shared - self._counted_twice),
            files=sum(size.get("RssFile", 0) for size in sizes),
        )

    def _pids(self) -> list[int]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return [self.pid, *(child.pid for child in process.children(recursive=True))]
        return []

    def _look_at_sharing(self, pids: list[int]) -> None:
        """Pages that several of them map stand in each one's RssShmem, but only in part in its Pss_Shmem."""
        started = time.monotonic()
        twice = 0
        for pid in pids:
            resident = _kib_fields(f"/proc/{pid}/status", ("RssShmem",)).get("RssShmem", 0)
            if resident:
                part = _kib_fields(f"/proc/{pid}/smaps_rollup", ("Pss_Shmem",)).get("Pss_Shmem", resident)
                twice += max(0, resident - part)
        self._counted_twice = twice
        ended = time.monotonic()
        self._next_rollup = ended + max(1.0, ROLLUP_REST * (ended - started))


def _kib_fields(path: str, names: tuple[str, ...]) -> dict[str, int]:
    """Sizes in bytes from a file of `Name:  123 kB` lines; empty for a process that is gone."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in lines if name in names}


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """The few calls of NVIDIA's management library that are needed here; it comes with the driver."""

    def __init__(self, uuids: list[str]):
        self._library: Any = ctypes.CDLL("libnvidia-ml.so.1")
        if self._library.nvmlInit_v2():
            raise OSError("nvmlInit failed")
        self._handles = []
        for uuid in uuids:
            handle = ctypes.c_void_p()
            if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
                raise OSError(f"NVML knows no GPU {uuid}")
            self._handles.append(handle)

    def utilisation(self) -> float | None:
        """Mean over the GPUs of the share of the last moments in which a kernel ran, in percent."""
        values = []
        for handle in self._handles:
            rates = _Utilisation()
            if self._library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)):
                return None
            values.append(rates.gpu)
        return sum(values) / len(values) if values else None


def open_gpus(uuids: list[str]) -> Nvml | None:
    """None where there is no GPU, or its library does not answer: a measurement goes on without."""
    if not uuids:
        return None
    try:
        return Nvml(uuids)
    except (OSError, AttributeError):
        return None
