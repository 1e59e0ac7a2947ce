"""Folders that look like machines to library/machine.py: their sysfs, their /proc, a database that the real dpkg reads.

Importing this puts ansible/module_utils where Ansible puts it on a target, so that `from ansible.module_utils import
machine_gpus` works below it (`# isort: split` keeps the order).
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # without ansible-core, `ansible` is our folder

import ansible.module_utils
from tests.machine import needs

REPOSITORY = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(REPOSITORY / "ansible/module_utils"))

GIB = 2**30
needs_dpkg = needs(shutil.which("dpkg-query") is not None, "dpkg")
needs_apt = needs(shutil.which("apt-cache") is not None, "apt")


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write files, by their path below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """Programs of these shell lines, first on PATH; `nvidia_smi` stands for nvidia-smi."""
    for name, script in scripts.items():
        program = folder / "programs" / name.replace("_", "-")
        tree(folder, {f"programs/{program.name}": f"#!/bin/sh\n{script}\n"})
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}")


# --- the PCI bus ------------------------------------------------------------------------------------------


def nvidia_device(
    root: Path,
    address: str,
    device_id: str,
    driver: str | None = None,
    port: str = "0000:00:01.0",
    port_width: int = 16,
    group: int | None = None,
    boot_vga: str = "0",
    bar_bytes: int = 256 * 2**20,
    speed: str = "16.0 GT/s PCIe",
    pci_class: str = "0x030000",
    subsystem: str = "0x1234",
) -> None:
    """A card below a root port, as sysfs shows it on a real machine (idle: the link has slowed down)."""
    real = root / "sys/devices/pci0000:00" / port / address
    start = 0x6000000000
    windows = [(0x84000000, 0x84FFFFFF, 0x40200), (start, start + bar_bytes - 1, 0x14220C), (0, 0, 0)]
    tree(real.parent, {"max_link_width": f"{port_width}\n", "max_link_speed": f"{speed}\n"})
    tree(
        real,
        {
            "vendor": "0x10de\n",
            "device": f"0x{device_id}\n",
            "subsystem_device": f"{subsystem}\n",
            "class": f"{pci_class}\n",
            "boot_vga": f"{boot_vga}\n",
            "current_link_width": f"{port_width}\n",
            "max_link_width": "16\n",
            "current_link_speed": "2.5 GT/s PCIe\n",
            "max_link_speed": "16.0 GT/s PCIe\n",
            "resource": "".join(f"0x{a:016x} 0x{b:016x} 0x{flags:016x}\n" for a, b, flags in windows),
        },
    )
    link(root / "sys/bus/pci/devices" / address, real)
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        link(real / "driver", root / "sys/bus/pci/drivers" / driver)
    if group is not None:
        devices = root / f"sys/kernel/iommu_groups/{group}/devices"
        devices.mkdir(parents=True, exist_ok=True)
        link(real / "iommu_group", devices.parent)
        link(devices / address, real)


# --- disks ------------------------------------------------------------------------------------------------


def block(root: Path, name: str, number: str, **files: str) -> Path:
    """A block device and its folder in sysfs; `queue__rotational` stands for queue/rotational."""
    real = root / "sys/devices/virtual/block" / name
    tree(real, {key.replace("__", "/"): text for key, text in ({"dev": number} | files).items()})
    link(root / "sys/dev/block" / number, real)
    link(root / "sys/class/block" / name, real)
    return real


def mount(root: Path, point: str, number: str, filesystem: str, source: str) -> None:
    """One more line of /proc/self/mountinfo, and the folder."""
    file = root / "proc/self/mountinfo"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(f"36 25 {number} / {point} rw,relatime shared:1 - {filesystem} {source} rw\n")
    (root / point.replace("\\040", " ").lstrip("/")).mkdir(parents=True, exist_ok=True)


# --- packages ---------------------------------------------------------------------------------------------


def dpkg_root(root: Path, packages: dict[str, str], owned: dict[str, list[str]] | None = None) -> Path:
    """A database that the real dpkg reads. Status `hold` where a version begins with `=`."""
    stanzas = []
    for name, version in packages.items():
        wanted = "hold" if version.startswith("=") else "install"
        stanzas.append(
            f"Package: {name}\nStatus: {wanted} ok installed\nArchitecture: all\nMaintainer: nobody\n"
            f"Version: {version.lstrip('=')}\nDescription: none\n"
        )
    tree(root, {"var/lib/dpkg/status": "\n".join(stanzas)})
    (root / "var/lib/dpkg/updates").mkdir(exist_ok=True)
    tree(root, {"var/lib/dpkg/info/format": "1\n"})
    for name in packages:
        tree(root, {f"var/lib/dpkg/info/{name}.list": "".join(f"{p}\n" for p in (owned or {}).get(name, []))})
        tree(root, {f"var/lib/dpkg/info/{name}.md5sums": ""})
    return root
