"""The way of each NVIDIA GPU over the PCI bus, from sysfs: bridges, links, NUMA node, IOMMU group, ACS, BAR1.

Plain Python 3.10, standard library only: the host's probe runs it. Whatever cannot be read is None; without root the kernel
shows only the first 64 bytes of a config space, so that ACS is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from recipe.hardware import NVIDIA, display_devices

GIB = 2**30
ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # by GT/s
EXTENDED = 0x100  # where the extended capabilities begin
ACS = 0x000D
REDIRECT = 0b1100  # the control bits that send peer requests and completions up to the root


@dataclass(frozen=True)
class Link:
    """A device's own end of its link; a bridge's is the one towards the CPU."""

    address: str
    generation: int | None
    generation_max: int | None
    width: int | None
    width_max: int | None


@dataclass(frozen=True)
class GpuPath:
    """One GPU and what lies between it and the CPU, nearest to the CPU first."""

    address: str
    link: Link
    bridges: list[Link] = field(default_factory=list)
    numa_node: int | None = None
    iommu_group: int | None = None
    iommu_companions: list[str] = field(default_factory=list)
    acs_redirect: bool | None = None  # on any bridge above; None: not readable
    bar1_gib: float | None = None


def gpu_paths(root: Path) -> list[GpuPath]:
    folder = root / "sys/bus/pci/devices"
    return [_path(folder / device.address) for device in display_devices(root) if device.vendor == NVIDIA]


def _path(device: Path) -> GpuPath:
    place = device.resolve()
    above = [folder for folder in reversed(place.parents) if ADDRESS.fullmatch(folder.name)]
    group = device / "iommu_group"
    number = group.resolve().name if group.exists() else ""
    companions = sorted(p.name for p in (group / "devices").iterdir()) if (group / "devices").is_dir() else []
    node = _number(device / "numa_node")
    redirects = [redirects_peers(_bytes(folder / "config")) for folder in above]
    known = [redirect for redirect in redirects if redirect is not None]
    return GpuPath(
        address=device.name,
        link=_link(device),
        bridges=[_link(folder) for folder in above],
        numa_node=None if node is None or node < 0 else node,  # -1: the board does not tell
        iommu_group=int(number) if number.isdigit() else None,
        # The GPU's own sound device and USB port are no strangers.
        iommu_companions=[name for name in companions if name[:-2] != device.name[:-2]],
        acs_redirect=any(known) if known else None,
        bar1_gib=_bar1_gib(device / "resource"),
    )


def redirects_peers(config: bytes) -> bool | None:
    """Whether a bridge's ACS sends traffic between GPUs up to the root; None where its config space is not readable."""
    if len(config) <= EXTENDED:
        return None
    place = EXTENDED
    for _ in range(48):  # a broken list must not turn in circles
        header = int.from_bytes(config[place : place + 4], "little")
        if header in (0, 0xFFFFFFFF):
            return False
        if header & 0xFFFF == ACS:
            return bool(int.from_bytes(config[place + 6 : place + 8], "little") & REDIRECT)
        place = header >> 20
        if place < EXTENDED:
            return False
    return False


def _link(device: Path) -> Link:
    return Link(
        device.name,
        _generation(device / "current_link_speed"),
        _generation(device / "max_link_speed"),
        _number(device / "current_link_width"),
        _number(device / "max_link_width"),
    )


def _generation(file: Path) -> int | None:
    """`16.0 GT/s PCIe` is generation 4."""
    return GENERATIONS.get(_bytes(file).decode(errors="replace").partition(" ")[0])


def _bar1_gib(file: Path) -> float | None:
    """The window onto the card's memory: 0.25 GiB, or all of it with resizable BAR (Above 4G decoding in the BIOS)."""
    lines = _bytes(file).decode(errors="replace").splitlines()
    if len(lines) < 2:
        return None
    try:
        start, end, _ = (int(word, 16) for word in lines[1].split())
    except ValueError:
        return None
    return (end - start + 1) / GIB if end > start else None


def _number(file: Path) -> int | None:
    try:
        return int(_bytes(file))
    except ValueError:
        return None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
