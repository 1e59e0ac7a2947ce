"""A bare Debian or Ubuntu host, as library/machine.py returns it: `inspect`, and its small questions one by one.

Nothing here changes anything or judges; filter_plugins/verdicts.py does. All that is read lies below `root`, so that
tests can show another machine; programs are found on PATH.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from ansible.module_utils import machine_docker, machine_gpus, machine_packages
from ansible.module_utils.hardware import probe
from ansible.module_utils.machine_disks import disks, existing_folder, swaps
from ansible.module_utils.machine_reading import inside, link_name, read, read_bytes, said

EFI_VARIABLES = "sys/firmware/efi/efivars"
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
SETUP_MODE = "SetupMode-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# What `mokutil --disable-validation` leaves: shim then starts kernels, and kernels load modules, that nobody signed.
NO_VALIDATION = "MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23"
SERVICES = ("display-manager.service", "systemd-oomd.service")
DRIVER_VERSION = re.compile(r"Kernel Module\D*?(?:for \S+\s+)?(\d+\.\d+(?:\.\d+)?)\s")


STATE_FILE = "/var/lib/qlora-70b-recipe/packages.json"


def inspect(root: Path, folders: list[str], packages: list[str], state_file: str = STATE_FILE) -> dict:
    """Everything about the machine whose root folder is `root`.

    Args:
        folders: absolute paths whose disks are measured, beside Docker's data; they need not exist yet.
        packages: Debian package names to look up; patterns are matched against what is installed.
        state_file: where library/packages.py keeps what it has added.

    Raises:
        ProgramError: dpkg-query failed.
    """
    basics = probe(inside(root, existing_folder(root, folders[0] if folders else "/")), root)
    kernel = running_kernel(root)
    known = machine_packages.database(root)
    gpus = machine_gpus.gpus(root, basics.gpus)
    active = active_services()
    newer = machine_packages.newer_kernel(kernel, known)
    docker = machine_docker.docker(root, known)
    return {
        "release": release(root),
        "kernel": kernel,
        "architecture": platform.machine(),
        "wsl2": is_wsl2(kernel),
        "container": container(root),
        "python": basics.python,
        "cpu": {"model": basics.cpu_model, "cores": basics.cores},
        "ram_gib": _rounded(basics.usable_ram_gib),
        "ram_available_gib": _rounded(basics.ram_available_gib),
        "swap_gib": _rounded(basics.swap_total_gib),
        "swaps": swaps(root),
        "disks": disks(root, [*folders, docker["data_root"]]),
        "gpus": gpus,
        "amd_gpu": basics.amd_gpu,
        "iommu": machine_gpus.iommu(root, gpus),
        "secure_boot": secure_boot(root),
        "nouveau": machine_gpus.nouveau(root, gpus),
        "driver": driver(root, basics.gpus[0].driver_version if basics.gpus else None, basics.gpu_error),
        "installed": machine_packages.installed(known, packages),
        "candidates": machine_packages.candidates(root, [*packages, f"linux-headers-{kernel}"]),
        "held": machine_packages.held(known),
        "headers_for_kernel": inside(root, f"/lib/modules/{kernel}/build").exists(),
        "kernel_package": machine_packages.kernel_package(root, kernel, known),
        "newer_kernel": newer,
        "docker": docker,
        "reboot_required": newer is not None or _marked_for_reboot(root),
        "desktop": desktop(root, active),
        "apt": {
            "mirrors": machine_packages.mirrors(root),
            "components": machine_packages.components(root),
        },
        "ours": machine_packages.ours(root, state_file),
        "apt_lock": machine_packages.lock_holder(root),
        "dpkg_interrupted": machine_packages.dpkg_interrupted(root),
        "systemd": (root / "run/systemd/system").is_dir(),
        "oomd_active": "systemd-oomd.service" in active,
        "unattended_upgrades": unattended_upgrades(root, known),
        "group_docker": group_members(root, "docker"),
    }


def release(root: Path) -> dict:
    """/etc/os-release: {id, version, codename, name}; Debian's testing has no version."""
    words = {}
    for line in read(inside(root, "/etc/os-release")).splitlines():
        name, _, value = line.partition("=")
        words[name.strip()] = value.strip().strip("\"'")
    return {
        "id": words.get("ID", ""),
        "version": words.get("VERSION_ID", ""),
        "codename": words.get("VERSION_CODENAME", ""),
        "name": words.get("PRETTY_NAME") or words.get("ID", ""),
    }


def running_kernel(root: Path) -> str:
    return read(root / "proc/sys/kernel/osrelease") or platform.release()


def is_wsl2(kernel: str) -> bool:
    return "microsoft" in kernel.lower()


def container(root: Path) -> str:
    """The kind of container that this is (docker, lxc, systemd-nspawn, …), or ""."""
    kind = read(root / "run/systemd/container")
    if not kind and (root / ".dockerenv").exists():
        kind = "docker"
    return "" if kind == "wsl" else kind  # systemd counts WSL2 among the containers


def secure_boot(root: Path) -> str:
    """`on`: the kernel loads signed modules only; `off`; `none`: not started by EFI."""
    if not (root / "sys/firmware/efi").is_dir():
        return "none"
    on = (
        _efi_flag(root, SECURE_BOOT)
        and not _efi_flag(root, SETUP_MODE)
        and not _efi_flag(root, NO_VALIDATION)
    )
    return "on" if on else "off"


def driver(root: Path, smi: str | None, smi_error: str | None) -> dict:
    """NVIDIA's driver as far as it is there: what is loaded, what nvidia-smi says, and what came past apt."""
    said_version = read(root / "proc/driver/nvidia/version")
    version = DRIVER_VERSION.search(said_version)
    kind = "open" if "Open Kernel Module" in said_version else "proprietary"
    return {
        "loaded": version[1] if version else read(root / "sys/module/nvidia/version") or None,
        "loaded_kind": kind if version else None,
        "smi": smi,
        "smi_error": smi_error,
        "runfile": machine_packages.runfile_driver(root),
        "foreign_sources": machine_packages.foreign_sources(root),
    }


def active_services() -> list[str]:
    """Those of SERVICES that run; systemctl answers with a line for each."""
    states = said("systemctl", "is-active", *SERVICES).split()
    return [name for name, state in zip(SERVICES, states) if state == "active"]  # noqa: B905 (none without systemd)


def desktop(root: Path, active: list[str]) -> dict:
    """Whether a desktop's login screen runs, and which one is set up."""
    unit = link_name(root / "etc/systemd/system/display-manager.service")
    chosen = read(root / "etc/X11/default-display-manager")
    manager = unit.removesuffix(".service") if unit else os.path.basename(chosen)
    return {"active": "display-manager.service" in active, "manager": manager or None}


def unattended_upgrades(root: Path, packages: dict[str, tuple[str, str]]) -> bool:
    """Whether the host installs updates, new kernels and drivers too, by itself."""
    setting = re.compile(r'^\s*APT::Periodic::Unattended-Upgrade\s+"([^"]*)"', re.MULTILINE)
    folder = inside(root, "/etc/apt/apt.conf.d")
    values = [value for file in sorted(folder.glob("*")) for value in setting.findall(read(file))]
    return "unattended-upgrades" in packages and bool(values) and values[-1] not in ("0", "")


def group_members(root: Path, group: str) -> list[str]:
    for line in read(inside(root, "/etc/group")).splitlines():
        name, _, _, members = [*line.split(":"), "", "", ""][:4]
        if name == group:
            return [member for member in members.split(",") if member]
    return []


def _efi_flag(root: Path, variable: str) -> bool:
    """Four bytes of attributes come first."""
    return read_bytes(root / EFI_VARIABLES / variable)[4:5] == b"\x01"


def _marked_for_reboot(root: Path) -> bool:
    return any((root / folder / "reboot-required").exists() for folder in ("run", "var/run"))


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 2)
