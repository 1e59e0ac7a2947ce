"""What this host is to get, and from where: every decision of the play in one place, so that it can be read and tested.

`choices(machine, settings)` takes what library/machine.py found and the variables of the roles, and returns

    driver   {source, why, branch, modules, dkms, kernel, packages, headers, replaces, hold}
    docker   {source, why, packages, replaces}
    toolkit  {mode, why}
    swap     {kind, gib, folder, there, why}      there: made by an earlier play
    disk     {folder: GiB needed}
    network  [{for, url}]       what has to be reachable before anything is changed

The roles carry it out. Plain functions of plain data, no Ansible.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

# Ansible loads this file by its path, so Python does not know the folder that judging/ lies in.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from judging.known import NO_SWAP_FILE, OLDEST_DOCKER, THIN_MARGIN, major

# What each release's own archive has, where apt on the host does not know it yet: driver branch, Docker engine.
DISTRIBUTION_DRIVER = {"debian 12": 535, "debian 13": 550, "ubuntu 22.04": 580, "ubuntu 24.04": 580}
DISTRIBUTION_DOCKER = {"debian 12": 20, "debian 13": 26, "ubuntu 22.04": 28, "ubuntu 24.04": 28}
DOCKER_PACKAGES = {
    "debian": ["docker.io", "docker-cli", "docker-buildx", "docker-compose"],
    "ubuntu": ["docker.io", "docker-buildx", "docker-compose-v2"],
}
DOCKER_CE_PACKAGES = [
    "docker-ce",
    "docker-ce-cli",
    "containerd.io",
    "docker-buildx-plugin",
    "docker-compose-plugin",
]
# What Docker's own packages stand in for, as Docker's manual lists it.
DOCKER_REPLACES = [
    "docker.io",
    "docker-cli",
    "docker-buildx",
    "docker-compose",
    "docker-compose-v2",
    "docker-doc",
    "podman-docker",
    "containerd",
    "runc",
]
SWAP_GIB = (4, 16)  # the least and the most that is worth having: pinned memory cannot be swapped
SYSTEM_GIB = 5  # packages, DKMS' builds, logs: beside models, runs, images and swap
IMAGE_GIB = {
    True: 30,
    False: 8,
}  # with and without a GPU: the image, its layers while it is built, pip's downloads


def choices(machine: dict, settings: dict) -> dict:
    """All decisions for one host. `settings`: the roles' variables (see roles/checks/tasks/main.yml)."""
    driver = choose_driver(machine, settings)
    docker = choose_docker(machine, settings)
    swap = choose_swap(machine, settings)
    return {
        "driver": driver,
        "docker": docker,
        "toolkit": choose_toolkit(machine, settings, docker),
        "swap": swap,
        "disk": disk_needs(machine, settings, swap),
        "network": network_needs(machine, settings, driver, docker),
    }


# --- driver -----------------------------------------------------------------------------------------------


def choose_driver(machine: dict, settings: dict) -> dict:
    """Which driver packages, from where."""
    branch = int(settings["driver_branch"])
    nothing = {"branch": branch, "modules": "", "dkms": False} | {
        name: [] for name in ("kernel", "packages", "headers", "replaces")
    }
    if machine["wsl2"]:
        return nothing | {
            "source": "none",
            "why": "WSL2: Windows brings the driver, none may be installed here",
        }
    if not machine["gpus"] and not int(settings["gpus_wanted"]):
        return nothing | {"source": "none", "why": "no NVIDIA GPU, and none is wanted"}
    if settings["driver_source"] == "none":
        return nothing | {"source": "none", "why": "driver_source is none"}
    source = settings["driver_source"]
    there = driver_branch_there(machine)
    ours = ours_of(machine, "driver")
    if source == "auto" and not ours and there >= branch:
        return nothing | {
            "source": "installed",
            "why": f"branch {there} is there, {branch} or newer is needed",
        }
    if source == "auto":
        has = distribution_driver(machine)
        source = ours or ("distribution" if has >= branch else "nvidia")
        why = f"{machine['release']['name']} has branch {has or 'unknown'}, {branch} or newer is needed"
    else:
        why = f"driver_source is {source}"
    modules, why_modules = kernel_modules(machine, settings["driver_modules"])
    prebuilt = source == "distribution" and is_ubuntu(machine) and machine["secure_boot"] == "on"
    packages = driver_packages(machine, source, branch, modules, prebuilt)
    kernel = f"linux-image-{ubuntu_kernel(machine)}"
    return {
        "source": source,
        "why": f"{why}; {why_modules}",
        "branch": branch,
        "modules": modules,
        "dkms": not prebuilt,
        # The modules' packages bring a kernel's image, but not the rest of its drivers (linux-modules-extra).
        "kernel": [kernel] if prebuilt and kernel in machine["installed"] else [],
        "packages": packages,
        "headers": [] if prebuilt or not settings["driver_headers"] else header_packages(machine),
        # Another branch's packages give way; those of a runfile are refused before.
        "replaces": [
            "nvidia-*",
            "libnvidia-*",
            "libcuda*",
            "xserver-xorg-video-nvidia*",
            "linux-modules-nvidia-*",
        ],
        # Modules that the distribution builds and signs come with each kernel, so they must not be held.
        "hold": not prebuilt,
    }


def driver_branch_there(machine: dict) -> int:
    """The branch of the driver that is loaded or installed, 0 for none."""
    found = [machine["driver"].get("loaded"), machine["driver"].get("smi")]
    for name, version in machine["installed"].items():
        if re.fullmatch(r"nvidia-(open-)?kernel(-open)?-dkms|nvidia-dkms-\d+.*", name):
            found.append(version)
        elif signed := re.match(r"linux-modules-nvidia-(\d+)-", name):  # its version is the kernel's
            found.append(signed[1])
    return max([major(version) for version in found if version], default=0)


def pinned_branch(pins: list[str], installed: dict[str, str], branch: int) -> int:
    """The branch of NVIDIA's repository to stay with: the one that is pinned, else the oldest that is new enough.

    Args:
        pins: names of packages nvidia-driver-pinning-…: of branches (580), and of versions (580.95.05). The repository for
            Debian 13 begins with 590 (NVIDIA/cuda-repo-management issue 38). Empty before apt knows it: `branch` then.
    """

    def branches(names) -> list[int]:
        found = [re.fullmatch(r"nvidia-driver-pinning-(\d+)", name) for name in names]
        return sorted(int(one[1]) for one in found if one and int(one[1]) >= int(branch))

    return next(iter(branches(installed) or branches(pins)), int(branch))


def distribution_driver(machine: dict) -> int:
    """The branch that the distribution has: as its apt says, else as its release is known for."""
    candidate = machine["candidates"].get("nvidia-kernel-dkms")
    known = DISTRIBUTION_DRIVER.get(release_of(machine), 0)
    # NVIDIA's repository has a package of the same name; the other one only NVIDIA's has, whatever a mirror of it is called.
    nvidias = machine["candidates"].get("nvidia-kernel-open-dkms")
    return known if is_ubuntu(machine) or not candidate or nvidias else major(candidate)


def newer_kernels(modules: list[str], running: str) -> list[str]:
    """Of kernel modules' files (/lib/modules/KERNEL/…): the kernels newer than the one that runs, which a reboot brings."""

    def numbers(kernel: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", kernel)]

    kernels = {path.split("/")[3] for path in modules}
    return sorted((one for one in kernels if numbers(one) > numbers(running)), key=numbers)


def kernel_modules(machine: dict, wanted: str) -> tuple[str, str]:
    """open or proprietary, and why. Open ones are NVIDIA's default since branch 560; RTX 50 has no others."""
    if wanted != "auto":
        return wanted, f"{wanted} kernel modules, as driver_modules says"
    impossible = [gpu["name"] for gpu in machine["gpus"] if gpu["open_modules"] == "impossible"]
    if impossible:
        return "proprietary", f"proprietary kernel modules, since there are no open ones for {impossible[0]}"
    needed = [gpu["name"] for gpu in machine["gpus"] if gpu["open_modules"] == "needed"]
    return "open", f"open kernel modules{', the only ones for ' + needed[0] if needed else ''}"


def driver_packages(machine: dict, source: str, branch: int, modules: str, prebuilt: bool) -> list[str]:
    """Names for library/packages.py (`a|b`: the first that apt has). Without a desktop, what computing needs."""
    is_open, desktop = modules == "open", machine["desktop"]["active"]
    if is_ubuntu(machine) and source == "nvidia":
        # From branch 590 on NVIDIA's packages for Ubuntu carry no branch in their names.
        suffix = "-open" if is_open else ""
        full = [f"nvidia-driver-{branch}{suffix}|nvidia-driver{suffix}"] if desktop else []
        return [
            f"nvidia-dkms-{branch}{suffix}|nvidia-dkms{suffix}",
            f"libnvidia-compute-{branch}|libnvidia-compute",
            f"nvidia-utils-{branch}|nvidia-utils",
            *full,
        ]
    if is_ubuntu(machine):
        flavour = f"{branch}-server{'-open' if is_open else ''}"
        full = [f"nvidia-driver-{flavour}"] if desktop else []
        if prebuilt:
            kernel = ubuntu_kernel(machine)
            return [
                f"linux-modules-nvidia-{flavour}-{kernel}",
                f"nvidia-headless-no-dkms-{flavour}",
                f"nvidia-utils-{branch}-server",
                *full,
            ]
        return [f"nvidia-headless-{flavour}", f"nvidia-utils-{branch}-server", *full]
    if source == "nvidia":
        module = "nvidia-kernel-open-dkms" if is_open else "nvidia-kernel-dkms"
        return [module, "nvidia-driver-cuda", *(["nvidia-driver"] if desktop else [])]
    module = "nvidia-open-kernel-dkms" if is_open else "nvidia-kernel-dkms"
    # nvidia-modprobe makes the device files, which CUDA needs without a desktop.
    packages = [module, "nvidia-smi", "libcuda1", "nvidia-persistenced", "nvidia-modprobe"]
    return [*packages, *(["nvidia-driver"] if desktop else [])]


def header_packages(machine: dict) -> list[str]:
    """Metapackages, so that a new kernel brings its headers, and the headers of the kernel that runs, if apt has them."""
    if is_ubuntu(machine):
        meta = f"linux-headers-{ubuntu_kernel(machine)}"
    else:
        flavour = re.search(r"-((?:cloud-|rt-)?(?:amd64|arm64))$", machine["kernel"])
        meta = f"linux-headers-{flavour[1] if flavour else 'amd64'}"
    running = f"linux-headers-{machine['kernel']}"
    return (
        [meta] if machine["headers_for_kernel"] or not machine["candidates"].get(running) else [meta, running]
    )


def ubuntu_kernel(machine: dict) -> str:
    """The flavour of the kernel's metapackages: generic, generic-hwe-24.04, lowlatency, …"""
    for name in sorted(machine["installed"], key=len, reverse=True):
        found = re.fullmatch(r"linux-(?:image|headers)-((?!\d)[a-z0-9.-]*[a-z0-9])", name)
        if found and not re.search(r"\d+\.\d+\.\d+", name):
            return found[1]
    return machine["kernel"].rpartition("-")[2] if re.search(r"-[a-z]+$", machine["kernel"]) else "generic"


# --- Docker -----------------------------------------------------------------------------------------------


def choose_docker(machine: dict, settings: dict) -> dict:
    """Which engine. One that is there and new enough stays, whoever packaged it."""
    wanted, found = settings["docker_source"], machine["docker"]
    there, origin, ours = major(found.get("version") or ""), found.get("origin"), ours_of(machine, "docker")
    distribution = DOCKER_PACKAGES.get(machine["release"]["id"], [])
    if origin and there >= OLDEST_DOCKER and wanted in ("auto", origin) and not ours:
        plugins = {"distribution": distribution, "docker": DOCKER_CE_PACKAGES}.get(origin, [])
        return {
            "source": "installed",
            "why": f"{found['version']} is there, of {origin}",
            "packages": plugins,
            "replaces": [],
        }
    candidate = major(machine["candidates"].get("docker.io") or "") or DISTRIBUTION_DOCKER.get(
        release_of(machine), 0
    )
    source = wanted
    if wanted == "auto":
        source = ours or ("distribution" if candidate >= OLDEST_DOCKER else "docker")
    why = (
        f"{machine['release']['name']} has {candidate or 'none'}, {OLDEST_DOCKER} or newer is needed"
        if wanted == "auto"
        else f"docker_source is {wanted}"
    )
    if source == "distribution":
        return {
            "source": source,
            "why": why,
            "packages": distribution,
            "replaces": [*DOCKER_CE_PACKAGES, "docker-ce-rootless-extras"],
        }
    return {"source": source, "why": why, "packages": DOCKER_CE_PACKAGES, "replaces": DOCKER_REPLACES}


def choose_toolkit(machine: dict, settings: dict, docker: dict) -> dict:
    """How containers get GPUs: by CDI where the engine can, else by NVIDIA's runtime."""
    if not machine["gpus"] and not machine["wsl2"]:
        return {"mode": "none", "why": "no NVIDIA GPU"}
    if settings["container_toolkit_mode"] != "auto":
        return {"mode": settings["container_toolkit_mode"], "why": "container_toolkit_mode"}
    old = (
        docker["source"] == "installed" and 0 < major(machine["docker"].get("version") or "") < OLDEST_DOCKER
    )
    return {
        "mode": "runtime" if old else "cdi",
        "why": f"Docker {'before' if old else 'from'} {OLDEST_DOCKER}{'' if old else ' on'}",
    }


# --- memory and disk --------------------------------------------------------------------------------------


def choose_swap(machine: dict, settings: dict) -> dict:
    """How much, and where. What is there counts; swap of ours is left as it was made."""
    folder = settings["memory_swap_folder"]
    kind, asked = settings["memory_swap"], settings["memory_swap_gib"]
    file = f"{folder.rstrip('/')}/recipe.swap"
    zram = "systemd-zram-generator" in machine["ours"]["packages"]
    for swap in machine["swaps"] if kind != "none" else []:
        is_file = swap["path"] == file
        if is_file or (zram and swap["path"].startswith("/dev/zram")):
            return {
                "kind": "file" if is_file else "zram",
                "gib": swap["size_gib"],
                "folder": folder,
                "there": True,
                "why": "it is there",
            }
    # A play that was stopped while it tried the file may have left it on, under the name that it has until then.
    tried = sum(swap["size_gib"] for swap in machine["swaps"] if swap["path"] == f"{file}.part")
    there = machine["swap_gib"] - tried
    wanted = swap_gib(machine, settings, there) if asked == "auto" else float(asked)
    why = ""
    if kind == "none":
        why = "memory_swap is none"
    elif wanted <= 0:
        why = f"{there:.0f} GiB is there"
    elif kind == "auto" and machine["container"]:
        why = "in a container, swap is its host's"
    if why:
        return {"kind": "none", "gib": 0, "folder": folder, "there": False, "why": why}
    filesystem = machine["disks"].get(folder, {}).get("filesystem", "")
    if kind == "auto":
        kind = "zram" if filesystem.startswith(NO_SWAP_FILE) else "file"
    return {
        "kind": kind,
        "gib": wanted,
        "folder": folder,
        "there": False,
        "why": f"{filesystem or 'unknown file system'} in {folder}",
    }


def swap_gib(machine: dict, settings: dict, there: float) -> int:
    """What lacks from RAM and swap to the plan's need with a margin, within bounds; GiB.

    Swap does not replace RAM (the plan's pinned buffers cannot be swapped): it lets other programs give way.
    """
    needed = settings.get("ram_needed_gib") or 0
    lacking = needed * (1 + THIN_MARGIN) - machine["ram_gib"]
    wanted = min(max(math.ceil(lacking), SWAP_GIB[0]), SWAP_GIB[1])
    missing = wanted - there
    return math.ceil(missing) if missing > 0.5 else 0


def disk_needs(machine: dict, settings: dict, swap: dict) -> dict:
    """GiB that must be free, by folder; what lies there already is not asked for again."""
    needs = {
        settings["models_folder"]: settings.get("models_gib") or 0,
        settings["runs_folder"]: settings.get("runs_gib") or 0,
    }
    needs["/usr"] = 0 if ours_of(machine, "driver") else SYSTEM_GIB
    if settings["project_build"]:
        needs[machine["docker"]["data_root"]] = IMAGE_GIB[bool(machine["gpus"])]
    if swap["kind"] == "file" and not swap["there"]:
        needs[swap["folder"]] = needs.get(swap["folder"], 0) + swap["gib"]
    return {folder: gib for folder, gib in needs.items() if gib}


# --- network ----------------------------------------------------------------------------------------------


def network_needs(machine: dict, settings: dict, driver: dict, docker: dict) -> list[dict]:
    """What will be fetched in this play, and from where; nothing for what is there already."""
    wanted = {
        name.partition("|")[0] for name in [*driver["packages"], *driver["headers"], *docker["packages"]]
    }
    missing = wanted - set(machine["installed"])
    needs = []
    if missing:
        needs += [{"for": "the distribution's packages", "url": url} for url in machine["apt"]["mirrors"][:2]]
    if driver["source"] == "nvidia" and "nvidia" not in machine["ours"]["sources"]:
        needs.append({"for": "the driver", "url": settings["driver_nvidia_key_url"]})
    if docker["source"] == "docker" and "docker" not in machine["ours"]["sources"]:
        needs.append({"for": "Docker", "url": settings["docker_key_url"]})
    if machine["gpus"] and "nvidia-container-toolkit" not in machine["installed"]:
        needs.append({"for": "the container toolkit", "url": settings["container_toolkit_key_url"]})
    if settings["project_build"] and settings["pip_index_url"]:
        needs.append({"for": "the image's packages", "url": settings["pip_index_url"]})
    return needs


# --- small words ------------------------------------------------------------------------------------------


def ours_of(machine: dict, what: str) -> str:
    """Where this playbook took a part from in an earlier run, or "" where the part is not ours."""
    sources, packages = machine["ours"]["sources"], machine["ours"]["packages"]
    if what == "driver":
        if not any(
            re.match(r"nvidia-(open-)?kernel|nvidia-dkms|nvidia-headless|linux-modules-nvidia", name)
            for name in packages
        ):
            return ""
        # Names that only a distribution has: with host_cuda, NVIDIA's repository is there beside its driver.
        if any(
            re.match(r"nvidia-headless|linux-modules-nvidia|nvidia-open-kernel-dkms", name)
            for name in packages
        ):
            return "distribution"
        return "nvidia" if "nvidia" in sources else "distribution"
    if not any(name in packages for name in ("docker.io", "docker-ce")):
        return ""
    return "docker" if "docker" in sources else "distribution"


def is_ubuntu(machine: dict) -> bool:
    return machine["release"]["id"] == "ubuntu"


def release_of(machine: dict) -> str:
    return f"{machine['release']['id']} {machine['release']['version']}"


class FilterModule:
    """The filters `choices`, `pinned_branch` and `newer_kernels`."""

    def filters(self):
        return {"choices": choices, "pinned_branch": pinned_branch, "newer_kernels": newer_kernels}
