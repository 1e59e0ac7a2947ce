"""Checks of the GPUs: there, enough, large and free enough, new enough, with a driver that torch can use."""

from __future__ import annotations

import re

from recipe.plan.budget import GPU_SPARE_GIB
from recipe.preflight.check import Check, Context, Status, judged, told

# CUDA 13 has no code for GPUs before Turing; bf16 arithmetic begins with Ampere.
OLDEST_CAPABILITY = (7, 5)
BF16_CAPABILITY = (8, 0)
# What the head of the GPU lock says about the driver; `make lock` works it out.
LOCK = "requirements-gpu.lock"
LOCKED_DRIVER = re.compile(r"^# NVIDIA driver: branch (\d+) or newer \(CUDA (\d+)\.", re.MULTILINE)
# A larger model may fit into host RAM, but on a CPU it trains for weeks: a GPU that is not found is an error then.
MOST_PARAMETERS_ON_CPU = 3e9


def present(context: Context) -> Check:
    """Is there an NVIDIA GPU with a driver, or a plan that does without?"""
    machine = context.machine
    if machine.gpus:
        names = sorted({gpu.name for gpu in machine.gpus})
        return Check(
            "gpu", "ok", f"{len(machine.gpus)} × {', '.join(names)}", "an NVIDIA GPU, or a config for CPUs"
        )
    found, remedy = _why_no_gpu(context)
    plan = context.plan
    too_large = plan.parameters > MOST_PARAMETERS_ON_CPU
    too_large |= plan.ram_gib is not None and plan.ram_needed_gib > plan.ram_gib
    needed = context.on_gpu or too_large
    if not needed and not machine.nvidia_without_driver:
        return Check("gpu", "ok", f"{found}; this config runs on the CPU", "none needed")
    expected = "an NVIDIA GPU with its driver" if needed else "none needed"
    return Check("gpu", "fail" if needed else "warn", found, expected, remedy)


def count(context: Context) -> Check:
    """A rank has a GPU of its own."""
    ranks, there = context.plan.world_size, len(context.machine.gpus)
    remedy = "set compute.processes to auto, or look at CUDA_VISIBLE_DEVICES and `nvidia-smi -L`"
    return judged(
        "gpu count", there >= ranks, str(there), f"{ranks}, one per rank", remedy, measured=there, unit="GPUs"
    )


def memory_size(context: Context) -> Check:
    """The smallest card must hold a rank."""
    smallest = min(gpu.memory_total_gib for gpu in context.machine.gpus)
    needed = context.plan.vram_needed_gib
    remedy = next((r for r in context.plan.reasons if r.startswith("GPU memory")), "see `make plan`")
    return judged(
        "gpu memory",
        smallest >= needed,
        f"{smallest:.1f} GiB",
        f"{needed:.1f} GiB for this plan",
        remedy,
        measured=smallest,
        unit="GiB",
    )


def memory_free(context: Context) -> Check:
    """What other programs hold is missing: a desktop takes 0.3 to 1 GiB of the card that it draws on."""
    fullest = min(context.machine.gpus, key=lambda gpu: gpu.memory_free_gib)
    needed = context.plan.vram_needed_gib
    found = f"{fullest.memory_free_gib:.1f} GiB free on GPU {fullest.index} of {fullest.memory_total_gib:.1f}"
    if holders := _holders(context, fullest.uuid):
        found += f"; held by {holders}"
    remedy = "end the programs on the GPU (`nvidia-smi` lists them), or log in without a desktop"
    # Between the need and the spare it may work: that is a warning.
    free = fullest.memory_free_gib
    otherwise: Status = "warn" if free >= needed - GPU_SPARE_GIB else "fail"
    return judged(
        "gpu memory free", free >= needed, found, f"{needed:.1f} GiB", remedy, otherwise, free, "GiB"
    )


def _holders(context: Context, uuid: str) -> str:
    """`python (pid 4242) 3.1 GiB`: NVML knows the pids, the host's probe their names."""
    card = next((card for card in context.sensors.get("cards", []) if card.uuid == uuid), None)
    held = dict(card.processes or ()) if card else {}
    processes, _ = told(context, "gpu_processes")
    names = {}
    for process in processes or []:
        if process["gpu"] == uuid:
            names[process["pid"]] = process["name"]
            held.setdefault(process["pid"], process["gib"])
    largest = sorted(held.items(), key=lambda item: item[1] or 0.0, reverse=True)[:3]
    return ", ".join(
        f"{names.get(pid, 'a program')} (pid {pid}){'' if gib is None else f' {gib:.1f} GiB'}"
        for pid, gib in largest
    )


def capability(context: Context) -> Check:
    """CUDA 13 has no code for cards before Turing."""
    oldest = min(context.machine.gpus, key=lambda gpu: gpu.compute_capability or (99, 0))
    expected = f"{_dotted(OLDEST_CAPABILITY)} or newer (Turing)"
    if oldest.compute_capability is None:
        return Check("compute capability", "skip", "the driver does not tell", expected)
    remedy = f"{oldest.name} is too old for CUDA 13: leave it out with CUDA_VISIBLE_DEVICES, or replace it"
    good = oldest.compute_capability >= OLDEST_CAPABILITY
    return judged("compute capability", good, _dotted(oldest.compute_capability), expected, remedy)


def bf16(context: Context) -> Check:
    """Arithmetic in bf16 begins with Ampere; on older cards fp16 takes its place."""
    wanted = context.settings.compute.dtype
    missing = [
        g for g in context.machine.gpus if g.compute_capability and g.compute_capability < BF16_CAPABILITY
    ]
    found = f"{missing[0].name} has none" if missing else "every GPU computes in bf16"
    if wanted not in ("auto", "bf16"):
        return Check("bf16", "skip", f"compute.dtype is {wanted}", "")
    if wanted == "auto":
        remedy = "nothing to do: fp16 is taken instead"
        return judged("bf16", not missing, found, "bf16, or fp16 in its place", remedy, otherwise="warn")
    return judged(
        "bf16", not missing, found, "bf16, as compute.dtype says", "set compute.dtype to auto or fp16"
    )


def driver(context: Context) -> Check:
    """The driver against the branch that the lock names, where torch is built for the lock's CUDA."""
    version = context.machine.gpus[0].driver_version
    lock = context.lock_folder / LOCK
    said = LOCKED_DRIVER.search(lock.read_text(encoding="utf-8")) if lock.is_file() else None
    if said is None:
        why = "names no driver" if lock.is_file() else "is not here"
        return Check("driver", "skip", f"{version}; {LOCK} {why}", "the driver branch that the lock names")
    branch, locked_cuda = (int(number) for number in said.groups())
    expected = f"{branch} or newer for CUDA {locked_cuda}, as {LOCK} says"
    cuda = context.stack.get("cuda")
    if cuda and int(cuda.split(".")[0]) != locked_cuda:
        # Another torch than the locked one, on purpose: whether it can use the driver, `torch cuda` tries.
        return Check("driver", "skip", f"{version}; torch here is built for CUDA {cuda}", expected)
    remedy = f"torch is built for CUDA {locked_cuda}: install the driver branch {branch} or newer and reboot"
    number = version.split(".")[0]
    return judged("driver", number.isdigit() and int(number) >= branch, version, expected, remedy)


def _why_no_gpu(context: Context) -> tuple[str, str]:
    machine = context.machine
    if machine.gpu_error:
        return (
            machine.gpu_error,
            "driver and kernel module disagree or the GPU is lost: reboot, then `nvidia-smi`",
        )
    if machine.nvidia_without_driver:
        device = machine.nvidia_without_driver[0]
        serves = f"driver {device.driver}" if device.driver else "no driver"
        return (
            f"NVIDIA GPU at {device.address} with {serves}, but no nvidia-smi",
            "install NVIDIA's driver (`make provision`) and reboot; in a container, pass the GPUs on (--gpus all)",
        )
    if machine.amd_gpu:
        return (
            "AMD GPU found, only NVIDIA works",
            "use a machine with NVIDIA GPUs, or the demo, which runs on the CPU",
        )
    return (
        "no GPU",
        "use a machine with NVIDIA GPUs (`make plan` with --gpus N --vram-gib G asks which), or a smaller model",
    )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


ALWAYS = [present]
WITH_GPUS = [count, memory_size, memory_free, capability, bf16, driver]
