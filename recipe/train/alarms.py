"""Numbers become warnings: of the loss and the gradients each step, of the host and its GPUs every ten seconds.

A warning is written once, and again only after what it warns of has gone away. What ends a run at once, a loss that is
no number, is `NotFinite`. The functions take numbers and give `Alarm`s; only `HostWatch` looks and writes.
"""

from __future__ import annotations

import contextlib
import math
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe import sensors
from recipe.errors import Refused
from recipe.hardware import cgroup_memory, read_meminfo
from recipe.sensors import BAD_REASONS, NoSensors, Sensors
from recipe.train.pulse import Pulse
from recipe.train.run import Run

GIB = 2**30
WINDOW = 50  # steps that a step is compared with
FEWEST = 10  # before so many, nothing is known about what is usual
SPIKE_SIGMAS = 6.0  # robust ones: 1.4826 median absolute deviations are one sigma of a normal distribution
SPIKE_FACTOR = 1.5  # and not only odd beside a very quiet stretch
QUIET_STEPS = 20  # after a warning of a spike or an explosion
EXPLOSION_FACTOR = 10.0
EXPLOSION_NORM = 10.0  # below, clipping to the usual 1.0 hides it and no harm is done
# Of all RAM or GiB, whichever is more. earlyoom, as our playbook sets it, ends programs at 4 %, and the kernel begins to
# reclaim in earnest at some hundred MiB: a warning must come before both.
LOW_SHARE, LOW_GIB = 0.06, 1.5
SWAP_BYTES_PER_SECOND = (
    4 * 2**20
)  # both ways, over a whole interval: pages of the run itself go out and come back
VRAM_SHARE = 0.98  # of the card reserved by torch; the plan leaves 0.5 GiB of 24, which is 97.9 %
LOOK_SECONDS = 10.0
PAGE_BYTES = 4096


class NotFinite(Refused):
    """The loss is NaN or infinite: what follows from it is worthless, so nothing of it may be saved."""


class SaveFailed(Refused):
    """A checkpoint could not be written, and the settings say to stop then."""


@dataclass(frozen=True)
class Alarm:
    cause: str
    message: str
    values: dict[str, Any] = field(default_factory=dict)


class Lamps:
    """Which warnings burn: `lights` is true when one goes on, not while it burns."""

    def __init__(self) -> None:
        self._burning: set[Any] = set()

    def lights(self, name: Any, on: bool) -> bool:
        was = name in self._burning
        (self._burning.add if on else self._burning.discard)(name)
        return on and not was


# -- each step ------------------------------------------------------------------------------------------------------------


class Curve:
    """What the loss and the gradient's norm have been, to tell what is unusual."""

    def __init__(self, lines: Sequence[dict[str, Any]] = ()):
        """`lines` of metrics.jsonl, where a run goes on."""
        recent = [line for line in lines if line["loss"] is not None][-WINDOW:]
        self._losses = deque((line["loss"] for line in recent), maxlen=WINDOW)
        self._norms = deque(
            (line["grad_norm"] for line in recent if _finite(line["grad_norm"])), maxlen=WINDOW
        )
        self._quiet: dict[str, int] = {}  # until which step, by cause

    def step(self, step: int, loss: float, grad_norm: float) -> list[Alarm]:
        alarms = []
        if is_spike(loss, list(self._losses)):
            usual = statistics.median(self._losses)
            alarms.append(
                Alarm(
                    "loss_spike",
                    f"step {step}: the loss is {loss:.3f} after {usual:.3f} (median of {len(self._losses)} steps); where it "
                    "does not come back, lower train.learning_rate or look at the rows",
                    {"loss": loss, "usual": round(usual, 4)},
                )
            )
        if is_explosion(grad_norm, list(self._norms)):
            usual = statistics.median(self._norms)
            alarms.append(
                Alarm(
                    "gradient_explosion",
                    f"step {step}: the gradient's norm is {grad_norm:.3g} after {usual:.3g}; it is clipped to "
                    "train.max_grad_norm, and often a lower train.learning_rate or more warm-up is needed",
                    {"grad_norm": grad_norm, "usual": round(usual, 4)},
                )
            )
        self._losses.append(loss)
        if _finite(grad_norm):
            self._norms.append(grad_norm)
        told = [alarm for alarm in alarms if step >= self._quiet.get(alarm.cause, 0)]
        self._quiet |= {alarm.cause: step + QUIET_STEPS for alarm in told}
        return told


def is_spike(loss: float, before: list[float]) -> bool:
    """Far above the last losses, by their median and its absolute deviation, which earlier spikes do not move."""
    if len(before) < FEWEST:
        return False
    usual = statistics.median(before)
    sigma = 1.4826 * statistics.median(abs(value - usual) for value in before)
    return loss > usual + SPIKE_SIGMAS * sigma and loss > SPIKE_FACTOR * usual


def is_explosion(norm: float, before: list[float]) -> bool:
    if len(before) < FEWEST or not _finite(norm):  # what is not finite is dropped, with a warning of its own
        return False
    return norm > EXPLOSION_NORM and norm > EXPLOSION_FACTOR * statistics.median(before)


def skipped_step(step: int, loss: float) -> Alarm:
    if math.isfinite(loss):
        return Alarm("gradient_explosion", f"step {step}: gradients overflowed, the step was left out")
    return Alarm("nan_batch", f"step {step}: the loss is {loss}, the step was left out (train.on_nan: skip)")


def not_finite(
    step: int, loss: float, learning_rate: float, checkpoint: str | None, skipped: int = 0
) -> NotFinite:
    """`skipped`: steps just before this one that were left out for the same reason."""
    before = f" after {skipped} steps that were left out" if skipped else ""
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return NotFinite(
        f"step {step}: the loss is {loss}{before}; nothing of that state was saved, {saved}; most often the learning rate is too "
        f"high: begin anew with --set train.learning_rate={learning_rate / 2:.2g} (now {learning_rate:.2g}) or a longer "
        "train.warmup_steps, else look at the rows"
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# -- memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostMemory:
    """RAM of the machine or of the cgroup, whichever is tighter, and bytes that went to swap or came back so far."""

    total_gib: float
    available_gib: float
    swapped_bytes: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> HostMemory:
        memory = read_meminfo(root)
        total, available = memory["MemTotal"], memory["MemAvailable"]
        limit, left = cgroup_memory(root)
        if limit is not None and left is not None and left < available:
            total, available = limit, left
        return cls(total / GIB, available / GIB, _swapped(root))

    @property
    def is_low(self) -> bool:
        return self.available_gib < max(LOW_SHARE * self.total_gib, LOW_GIB)


def _swapped(root: Path) -> int:
    with contextlib.suppress(OSError):
        lines = [line.split() for line in (root / "proc/vmstat").read_text().splitlines()]
        return sum(int(line[1]) for line in lines if line[0] in ("pswpin", "pswpout")) * PAGE_BYTES
    return 0


def memory_alarms(now: HostMemory, before: HostMemory | None, seconds: float, lamps: Lamps) -> list[Alarm]:
    """`before` was read `seconds` earlier."""
    alarms = []
    if lamps.lights("host_memory_low", now.is_low):
        alarms.append(
            Alarm(
                "host_memory_low",
                f"host RAM: {now.available_gib:.1f} of {now.total_gib:.1f} GiB are left; when it ends a rank is killed: end "
                "other programs, or stop (Ctrl-C saves) and go on with compute.offload_layers lower",
                {
                    "available_gib": round(now.available_gib, 3),
                    "total_gib": round(now.total_gib, 3),
                },
            )
        )
    rate = (now.swapped_bytes - before.swapped_bytes) / seconds if before is not None else 0.0
    if lamps.lights("swapping", rate > SWAP_BYTES_PER_SECOND):
        alarms.append(
            Alarm(
                "swapping",
                f"the machine swaps {rate / 2**20:.0f} MiB a second while training: steps take many times as long; end other "
                "programs, or go on with compute.offload_layers lower",
                {"swap_mib_per_second": round(rate / 2**20, 1)},
            )
        )
    return alarms


def vram_alarms(
    reserved_gib: float, total_gib: float, retries: int, retries_before: int, lamps: Lamps
) -> list[Alarm]:
    """Of this rank's card. A retry: the allocator had to give back all that it had cached before it could go on."""
    full = reserved_gib > VRAM_SHARE * total_gib
    if not lamps.lights("vram_low", full or retries > retries_before):
        return []
    why = (
        f", and {retries - retries_before} allocations had to be tried again"
        if retries > retries_before
        else ""
    )
    return [
        Alarm(
            "vram_low",
            f"GPU memory: {reserved_gib:.2f} of {total_gib:.2f} GiB are reserved{why}; end other programs on the GPU, or go on "
            "with one more of compute.offload_layers",
            {
                "reserved_gib": round(reserved_gib, 3),
                "total_gib": round(total_gib, 3),
                "retries": retries,
            },
        )
    ]


# -- the GPUs -------------------------------------------------------------------------------------------------------------


def gpu_alarms(now: list[Sensors] | None, before: list[Sensors], lamps: Lamps) -> list[Alarm]:
    """`now` is None where NVML no longer answers, as it does when it meets a lost card."""
    if lamps.lights("nvml", now is None):
        text = "NVML no longer answers: a GPU is lost or the driver has failed; look for Xid 79 in dmesg and restart the machine"
        return [Alarm("gpu_lost", text)]
    if now is None:
        return []
    there = {gpu.uuid for gpu in now}
    alarms = []
    for gpu in before:
        if lamps.lights(("gpu_lost", gpu.uuid), gpu.uuid not in there):
            alarms.append(
                Alarm(
                    "gpu_lost",
                    f"GPU {gpu.index} ({gpu.name}, {gpu.pci_address}) no longer answers; look for Xid 79 in dmesg, check its "
                    "power cables and slot, and restart the machine",
                    {"gpu": gpu.index, "pci_address": gpu.pci_address},
                )
            )
    earlier = {gpu.uuid: gpu for gpu in before}
    for gpu in now:
        reasons = sorted(BAD_REASONS.intersection(gpu.throttle_reasons or ()))
        if lamps.lights(("throttling", gpu.uuid), bool(reasons)):
            alarms.append(
                Alarm(
                    "throttling",
                    f"GPU {gpu.index} is held back ({', '.join(reasons)}) at {gpu.temperature_celsius} degrees and "
                    f"{gpu.power_watts or 0:.0f} W, {gpu.sm_clock_mhz} of {gpu.sm_clock_max_mhz} MHz; give it air, or lower its "
                    "power limit (nvidia-smi -pl)",
                    {"gpu": gpu.index, "reasons": reasons, "temperature_celsius": gpu.temperature_celsius},
                )
            )
        old = earlier.get(gpu.uuid)
        if old is not None and (gpu.ecc_uncorrected or 0) > (old.ecc_uncorrected or 0):
            alarms.append(
                Alarm(
                    "ecc",
                    f"GPU {gpu.index} has {gpu.ecc_uncorrected} uncorrected memory errors, {old.ecc_uncorrected or 0} before; "
                    "the results since may be wrong: go on from the checkpoint before, and have the card checked",
                    {"gpu": gpu.index, "ecc_uncorrected": gpu.ecc_uncorrected},
                )
            )
    return alarms


class Xids:
    """NVML's own word of Xid errors, which dmesg has too; where NVML gives no events there are none."""

    def __init__(self) -> None:
        import pynvml

        self._nvml, self._set = pynvml, None
        with contextlib.suppress(pynvml.NVMLError):
            events = pynvml.nvmlEventSetCreate()
            for index in range(pynvml.nvmlDeviceGetCount()):
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, events)
            self._set = events

    def read(self) -> list[Alarm]:
        alarms: list[Alarm] = []
        with contextlib.suppress(
            self._nvml.NVMLError
        ):  # the time limit is an error too, and none is waited for
            while self._set is not None:
                event = self._nvml.nvmlEventSetWait_v2(self._set, 0)
                number, gpu = int(event.eventData), self._nvml.nvmlDeviceGetIndex(event.device)
                text = f"GPU {gpu} has reported Xid {number}; see dmesg and NVIDIA's list of Xid errors"
                alarms.append(Alarm("xid", text, {"gpu": gpu, "xid": number}))
        return alarms


# -- the thread -----------------------------------------------------------------------------------------------------------


class HostWatch:
    """Looks at the host and its GPUs every LOOK_SECONDS while a run trains, and writes warnings; one per host."""

    def __init__(self, run: Run, pulse: Pulse, on_gpu: bool):
        self.run, self.pulse = run, pulse
        self._lamps = Lamps()
        self._memory: HostMemory | None = None
        self._gpus = _sensors() if on_gpu else None
        self._xids = Xids() if self._gpus else None

    def start(self) -> None:
        threading.Thread(target=self._watch, name="alarms", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            for alarm in self.look():
                with contextlib.suppress(OSError):  # a full disk ends the training itself, with its own word
                    warn(self.run, alarm, rank=self.pulse.rank, step=self.pulse.step)

    def look(self) -> list[Alarm]:
        memory = HostMemory.read()
        alarms = memory_alarms(memory, self._memory, LOOK_SECONDS, self._lamps)
        self._memory = memory
        if self._gpus is not None:
            now = _sensors()
            alarms += gpu_alarms(now, self._gpus, self._lamps)
            known = {gpu.uuid: gpu for gpu in self._gpus} | {gpu.uuid: gpu for gpu in now or ()}
            self._gpus = list(known.values())
        return alarms + (self._xids.read() if self._xids else [])


def _sensors() -> list[Sensors] | None:
    try:
        return sensors.read()
    except NoSensors:
        return None


def warn(run: Run, alarm: Alarm, **values: Any) -> None:
    host = socket.gethostname()
    run.event("warning", alarm.message, cause=alarm.cause, host=host, **alarm.values, **values)
