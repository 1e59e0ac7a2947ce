"""What NVML tells of every GPU: heat, power, clocks, why they are held back, errors, link, memory and who holds it.

Preflight judges it before a run, and training's guards during one. A reading takes a few milliseconds and changes
nothing. Cards differ in what they tell (consumer cards have no ECC): what one does not tell is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pynvml

GIB = 2**30
# NVML's bits of "clocks event reasons", by the words that we use; thermal is the driver's, hw thermal the card's own brake.
REASONS = {
    pynvml.nvmlClocksEventReasonGpuIdle: "idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "clock setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw thermal",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display clock",
}
# Reasons that say that something is wrong with heat or power supply; a power cap is normal under load.
BAD_REASONS = frozenset({"thermal", "hw thermal", "hw slowdown", "power brake"})


class NoSensors(Exception):
    """NVML cannot be asked; the message is one line."""


@dataclass(frozen=True)
class Sensors:
    """One GPU at one moment. `index` and `uuid` are nvidia-smi's; CUDA may count in another order."""

    index: int
    uuid: str
    name: str
    pci_address: str | None
    temperature_celsius: int | None
    slowdown_celsius: int | None
    fan_percent: int | None
    power_watts: float | None
    power_limit_watts: float | None
    power_default_watts: float | None
    sm_clock_mhz: int | None
    sm_clock_max_mhz: int | None
    memory_used_gib: float | None
    memory_total_gib: float | None
    throttle_reasons: tuple[str, ...] | None
    ecc_uncorrected: int | None
    ecc_corrected: int | None
    retired_pages: int | None
    remapped_rows_failed: bool | None
    remapped_rows_pending: bool | None
    pcie_generation: int | None
    pcie_generation_max: int | None
    pcie_width: int | None
    pcie_width_max: int | None
    pcie_replays: int | None
    nvlinks_active: int | None
    processes: tuple[tuple[int, float | None], ...] | None  # (pid, GiB)


def read() -> list[Sensors]:
    """All GPUs of the driver, whatever CUDA_VISIBLE_DEVICES hides. Raises NoSensors where NVML does not answer."""
    try:
        _start()
        return [_of(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise NoSensors(
            f"NVML does not answer ({error}), expected NVIDIA's driver; try `nvidia-smi`"
        ) from None


@cache
def _start() -> None:
    # Once per process: the first start may take a second where the driver is not kept loaded.
    pynvml.nvmlInit()


def _of(index: int) -> Sensors:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        return _ask(function, gpu, *arguments)

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    rows = ask(pynvml.nvmlDeviceGetRemappedRows)
    pci = ask(pynvml.nvmlDeviceGetPciInfo)
    return Sensors(
        index=index,
        uuid=_text(ask(pynvml.nvmlDeviceGetUUID)),
        name=_text(ask(pynvml.nvmlDeviceGetName)),
        pci_address=None if pci is None else _address(_text(pci.busId)),
        temperature_celsius=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        slowdown_celsius=ask(
            pynvml.nvmlDeviceGetTemperatureThreshold, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        fan_percent=ask(pynvml.nvmlDeviceGetFanSpeed),
        power_watts=_over(ask(pynvml.nvmlDeviceGetPowerUsage), 1000),
        power_limit_watts=_over(ask(pynvml.nvmlDeviceGetEnforcedPowerLimit), 1000),
        power_default_watts=_over(ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit), 1000),
        sm_clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        sm_clock_max_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        memory_used_gib=None if memory is None else memory.used / GIB,
        memory_total_gib=None if memory is None else memory.total / GIB,
        throttle_reasons=_reasons(gpu),
        ecc_uncorrected=_ecc(gpu, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        ecc_corrected=_ecc(gpu, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        retired_pages=_retired(gpu),
        remapped_rows_failed=None if rows is None else bool(rows[3]),
        remapped_rows_pending=None if rows is None else bool(rows[2]),
        pcie_generation=ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration),
        pcie_generation_max=ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth),
        pcie_width_max=ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth),
        pcie_replays=ask(pynvml.nvmlDeviceGetPcieReplayCounter),
        nvlinks_active=_nvlinks(gpu),
        processes=_processes(gpu),
    )


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this card or this driver does not tell. A lost card is an error."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED):
            raise
        return None


def _reasons(gpu: Any) -> tuple[str, ...] | None:
    bits = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)
    if bits is None:  # drivers before 535 know the older name only
        bits = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu)
    return None if bits is None else tuple(word for bit, word in REASONS.items() if bits & bit)


def _ecc(gpu: Any, kind: int) -> int | None:
    """Errors since the driver was loaded."""
    return _ask(pynvml.nvmlDeviceGetTotalEccErrors, gpu, kind, pynvml.NVML_VOLATILE_ECC)


def _retired(gpu: Any) -> int | None:
    causes = (
        pynvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
        pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
    )
    pages = [_ask(pynvml.nvmlDeviceGetRetiredPages, gpu, cause) for cause in causes]
    known = [len(found) for found in pages if found is not None]
    return sum(known) if known else None


def _nvlinks(gpu: Any) -> int | None:
    """Links that are up; None where the card has none."""
    states = []
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(pynvml.nvmlDeviceGetNvLinkState, gpu, link)
        if state is None:  # links are counted without gaps
            break
        states.append(state)
    return sum(states) if states else None


def _processes(gpu: Any) -> tuple[tuple[int, float | None], ...] | None:
    """Who computes and who draws; a program that does both is listed once. In a container pids are the host's."""
    lists = [
        _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu),
        _ask(pynvml.nvmlDeviceGetGraphicsRunningProcesses, gpu),
    ]
    if all(found is None for found in lists):
        return None
    held = {process.pid: _over(process.usedGpuMemory, GIB) for found in lists for process in found or ()}
    return tuple(sorted(held.items()))


def _over(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _address(bus_id: str) -> str:
    """NVML's `00000000:01:00.0` as sysfs names it: `0000:01:00.0`."""
    return bus_id.lower()[-12:]
