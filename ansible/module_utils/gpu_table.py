"""NVIDIA's cards by their PCI device id: name, memory, architecture, and which kernel modules can drive them.

A bare host has no driver that would tell. Ids and names: pci.ids (pciutils) of 2026-08 and the README of NVIDIA's
open-gpu-kernel-modules 595; memory in GiB as sold. None: one id is used for cards of several sizes.
"""

from __future__ import annotations

# Cards that people own and servers rent; what is not here still gets its architecture, by its id's range.
CARDS: dict[int, tuple[str, int | None]] = {
    # Volta and before: what people ask about; CUDA 13 has no code for them
    0x1B06: ("NVIDIA GeForce GTX 1080 Ti", 11),
    0x1B38: ("Tesla P40", 24),
    0x1D81: ("NVIDIA TITAN V", 12),
    0x1DB4: ("Tesla V100-PCIE-16GB", 16),
    0x1DB6: ("Tesla V100-PCIE-32GB", 32),
    # Turing
    0x1E02: ("NVIDIA TITAN RTX", 24),
    0x1E03: ("NVIDIA GeForce RTX 2080 Ti", 12),
    0x1E04: ("NVIDIA GeForce RTX 2080 Ti", 11),
    0x1E07: ("NVIDIA GeForce RTX 2080 Ti", 11),
    0x1E30: ("Quadro RTX 6000/8000", None),
    0x1E36: ("Quadro RTX 6000", 24),
    0x1E78: ("Quadro RTX 6000/8000", None),
    0x1E81: ("NVIDIA GeForce RTX 2080 SUPER", 8),
    0x1E82: ("NVIDIA GeForce RTX 2080", 8),
    0x1E84: ("NVIDIA GeForce RTX 2070 SUPER", 8),
    0x1E87: ("NVIDIA GeForce RTX 2080", 8),
    0x1E89: ("NVIDIA GeForce RTX 2060", 6),
    0x1EB0: ("Quadro RTX 5000", 16),
    0x1EB1: ("Quadro RTX 4000", 8),
    0x1EB8: ("Tesla T4", 16),
    0x1EC2: ("NVIDIA GeForce RTX 2070 SUPER", 8),
    0x1EC7: ("NVIDIA GeForce RTX 2070 SUPER", 8),
    0x1F02: ("NVIDIA GeForce RTX 2070", 8),
    0x1F03: ("NVIDIA GeForce RTX 2060", 12),
    0x1F06: ("NVIDIA GeForce RTX 2060 SUPER", 8),
    0x1F07: ("NVIDIA GeForce RTX 2070", 8),
    0x1F08: ("NVIDIA GeForce RTX 2060", 6),
    0x1F42: ("NVIDIA GeForce RTX 2060 SUPER", 8),
    0x1F47: ("NVIDIA GeForce RTX 2060 SUPER", 8),
    0x1F82: ("NVIDIA GeForce GTX 1650", 4),
    0x2182: ("NVIDIA GeForce GTX 1660 Ti", 6),
    0x2184: ("NVIDIA GeForce GTX 1660", 6),
    0x2187: ("NVIDIA GeForce GTX 1650 SUPER", 4),
    0x21C4: ("NVIDIA GeForce GTX 1660 SUPER", 6),
    # Ampere
    0x20B0: ("NVIDIA A100-SXM4-40GB", 40),
    0x20B1: ("NVIDIA A100-PCIE-40GB", 40),
    0x20B2: ("NVIDIA A100-SXM4-80GB", 80),
    0x20B3: ("NVIDIA A100-SXM-64GB", 64),
    0x20B5: ("NVIDIA A100 80GB PCIe", 80),
    0x20B7: ("NVIDIA A30", 24),
    0x20F1: ("NVIDIA A100-PCIE-40GB", 40),
    0x20F3: ("NVIDIA A800-SXM4-80GB", 80),
    0x20F5: ("NVIDIA A800 80GB PCIe", 80),
    0x20F6: ("NVIDIA A800 40GB Active", 40),
    0x2203: ("NVIDIA GeForce RTX 3090 Ti", 24),
    0x2204: ("NVIDIA GeForce RTX 3090", 24),
    0x2206: ("NVIDIA GeForce RTX 3080", 10),
    0x2207: ("NVIDIA GeForce RTX 3070 Ti", 8),
    0x2208: ("NVIDIA GeForce RTX 3080 Ti", 12),
    0x220A: ("NVIDIA GeForce RTX 3080", 12),
    0x2216: ("NVIDIA GeForce RTX 3080", 10),
    0x2230: ("NVIDIA RTX A6000", 48),
    0x2231: ("NVIDIA RTX A5000", 24),
    0x2232: ("NVIDIA RTX A4500", 20),
    0x2233: ("NVIDIA RTX A5500", 24),
    0x2235: ("NVIDIA A40", 48),
    0x2236: ("NVIDIA A10", 24),
    0x2237: ("NVIDIA A10G", 24),
    0x2414: ("NVIDIA GeForce RTX 3060 Ti", 8),
    0x2482: ("NVIDIA GeForce RTX 3070 Ti", 8),
    0x2484: ("NVIDIA GeForce RTX 3070", 8),
    0x2486: ("NVIDIA GeForce RTX 3060 Ti", 8),
    0x2487: ("NVIDIA GeForce RTX 3060", 12),
    0x2488: ("NVIDIA GeForce RTX 3070", 8),
    0x2489: ("NVIDIA GeForce RTX 3060 Ti", 8),
    0x24B0: ("NVIDIA RTX A4000", 16),
    0x24C9: ("NVIDIA GeForce RTX 3060 Ti", 8),
    0x2503: ("NVIDIA GeForce RTX 3060", 12),
    0x2504: ("NVIDIA GeForce RTX 3060", None),  # 12 GB, or 8 since 2022
    0x2507: ("NVIDIA GeForce RTX 3050", 8),
    0x2531: ("NVIDIA RTX A2000", 6),
    0x2544: ("NVIDIA GeForce RTX 3060", None),
    0x2571: ("NVIDIA RTX A2000 12GB", 12),
    0x2582: ("NVIDIA GeForce RTX 3050", 8),
    0x2584: ("NVIDIA GeForce RTX 3050", 6),
    0x25B0: ("NVIDIA RTX A1000", 8),
    0x25B6: ("NVIDIA A2 / A16", 16),
    # Hopper
    0x2321: ("NVIDIA H100 NVL", 94),
    0x2330: ("NVIDIA H100 80GB HBM3", 80),
    0x2331: ("NVIDIA H100 PCIe", 80),
    0x2335: ("NVIDIA H200", 140),
    0x233B: ("NVIDIA H200 NVL", 140),
    # Ada
    0x2684: ("NVIDIA GeForce RTX 4090", 24),
    0x2685: ("NVIDIA GeForce RTX 4090 D", 24),
    0x2689: ("NVIDIA GeForce RTX 4070 Ti SUPER", 16),
    0x26B1: ("NVIDIA RTX 6000 Ada Generation", 48),
    0x26B2: ("NVIDIA RTX 5000 Ada Generation", 32),
    0x26B3: ("NVIDIA RTX 5880 Ada Generation", 48),
    0x26B5: ("NVIDIA L40", 48),
    0x26B9: ("NVIDIA L40S", 48),
    0x26BA: ("NVIDIA L20", 48),
    0x2702: ("NVIDIA GeForce RTX 4080 SUPER", 16),
    0x2703: ("NVIDIA GeForce RTX 4080 SUPER", 16),
    0x2704: ("NVIDIA GeForce RTX 4080", 16),
    0x2705: ("NVIDIA GeForce RTX 4070 Ti SUPER", 16),
    0x2709: ("NVIDIA GeForce RTX 4070", 12),
    0x2782: ("NVIDIA GeForce RTX 4070 Ti", 12),
    0x2783: ("NVIDIA GeForce RTX 4070 SUPER", 12),
    0x2786: ("NVIDIA GeForce RTX 4070", 12),
    0x2788: ("NVIDIA GeForce RTX 4060 Ti", 8),
    0x27B0: ("NVIDIA RTX 4000 SFF Ada Generation", 20),
    0x27B1: ("NVIDIA RTX 4500 Ada Generation", 24),
    0x27B2: ("NVIDIA RTX 4000 Ada Generation", 20),
    0x27B8: ("NVIDIA L4", 24),
    0x2803: ("NVIDIA GeForce RTX 4060 Ti", 8),
    0x2805: ("NVIDIA GeForce RTX 4060 Ti", 16),
    0x2808: ("NVIDIA GeForce RTX 4060", 8),
    0x2882: ("NVIDIA GeForce RTX 4060", 8),
    0x28B0: ("NVIDIA RTX 2000 Ada Generation", 16),
    # Blackwell
    0x2901: ("NVIDIA B200", 180),
    0x2B85: ("NVIDIA GeForce RTX 5090", 32),
    0x2B87: ("NVIDIA GeForce RTX 5090 D", 32),
    0x2B8C: ("NVIDIA GeForce RTX 5090 D v2", 24),
    0x2BB1: ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96),
    0x2BB3: ("NVIDIA RTX PRO 5000 Blackwell", None),
    0x2BB4: ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 96),
    0x2BB5: ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 96),
    0x2C02: ("NVIDIA GeForce RTX 5080", 16),
    0x2C05: ("NVIDIA GeForce RTX 5070 Ti", 16),
    0x2C31: ("NVIDIA RTX PRO 4500 Blackwell", 32),
    0x2C33: ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", 24),
    0x2C34: ("NVIDIA RTX PRO 4000 Blackwell", 24),
    0x2D04: ("NVIDIA GeForce RTX 5060 Ti", None),  # 8 or 16 GB
    0x2D05: ("NVIDIA GeForce RTX 5060", 8),
    0x2D30: ("NVIDIA RTX PRO 2000 Blackwell", 16),
    0x2D83: ("NVIDIA GeForce RTX 5050", 8),
    0x2F04: ("NVIDIA GeForce RTX 5070", 12),
}

# Where the board's maker decides: (device id, subsystem device id).
BOARDS: dict[tuple[int, int], tuple[str, int]] = {
    (0x1E30, 0x129E): ("Quadro RTX 8000", 48),
    (0x1E30, 0x12BA): ("Quadro RTX 6000", 24),
    (0x1E78, 0x13D8): ("Quadro RTX 8000", 48),
    (0x1E78, 0x13D9): ("Quadro RTX 6000", 24),
    (0x2BB3, 0x204D): ("NVIDIA RTX PRO 5000 Blackwell", 48),
    (0x2BB3, 0x227A): ("NVIDIA RTX PRO 5000 72GB Blackwell", 72),
}

# First device id of each range, from the newest; a range ends where the one above it begins.
RANGES = [
    (0x3400, "newer"),
    (0x3100, "Blackwell"),  # GB110 and its kin: B300
    (0x3000, "newer"),  # Rubin
    (0x2900, "Blackwell"),
    (0x2600, "Ada"),
    (0x2400, "Ampere"),
    (0x2300, "Hopper"),
    (0x2200, "Ampere"),
    (0x2180, "Turing"),  # GTX 16xx
    (0x2080, "Ampere"),  # GA100
    (0x1E00, "Turing"),
    (0x1D80, "Volta"),
    (0x1B00, "Pascal"),
    (0x1580, "Pascal"),  # GP100, then some of GP102 to GP108 from 0x1B00 on
    (0x1340, "Maxwell"),
]
# On WSL2 there is no PCI device, but the driver tells the compute capability.
CAPABILITIES = [
    ((10, 0), "Blackwell"),
    ((9, 0), "Hopper"),
    ((8, 9), "Ada"),
    ((8, 0), "Ampere"),
    ((7, 5), "Turing"),
    ((7, 0), "Volta"),
    ((6, 0), "Pascal"),
    ((5, 0), "Maxwell"),
]
# NVIDIA's open kernel modules need the GPUs' own system processor, which came with Turing; RTX 50 has no other modules.
OPEN_ONLY = ("Blackwell", "newer")
OPEN_TOO = ("Turing", "Ampere", "Hopper", "Ada")


def card(device_id: int, subsystem_device_id: int | None = None) -> tuple[str | None, int | None]:
    """Name and memory (GiB) of a card; None for what the id does not tell."""
    return BOARDS.get((device_id, subsystem_device_id or 0)) or CARDS.get(device_id) or (None, None)


def architecture(device_id: int) -> str:
    """Maxwell to Blackwell, `older` or `newer`."""
    return next((name for first, name in RANGES if device_id >= first), "older")


def architecture_of_capability(capability: tuple[int, int] | None) -> str:
    """The same, from CUDA's compute capability; an unknown one is taken for the newest."""
    if capability is None:
        return "newer"
    return next((name for first, name in CAPABILITIES if tuple(capability) >= first), "older")


def open_modules(architecture_name: str) -> str:
    """`needed`, `possible` or `impossible`: whether NVIDIA's open kernel modules drive it."""
    if architecture_name in OPEN_ONLY:
        return "needed"
    return "possible" if architecture_name in OPEN_TOO else "impossible"
