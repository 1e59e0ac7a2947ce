"""Checks of the host: platform, Python, RAM, swap, disk, shared memory."""

from __future__ import annotations

from pathlib import Path

from recipe.container import in_container
from recipe.hardware import disk_free_gib, refuse_unsupported
from recipe.plan import Plan
from recipe.plan.parts import total_gib
from recipe.preflight.check import Check, Context, judged

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 14)
# Docker's default of 64 MiB is too small for NCCL's shared-memory transport between two GPUs of one host.
SHM_GIB = 1.0
# Below this share of free RAM a burst, such as another program, needs somewhere to go.
THIN_MARGIN = 0.2


def platform(context: Context) -> Check:
    machine = context.machine
    refusal = refuse_unsupported(machine.system, machine.arch)
    wsl = " in WSL2" if machine.wsl2 else ""
    found = f"{machine.distribution}{wsl}, {machine.arch}, kernel {machine.kernel}"
    return judged("platform", refusal is None, found, "Linux or WSL2, x86_64 or aarch64", refusal or "")


def python(context: Context) -> Check:
    version = tuple(int(part) for part in context.machine.python.split(".")[:2])
    oldest, newest = (".".join(map(str, edge)) for edge in (OLDEST_PYTHON, NEWEST_PYTHON))
    return judged(
        "python",
        OLDEST_PYTHON <= version <= NEWEST_PYTHON,
        context.machine.python,
        f"{oldest} to {newest}",
        f"install Python {oldest} or newer, remove .venv and run `make setup` again",
    )


def cores(context: Context) -> Check:
    """Fewer cores than ranks work, but a rank waits for the other one's turn at every collective."""
    machine, ranks = context.machine, context.plan.world_size
    return judged(
        "cores",
        machine.cores >= ranks,
        f"{machine.cores} ({machine.cpu_model})",
        f"at least {ranks}, one per rank",
        "it runs, but slowly; give the container or machine more cores, or set compute.processes to 1",
        otherwise="warn",
    )


def ram(context: Context) -> Check:
    """RAM that is available now, against the plan; what other programs hold can be had by closing them."""
    machine, needed = context.machine, context.plan.ram_needed_gib
    usable, available = machine.usable_ram_gib, machine.ram_available_gib
    expected = f"{needed:.1f} GiB for this plan"
    if usable is None or available is None:
        return Check("ram", "skip", "the system does not tell", expected)
    limited = machine.ram_limit_gib is not None and machine.ram_limit_gib == usable
    found = f"{available:.1f} GiB available of {usable:.1f}{' (container limit)' if limited else ''}"
    if usable < needed:
        remedy = "raise the container's memory limit" if limited else "`make plan` shows the parts; add RAM"
        return Check("ram", "fail", found, expected, f"{remedy}, or take a smaller model")
    return judged(
        "ram", available >= needed, found, expected, "close other programs: it may not fit", otherwise="warn"
    )


def swap(context: Context) -> Check:
    """Swap is a last resort: wanted only where RAM is thin, and a bad sign where it is already in use."""
    machine, needed = context.machine, context.plan.ram_needed_gib
    available = machine.ram_available_gib
    used = machine.swap_total_gib - machine.swap_free_gib
    found = f"{machine.swap_total_gib:.1f} GiB, {used:.1f} used"
    if used > machine.swap_total_gib / 2 and used > 0.5:
        return Check(
            "swap", "warn", found, "less than half used", "RAM is short already: close other programs"
        )
    # No swap makes up for RAM that is missing altogether: then `ram` fails, and that says it.
    thin = available is not None and needed <= available < needed * (1 + THIN_MARGIN)
    remedy = "RAM is thin for this plan: add swap (a 16 GB swap file), which is slow but saves the run"
    return judged(
        "swap", not thin or machine.swap_total_gib >= 1, found, "some where RAM is thin", remedy, "warn"
    )


def disk(context: Context) -> Check:
    """Free space in the models and runs folders, which may share a disk."""
    plan, paths = context.plan, context.settings.paths
    models = 0.0 if plan.on_disk_gib else total_gib(plan.model_disk_parts)
    wanted = {Path(paths.models): models, Path(paths.runs): total_gib(plan.run_disk_parts)}
    disks: dict[int, list[Path]] = {}
    for folder in wanted:
        disks.setdefault(_device_of(folder), []).append(folder)
    found, expected, good = [], [], True
    for folders in disks.values():
        free, needed = disk_free_gib(folders[0]), sum(wanted[folder] for folder in folders)
        names = " and ".join(map(str, folders))
        found.append(f"{free:.1f} GiB free in {names}")
        expected.append(f"{needed:.1f} GiB in {names}")
        good = good and free >= needed
    remedy = "free some space, or point paths.models and paths.runs at a larger disk"
    return judged("disk", good, "; ".join(found), "; ".join(expected), remedy)


def shm(context: Context) -> Check:
    """NCCL's transport between GPUs of one host."""
    size, expected = context.machine.shm_total_gib, f"at least {SHM_GIB:.0f} GiB for NCCL"
    if not needs_nccl(context.plan):
        return Check("shm", "skip", "no NCCL in a run on one GPU or on CPUs", expected)
    found = "/dev/shm is missing" if size is None else f"{size:.2f} GiB in /dev/shm"
    remedy = (
        "start the container through make or `docker compose`: compose.yaml sets shm_size"
        if in_container()
        else "start the container with --shm-size=1g (compose: shm_size: 1gb) or --ipc=host"
    )
    return judged("shm", size is not None and size >= SHM_GIB, found, expected, remedy)


def needs_nccl(plan: Plan) -> bool:
    return plan.device == "gpu" and plan.world_size > 1


def _device_of(folder: Path) -> int:
    """The disk that a folder, which need not exist yet, will be on."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.stat().st_dev


CHECKS = [platform, python, cores, ram, swap, disk, shm]
