"""Which disk holds a folder, and of what kind it is."""

from __future__ import annotations

import os
from pathlib import Path

from recipe.hardware import text_of

NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "fuse.sshfs", "virtiofs")


def kind_of(folder: Path, root: Path = Path("/")) -> str:
    """`nvme`, `ssd`, `rotational`, `virtual`, `network`, `memory` or `unknown`: the disk that holds a folder."""
    folder = existing(folder)
    number = folder.stat().st_dev
    best, system = "", ""
    for line in text_of(root / "proc/self/mounts").splitlines():
        words = line.split()
        place = words[1].replace("\\040", " ")
        if len(place) >= len(best) and (folder == Path(place) or Path(place) in folder.parents):
            best, system = place, words[2]
    if system in NETWORK:
        return "network"
    if system in ("tmpfs", "ramfs"):
        return "memory"
    block = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not block.exists():
        return "unknown"
    device = block.resolve()
    # A partition's queue is its disk's.
    disk = device if (device / "queue").is_dir() else device.parent
    turning = text_of(disk / "queue/rotational").strip()
    if disk.name.startswith("nvme"):
        return "nvme"
    if disk.name.startswith(("vd", "xvd")):  # a virtual machine's says `rotational` whatever lies below
        return "virtual"
    return {"0": "ssd", "1": "rotational"}.get(turning, "unknown")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
