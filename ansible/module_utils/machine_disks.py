"""On which file system a folder will lie, how fast the disk under it is, and which swap there is."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.hardware import disk_free_gib
from ansible.module_utils.machine_reading import inside, read

NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "ceph",
    "gluster",
    "lustre",
    "virtiofs",
    "afs",
    "fuse.sshfs",
    "fuse.rclone",
    "fuse.s3",
)
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
# A virtual disk says of itself that it rotates, or not, whatever lies below it.
VIRTUAL_NAMES = re.compile(r"(vd|xvd|loop)")
VIRTUAL_VENDORS = ("msft", "vmware", "qemu", "vbox", "google", "amazon", "virtual")
# A volume over several disks is as slow as the slowest.
SLOWEST_FIRST = ("network", "hdd", "other", "ssd", "nvme", "memory")
DEEPEST = 8  # devices on top of each other: LUKS on LVM on RAID on a partition are four


def disks(root: Path, folders: list[str]) -> dict[str, dict]:
    """For each folder, which need not exist yet: free space, file system, device, mount point, kind of disk."""
    mounts = read_mounts(root)
    return {folder: _disk(root, folder, mounts) for folder in folders}


def swaps(root: Path) -> list[dict]:
    """/proc/swaps: path, type (partition, file), size in GiB; zram is a partition called /dev/zram0."""
    found = []
    for line in read(root / "proc/swaps").splitlines()[1:]:
        path, kind, kib = [*line.split(), "", "", "0"][:3]
        found.append({"path": _unescaped(path), "type": kind, "size_gib": round(int(kib) / 2**20, 2)})
    return found


def read_mounts(root: Path) -> list[dict]:
    """/proc/self/mountinfo, in the order of mounting: {point, device: MAJOR:MINOR, filesystem, source}."""
    mounts = []
    for line in read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 5 and len(right) >= 2:
            mounts.append(
                {
                    "point": _unescaped(left[4]),
                    "device": left[2],
                    "filesystem": right[0],
                    "source": _unescaped(right[1]),
                }
            )
    return mounts


def existing_folder(root: Path, folder: str) -> str:
    """The nearest folder at or above `folder` that exists, links followed, as the machine itself calls it."""
    path = inside(root, folder)
    while not path.exists() and path not in (root, path.parent):
        path = path.parent
    root, path = root.resolve(), path.resolve()
    return "/" + str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _disk(root: Path, folder: str, mounts: list[dict]) -> dict:
    lies_in = existing_folder(root, folder).replace("//", "/")
    # The last of two mounts on one point hides the other.
    above = [m for m in mounts if lies_in == m["point"] or lies_in.startswith(m["point"].rstrip("/") + "/")]
    mount = max(reversed(above), key=lambda m: len(m["point"]), default=None)
    free = round(disk_free_gib(inside(root, lies_in)), 2)
    if mount is None:
        return {"free_gib": free, "filesystem": "", "device": "", "mount": "", "kind": "other"}
    return {
        "free_gib": free,
        "filesystem": mount["filesystem"],
        "device": mount["source"],
        "mount": mount["point"],
        "kind": _mount_kind(root, mount),
    }


def _mount_kind(root: Path, mount: dict) -> str:
    filesystem = mount["filesystem"]
    if filesystem.startswith(NETWORK):
        return "network"
    if filesystem in MEMORY:
        return "memory"
    block = root / "sys/dev/block" / mount["device"]
    if not block.exists() and mount["source"].startswith("/dev/"):
        # btrfs mounts have a number that is no device's, but name one.
        name = inside(root, mount["source"])
        block = root / "sys/class/block" / (name.resolve().name if name.exists() else name.name)
    return _device_kind(block.resolve()) if block.exists() else "other"


def _device_kind(block: Path, depth: int = 0) -> str:
    """The kind of a block device's folder in sysfs: through partitions, and what LUKS, LVM and RAID lie on."""
    name = block.name
    below = block / "slaves"
    slaves = sorted(below.iterdir()) if below.is_dir() else []
    if slaves and depth < DEEPEST:
        return min((_device_kind(slave.resolve(), depth + 1) for slave in slaves), key=SLOWEST_FIRST.index)
    if (block / "partition").is_file() and depth < DEEPEST:
        return _device_kind(block.parent, depth + 1)
    if name.startswith("nvme"):
        return "nvme"
    if name.startswith("zram") or name.startswith("ram"):
        return "memory"
    if name.startswith(("nbd", "rbd", "drbd")):
        return "network"
    vendor = (read(block / "device/vendor") + " " + read(block / "device/model")).lower()
    if VIRTUAL_NAMES.match(name) or any(word in vendor for word in VIRTUAL_VENDORS):
        return "other"
    return {"1": "hdd", "0": "ssd"}.get(read(block / "queue/rotational"), "other")


def _unescaped(path: str) -> str:
    r"""The kernel writes blanks in paths as \040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
