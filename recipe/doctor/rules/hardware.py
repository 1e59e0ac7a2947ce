"""GPUs that fail, get too hot or lose their power."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Line, Mark

# What NVIDIA's driver means by its numbers, and what helps.
XIDS = {
    13: (
        "a kernel used a wrong address or instruction",
        "update torch and the driver; if it comes back on one card, test it",
    ),
    31: (
        "a kernel touched memory that it has not",
        "a bug of a program or library: update; compute-sanitizer finds it",
    ),
    43: ("a program's kernel was reset", "look at the program's own error"),
    45: ("earlier errors made the driver end the program", "look at the Xid before"),
    48: (
        "a double-bit ECC error: memory is damaged",
        "reset the GPU or reboot; if it comes back, replace the card",
    ),
    61: ("the GPU's micro-controller halted", "reboot, update driver and VBIOS"),
    62: ("the GPU's micro-controller halted", "reboot, update driver and VBIOS"),
    63: ("a memory row was remapped", "reboot soon, to make it effective"),
    64: ("a memory row could not be remapped", "replace the card"),
    74: ("an NVLink error", "reseat the bridge, reboot"),
    79: ("the GPU has fallen off the bus", "power supply, riser and slot; `nvidia-smi -pl 280`; reboot"),
    92: ("many single-bit ECC errors", "watch it; replace the card if it grows"),
    94: ("a contained ECC error", "restart the program"),
    95: ("an uncontained ECC error", "reset the GPU or reboot"),
    119: ("the GPU's system processor does not answer", "reboot, update the driver"),
    120: ("the GPU's system processor failed", "reboot, update the driver"),
}
XID = Mark("NVRM: Xid", r"NVRM: Xid \(.*?\): (\d+)", kernel=True)
HOT_CELSIUS = 83.0
PERSISTENT = 3  # warnings or steps, before one speaks of a state


def xid_of(case: Case) -> int | None:
    for line in case.found(XID):
        if found := XID.search(line.text):
            return int(found[1])
    for event in case.events:
        if event.cause == "xid":
            found = re.search(r"Xid\D{0,20}(\d+)", event.line.text)
            return int(event.values.get("xid") or (found[1] if found else 0)) or None
    return None


def xid_remedy(case: Case) -> str:
    number = xid_of(case)
    meaning, remedy = XIDS.get(number or 0, ("see NVIDIA's list of Xid errors", "reboot; update the driver"))
    return f"Xid {number} ({meaning}): {remedy}"


def _throttled(case: Case) -> list[Line]:
    told = [event.line for event in case.events if event.cause == "throttling"]
    if len(told) >= PERSISTENT:
        return told
    hot = [
        line
        for values, line in case.metrics
        if any((degrees or 0) >= HOT_CELSIUS for degrees in values.get("temperature_celsius") or [])
    ]
    steps = [rate for rate, _ in case.numbers("tokens_per_second")]
    slower = len(steps) >= 10 and max(steps[-5:]) < 0.7 * max(steps[:5])
    return [*told, *hot[-2:]] if slower and len(hot) >= PERSISTENT else []


def _power(case: Case) -> list[Line]:
    """The machine was started after the run's last sign of life, and nothing had ended it."""
    rebooted = case.is_run and case.state == "broken off" and case.boot_time > case.last_time > 0
    return case.end[-1:] + [event.line for event in case.events[-1:]] if rebooted else []


RULES = (
    Rule(
        "xid",
        "The NVIDIA driver reported an error of a GPU (Xid)",
        "The number tells hardware from software: 48, 64, 79, 95 mean the card, its slot or its power; 13, 31, 43 mostly a "
        "program.",
        xid_remedy,
        marks=(XID,),
        causes=("xid",),
        when="unfinished",
        over=("cuda_launch_failed", "nccl_error", "collective_timeout", "rank_killed", "rank_hung"),
        general_remedy="; ".join(
            f"{number}: {remedy}" for number, (_, remedy) in XIDS.items() if number in (31, 48, 74, 79, 119)
        ),
    ),
    Rule(
        "gpu_lost",
        "A GPU is gone",
        "It has fallen off the bus (Xid 79): power supply, riser, slot or heat.",
        "reboot; `sudo nvidia-smi -pl 280` (a lower power limit), reseat card and cables, another slot or riser",
        marks=(
            "GPU is lost",
            "Unable to determine the device handle for GPU",
            Mark("GPU has fallen off the bus", kernel=True),
            "CUDA error: device not ready",
            "GPU_IS_LOST",
        ),
        causes=("gpu_lost",),
        when="unfinished",
        over=("xid", "nccl_error", "no_gpu", "cuda_launch_failed", "rank_hung"),
    ),
    Rule(
        "ecc",
        "The GPU's memory has errors",
        "An uncorrectable ECC error: what was computed since cannot be trusted.",
        "`nvidia-smi -q -d ECC,ROW_REMAPPER`; reset the GPU or reboot; replace the card if it comes back; go on from the last "
        "checkpoint",
        marks=("uncorrectable ECC error encountered", "uncorrectable NVLink error"),
        causes=("ecc",),
        when="unfinished",
        over=("xid", "cuda_launch_failed", "nccl_error"),
    ),
    Rule(
        "cuda_launch_failed",
        "A kernel on the GPU failed",
        "It touched memory that it has not, or the card is overclocked or damaged. Later lines of the same process mean nothing.",
        "`dmesg | grep Xid`; CUDA_LAUNCH_BLOCKING=1 shows where; update torch and driver; take overclocking back",
        marks=(
            "an illegal memory access was encountered",
            "unspecified launch failure",
            "an illegal instruction was encountered",
            "misaligned address",
            "CUDA error: unknown error",
        ),
        certainty="likely",
        over=("nccl_error", "rank_crashed"),
    ),
    Rule(
        "throttling",
        "The GPUs slow down: too hot, or out of power",
        "A card lowers its clocks at its limit of temperature or power; two 3-slot cards beside each other heat one another.",
        "better air, or a lower limit that is held: `sudo nvidia-smi -pl 280` (a 3090 loses a few per cent only)",
        find=_throttled,
        certainty="likely",
        kind="symptom",
        when="always",
    ),
    Rule(
        "power_loss",
        "The machine went off while it trained",
        "The log ends in the middle, without an error, and the machine was started after that. Two cards that begin a step "
        "together draw more than a power supply gives (fsdp_qlora issue 41), or the power failed.",
        lambda case: (
            f"`sudo nvidia-smi -pl 280` (peaks reach twice the limit), one cable per plug, a stronger supply; {case.again} goes "
            "on from the last checkpoint"
        ),
        find=_power,
        certainty="likely",
        when="unfinished",
        over=("no_end",),
        general_remedy="`sudo nvidia-smi -pl 280`, one cable per plug, a stronger supply; the same RUN= goes on",
    ),
)
