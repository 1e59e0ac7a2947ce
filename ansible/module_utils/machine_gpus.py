"""NVIDIA's GPUs as the PCI bus shows them, before there is a driver; and what stands between two of them."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils import gpu_table
from ansible.module_utils.hardware import NVIDIA, Gpu, display_devices
from ansible.module_utils.machine_reading import inside, link_name, number, read

GIB = 2**30
# The rates of PCIe generations 1 to 6, GT/s per lane, as sysfs writes them ("16.0 GT/s PCIe", formerly "16 GT/s").
GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
MEMORY_BAR, PREFETCHABLE = 0x200, 0x2000  # flags in a device's `resource` file (linux/ioport.h)
BARS = 6  # its first lines; the ROM and a bridge's windows follow


def gpus(root: Path, driver_sees: list[Gpu] | None = None) -> list[dict]:
    """The NVIDIA display devices, in the bus's order.

    Args:
        driver_sees: the GPUs that nvidia-smi lists. Where these are the devices that NVIDIA's driver serves, names and
            memory are taken from them: cards of one id may differ in size, and some were rebuilt with more memory.
            On WSL2, where no GPU is on the bus, they are all that there is.
    """
    devices = [device for device in display_devices(root) if device.vendor == NVIDIA]
    found = [_gpu(root, device.address, device.driver) for device in devices]
    served = [gpu for gpu in found if gpu["driver"] == "nvidia"]
    driver_sees = driver_sees or []
    if not found:
        return [_without_bus(gpu) for gpu in driver_sees]
    # nvidia-smi counts in the bus's order too.
    if len(served) == len(driver_sees):
        for gpu, seen in zip(served, driver_sees):  # noqa: B905 (same length)
            gpu["name"], gpu["memory_gib"] = seen.name, round(seen.memory_total_gib, 2)
    return found


def iommu(root: Path, gpus: list[dict]) -> dict:
    """Whether the IOMMU is on, and whether ACS puts each GPU into a group of its own (None: no two GPUs, or no IOMMU)."""
    folder = root / "sys/kernel/iommu_groups"
    enabled = folder.is_dir() and any(folder.iterdir())
    groups = [gpu["iommu_group"] for gpu in gpus if gpu["iommu_group"] is not None]
    told = enabled and len(groups) > 1
    return {"enabled": enabled, "acs_separated": len(set(groups)) == len(groups) if told else None}


def nouveau(root: Path, gpus: list[dict]) -> dict:
    """The kernel's own driver, which must go before NVIDIA's can come."""
    bound = [gpu["address"] for gpu in gpus if gpu["driver"] == "nouveau"]
    return {"loaded": (root / "sys/module/nouveau").is_dir(), "bound": bound}


def _gpu(root: Path, address: str, driver: str | None) -> dict:
    device = root / "sys/bus/pci/devices" / address
    device_id = number(read(device / "device"), 0) or 0
    name, memory_gib = gpu_table.card(device_id, number(read(device / "subsystem_device"), 0))
    architecture = gpu_table.architecture(device_id)
    group = link_name(device / "iommu_group")
    # The slot may have fewer lanes than the card, so the port above it counts too, and every switch on the way.
    way = [device, *_ports_above(device)]
    widths = [number(read(part / "max_link_width")) for part in way]
    speeds = [_generation(read(part / "max_link_speed")) for part in way]
    return {
        "address": address,
        "device_id": f"{device_id:04x}",
        "name": name or _pci_ids_name(root, device_id) or f"NVIDIA device 10de:{device_id:04x}",
        "memory_gib": memory_gib,
        "architecture": architecture,
        "driver": driver,
        "link_width": _lanes(number(read(device / "current_link_width"))),
        "link_width_max": min(filter(None, map(_lanes, widths)), default=None),
        "link_generation": _generation(read(device / "current_link_speed")),
        "link_generation_max": min(filter(None, speeds), default=None),
        "bar_gib": _largest_bar_gib(read(device / "resource")),
        "iommu_group": group,
        "iommu_group_size": _group_size(root, group),
        "boot_vga": read(device / "boot_vga") == "1",
        "open_modules": gpu_table.open_modules(architecture),
    }


def _without_bus(seen: Gpu) -> dict:
    """A GPU of WSL2: Windows has the device and the driver."""
    architecture = gpu_table.architecture_of_capability(seen.compute_capability)
    unknown = (
        "device_id",
        "link_width",
        "link_width_max",
        "link_generation",
        "link_generation_max",
        "bar_gib",
    )
    return dict.fromkeys((*unknown, "iommu_group", "iommu_group_size")) | {
        "address": seen.uuid,
        "name": seen.name,
        "memory_gib": round(seen.memory_total_gib, 2),
        "architecture": architecture,
        "driver": "nvidia",
        "boot_vga": False,
        "open_modules": gpu_table.open_modules(architecture),
    }


def _ports_above(device: Path) -> list[Path]:
    """The bridges between a device and the root complex, nearest first."""
    ports = []
    for folder in device.resolve().parents:
        if not (folder / "max_link_width").is_file():
            break
        ports.append(folder)
    return ports


def _lanes(width: int | None) -> int | None:
    """sysfs writes 0 or 255 where the link is down or says nothing."""
    return width if width and width <= 32 else None


def _generation(speed: str) -> int | None:
    rate = re.match(r"[\d.]+", speed)
    return GENERATIONS.get(float(rate[0])) if rate else None


def _largest_bar_gib(resource: str) -> float | None:
    """GiB of the largest prefetchable window: 0.25 without resizable BAR, at least the card's memory with it."""
    sizes = []
    for line in resource.splitlines()[:BARS]:
        start, end, flags = ([number(word, 16) or 0 for word in line.split()] + [0, 0, 0])[:3]
        if flags & MEMORY_BAR and flags & PREFETCHABLE and end > start:
            sizes.append(end - start + 1)
    return round(max(sizes) / GIB, 3) if sizes else None


def _group_size(root: Path, group: str | None) -> int | None:
    if group is None:
        return None
    devices = root / "sys/kernel/iommu_groups" / group / "devices"
    return sum(1 for _ in devices.iterdir()) if devices.is_dir() else None


def _pci_ids_name(root: Path, device_id: int) -> str | None:
    """The name in the PCI database, where the host has it: "GA102 [GeForce RTX 3090]" becomes "NVIDIA GeForce RTX 3090"."""
    ours = False
    for line in read(inside(root, "/usr/share/misc/pci.ids")).splitlines():
        if line[:1] not in ("\t", "#", ""):
            ours = line.startswith("10de ")
        elif ours and line.startswith(f"\t{device_id:04x} "):
            name = line.split(None, 1)[1]
            marketed = re.search(r"\[(.+)\]", name)
            return f"NVIDIA {marketed[1] if marketed else name}"
    return None
