"""Checks of the host itself: platform, Python, CPU, RAM, disk, shared memory. What a container cannot see of it: system.py."""

from __future__ import annotations

from pathlib import Path

from recipe.container import in_container
from recipe.hardware import disk_free_gib, refuse_unsupported
from recipe.plan import Plan
from recipe.plan.parts import total_gib
from recipe.preflight.check import Check, Context, judged, not_measured

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 14)
# Docker's default of 64 MiB is too small for NCCL's shared-memory transport between two GPUs of one host.
SHM_GIB = 1.0
# Below this share of free RAM a burst, such as another program, needs somewhere to go.
THIN_MARGIN = 0.2
# Reading the model at each start should not take longer than this.
LOAD_SECONDS = 180
NF4_BYTES_PER_PARAMETER = 0.53
# Threads of one rank: Python's, OpenMP's and BLAS's pools, CUDA's, NCCL's, autograd's.
TASKS_PER_RANK = 256


def platform(context: Context) -> Check:
    """The recipe runs on Linux alone; WSL2 counts."""
    machine = context.machine
    refusal = refuse_unsupported(machine.system, machine.arch)
    wsl = " in WSL2" if machine.wsl2 else ""
    found = f"{machine.distribution}{wsl}, {machine.arch}, kernel {machine.kernel}"
    return judged("platform", refusal is None, found, "Linux or WSL2, x86_64 or aarch64", refusal or "")


def python(context: Context) -> Check:
    """Of .venv, or of the image: what the locked packages are built for."""
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
        measured=machine.cores,
        unit="cores",
    )


def tasks(context: Context) -> Check:
    """Processes and threads that a container's or a user's control group allows; beyond it none can be started."""
    limit, used = context.tasks.get("limit"), context.tasks.get("used", 0)
    needed = TASKS_PER_RANK * context.plan.world_size
    expected = f"{needed} to spare, {TASKS_PER_RANK} per rank, or no limit"
    if limit is None:
        return Check("task limit", "ok", "none", expected)
    remedy = "raise it: docker's --pids-limit (compose: pids_limit), TasksMax= of the user's or service's unit in systemd"
    found = f"{limit - used} left of {limit}"
    return judged(
        "task limit", limit - used >= needed, found, expected, remedy, "warn", limit - used, "tasks"
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
        return Check("ram", "fail", found, expected, f"{remedy}, or take a smaller model", available, "GiB")
    remedy = "close other programs: it may not fit"
    return judged("ram", available >= needed, found, expected, remedy, "warn", available, "GiB")


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


def disk_speed(context: Context) -> Check:
    """In a row, past the page cache: each start reads the whole model."""
    found = context.disk
    size = context.plan.parameters * NF4_BYTES_PER_PARAMETER / 2**30
    needed = size / LOAD_SECONDS
    expected = f"the model's {size:.1f} GiB in {LOAD_SECONDS} s"
    remedy = "put paths.models on a local NVMe or SSD: every start waits for it"
    kind = found["kind"]
    if "skipped" in found and kind in ("rotational", "network") and size > 1:
        return Check("disk speed", "warn", f"{kind}; {found['skipped']}", expected, remedy)
    if answer := not_measured("disk speed", found, expected, "look at the disk: `dmesg`, `df`"):
        return answer
    read, write = found["read_gib_per_second"], found["write_gib_per_second"]
    text = f"{kind}: {read:.2f} GiB/s read, {write:.2f} written"
    return judged("disk speed", read >= needed, text, expected, remedy, "warn", read, "GiB/s")


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


CHECKS = [platform, python, cores, tasks, ram, swap, disk, disk_speed, shm]
