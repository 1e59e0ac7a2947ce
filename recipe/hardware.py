"""What this machine has: platform, CPU, memory, GPUs, disk.

Plain Python 3.10, standard library only, and nothing of ours: a bare host can run it
(`python3 recipe/hardware.py` prints JSON) before anything is installed. Limits of containers count: cores follow the
CPU affinity and the cgroup's quota, memory the cgroup's limit.

Nothing here judges; preflight does. The one exception is `refuse_unsupported`, which must answer before the
set-up. All functions that read the system take its root folder, so that tests can give them another tree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
NVIDIA = "0x10de"
AMD = "0x1002"
# cgroup v1 writes "no limit" as a number close to 2**63.
NO_LIMIT = 2**60
# A driver in trouble makes nvidia-smi hang; a healthy one without persistence mode needs a few seconds.
NVIDIA_SMI_SECONDS = 20
NVIDIA_SMI_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "driver_version")
GPU_NAME = re.compile(r"GPU\d+")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    index: int
    name: str
    memory_total_gib: float
    memory_free_gib: float
    compute_capability: tuple[int, int] | None
    driver_version: str
    uuid: str = ""


@dataclass(frozen=True)
class DisplayDevice:
    """A graphics device on the PCI bus, whether or not it has a driver."""

    address: str
    vendor: str
    driver: str | None


@dataclass(frozen=True)
class Machine:
    """What was found. None: the system does not tell."""

    system: str
    kernel: str
    arch: str
    distribution: str
    wsl2: bool
    python: str
    cpu_model: str
    cores: int
    ram_total_gib: float | None
    ram_limit_gib: float | None
    ram_available_gib: float | None
    swap_total_gib: float
    swap_free_gib: float
    shm_total_gib: float | None
    disk_folder: str
    disk_free_gib: float
    gpus: list[Gpu] = field(default_factory=list)
    gpu_error: str | None = None
    display_devices: list[DisplayDevice] = field(default_factory=list)

    @property
    def usable_ram_gib(self) -> float | None:
        """RAM that this process and its children may fill: the machine's, or the container's limit."""
        known = [size for size in (self.ram_total_gib, self.ram_limit_gib) if size is not None]
        return min(known) if known else None

    @property
    def nvidia_without_driver(self) -> list[DisplayDevice]:
        """NVIDIA devices on the bus that no NVIDIA driver serves (none, nouveau, or passed through)."""
        return [d for d in self.display_devices if d.vendor == NVIDIA and d.driver != "nvidia"]

    @property
    def amd_gpu(self) -> bool:
        return any(d.vendor == AMD for d in self.display_devices)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def probe(folder: str | Path = ".", root: str | Path = "/") -> Machine:
    """Look at this machine. `folder` is where models and runs will lie: its disk is measured."""
    root = Path(root)
    memory = read_meminfo(root)
    limit, limit_left = cgroup_memory(root)
    available = memory.get("MemAvailable")
    if limit_left is not None:
        available = min(available, limit_left) if available is not None else limit_left
    gpus, gpu_error = nvidia_gpus()
    kernel = platform.release()
    return Machine(
        system=platform.system(),
        kernel=kernel,
        arch=platform.machine(),
        distribution=_distribution(root),
        wsl2="microsoft" in kernel.lower(),
        python=platform.python_version(),
        cpu_model=_cpu_model(root),
        cores=usable_cores(root),
        ram_total_gib=_gib(memory.get("MemTotal")),
        ram_limit_gib=_gib(limit),
        ram_available_gib=_gib(available),
        swap_total_gib=memory.get("SwapTotal", 0) / GIB,
        swap_free_gib=memory.get("SwapFree", 0) / GIB,
        shm_total_gib=_shm_total_gib(root),
        disk_folder=str(Path(folder).absolute()),
        disk_free_gib=disk_free_gib(folder),
        gpus=gpus,
        gpu_error=gpu_error,
        display_devices=display_devices(root),
    )


def refuse_unsupported(system: str | None = None, arch: str | None = None) -> str | None:
    """The one line that says why this platform cannot run the recipe, or None where it can.

    An AMD GPU is no reason: the demo runs on the CPU beside it. Preflight refuses it where a GPU is needed.
    """
    system = system or platform.system()
    arch = arch or platform.machine()
    if system == "Windows":
        return (
            "unsupported platform: native Windows (bitsandbytes under FSDP needs Linux); expected Linux or WSL2; "
            "install WSL2 (`wsl --install`) and run the recipe inside it"
        )
    if system == "Darwin":
        return (
            "unsupported platform: macOS (no NVIDIA GPUs, no NCCL); expected Linux or WSL2; "
            "run the recipe on a Linux machine, the demo also in a Linux virtual machine"
        )
    if system != "Linux":
        return f"unsupported platform: {system}; expected Linux, or WSL2 on Windows"
    if arch not in ("x86_64", "aarch64"):
        return (
            f"unsupported processor: {arch}; expected x86_64 or aarch64, for which the locked packages exist"
        )
    return None


def read_meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    sizes = {}
    for line in text_of(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024
    return sizes


def cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """The tightest memory limit above this process and what is left of it, in bytes; None without a limit."""
    tightest: tuple[int | None, int | None] = (None, None)
    for folder, version in cgroup_folders(root, "memory"):
        limit_file, usage_file = (
            ("memory.max", "memory.current")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        limit = _integer(text_of(folder / limit_file))
        if limit is None or limit >= NO_LIMIT or (tightest[0] is not None and limit >= tightest[0]):
            continue
        used = _integer(text_of(folder / usage_file)) or 0
        tightest = (limit, max(0, limit - used + _page_cache(folder)))
    return tightest


def usable_cores(root: Path) -> int:
    """CPU cores that this process may use at once: affinity, then the cgroup's quota; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    for folder, version in cgroup_folders(root, "cpu"):
        if version == 2:
            quota, _, period = text_of(folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
        limit, length = _integer(quota), _integer(period)
        if limit and length and limit > 0:
            cores = min(cores, max(1, round(limit / length)))
    return cores


def nvidia_gpus() -> tuple[list[Gpu], str | None]:
    """The GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves, and what went wrong, if anything."""
    said, error = _nvidia_smi(f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader,nounits")
    gpus = [gpu for gpu in map(_parse_gpu, said.splitlines()) if gpu]
    return _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")), error


def peer_access() -> dict[tuple[int, int], str] | None:
    """What the driver says of one GPU reading another's memory, by their indices: `OK`, or why not (`CNS`, `GNS`, …).

    All GPUs, whatever CUDA_VISIBLE_DEVICES hides. None where it cannot be told: no driver, an old one, WSL2.
    """
    text, _ = _nvidia_smi("topo", "-p2p", "r")
    # Its header, GPU0 GPU1 …, is underlined by escape codes; a legend follows below the rows.
    rows = [row for line in text.splitlines() if (row := re.sub(r"\x1b\[[0-9;]*m", "", line).split())]
    header = next((row for row in rows if all(map(GPU_NAME.fullmatch, row))), [])
    found: dict[tuple[int, int], str] = {}
    for name, *words in rows:
        if GPU_NAME.fullmatch(name) and len(words) == len(header):
            others = [(other, word) for other, word in zip(header, words, strict=True) if other != name]
            found |= {(int(name[3:]), int(other[3:])): word for other, word in others}
    return found or None


def display_devices(root: Path) -> list[DisplayDevice]:
    """NVIDIA and AMD graphics devices on the PCI bus (classes 03: display, 12: accelerator)."""
    found = []
    folder = root / "sys/bus/pci/devices"
    for device in sorted(folder.iterdir()) if folder.is_dir() else []:
        vendor = text_of(device / "vendor").strip()
        if vendor in (NVIDIA, AMD) and text_of(device / "class").startswith(("0x03", "0x12")):
            driver = device / "driver"
            found.append(
                DisplayDevice(device.name, vendor, driver.resolve().name if driver.exists() else None)
            )
    return found


def disk_free_gib(folder: str | Path) -> float:
    """Free space for a folder that need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


def _nvidia_smi(*arguments: str) -> tuple[str, str | None]:
    """What `nvidia-smi` prints, nothing where there is none, and what went wrong, if anything."""
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if program is None:
        return "", None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi gave no answer within {NVIDIA_SMI_SECONDS} s"
    except OSError as error:
        return "", f"nvidia-smi could not start ({error.strerror})"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", f"nvidia-smi ended with {done.returncode}: {said[0] if said else 'no message'}"
    return done.stdout, None


def _parse_gpu(line: str) -> Gpu | None:
    """One line of nvidia-smi's CSV; None for a GPU that reports no memory of its own (shared, or lost)."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(NVIDIA_SMI_FIELDS) or not cells[0].isdigit():
        return None
    index, uuid, name, total, free, capability, driver = cells
    if not total.isdigit():
        return None
    major, _, minor = capability.partition(".")
    return Gpu(
        index=int(index),
        name=name,
        memory_total_gib=int(total) / 1024,
        memory_free_gib=int(free) / 1024 if free.isdigit() else 0.0,
        compute_capability=(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None,
        driver_version=driver,
        uuid=uuid,
    )


def _visible(gpus: list[Gpu], selection: str | None) -> list[Gpu]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: indices or UUID beginnings, up to the first that does not exist."""
    if selection is None:
        return gpus
    chosen = []
    for word in (word.strip() for word in selection.split(",")):
        match = [
            g for g in gpus if str(g.index) == word or (word.startswith("GPU-") and g.uuid.startswith(word))
        ]
        if not match:
            break
        chosen.append(match[0])
    return chosen


def cgroup_folders(root: Path, controller: str) -> list[tuple[Path, int]]:
    """Folders that may limit this process, with the cgroup version: its own and every one above it.

    In a container /proc/self/cgroup may show the host's path, which does not exist inside: then only the
    mount's own folder is read, and that one is the container's.
    """
    mount = root / "sys/fs/cgroup"
    folders = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, version = mount, 2
        elif controller in controllers.split(","):
            base, version = mount / (controllers if (mount / controllers).is_dir() else controller), 1
        else:
            continue
        below = [part for part in path.strip().split("/") if part not in ("", "..")]
        folders += [(base.joinpath(*below[:depth]), version) for depth in range(len(below) + 1)]
    return folders


def _page_cache(folder: Path) -> int:
    """Bytes of a cgroup's usage that the kernel gives back when asked: inactive file pages."""
    for line in text_of(folder / "memory.stat").splitlines():
        name, _, size = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and size.isdigit():
            return int(size)
    return 0


def _shm_total_gib(root: Path) -> float | None:
    folder = root / "dev/shm"
    return shutil.disk_usage(folder).total / GIB if folder.is_dir() else None


def _distribution(root: Path) -> str:
    for line in text_of(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()


def _cpu_model(root: Path) -> str:
    for line in text_of(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _integer(text: str) -> int | None:
    try:
        return int(text.strip())
    except ValueError:  # empty, "max"
        return None


def text_of(path: Path) -> str:
    """Of a small file of /proc or /sys; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    refusal = refuse_unsupported()
    if refusal:
        sys.exit(refusal)
    print(json.dumps(probe(*sys.argv[1:2]).to_dict(), indent=2))


def resident_bytes() -> int:
    """RAM of this process, as `recipe plan` counts it: RssAnon and RssShmem, without files that are mapped."""
    with open("/proc/self/status") as status:
        return sum(
            int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon:", "RssShmem:"))
        )
