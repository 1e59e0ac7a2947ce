"""What library/machine.py says of folders: file system, kind of disk through partitions, LUKS, LVM and RAID; and of swap."""

import shutil

import pytest

from tests.provision.fake_root import GIB, block, link, mount, tree

# isort: split
from ansible.module_utils import machine_disks


def test_kind_of_disk_through_partition_luks_lvm_and_raid(tmp_path):
    nvme = block(tmp_path, "nvme0n1", "259:0", queue__rotational="0")
    tree(nvme / "nvme0n1p2", {"partition": "2"})
    link(tmp_path / "sys/dev/block/259:2", nvme / "nvme0n1p2")
    luks, lvm = block(tmp_path, "dm-0", "252:0"), block(tmp_path, "dm-1", "252:1", queue__rotational="0")
    link(luks / "slaves/nvme0n1p2", nvme / "nvme0n1p2")
    link(lvm / "slaves/dm-0", luks)
    sda = block(tmp_path, "sda", "8:0", queue__rotational="0", device__vendor="ATA")
    sdb = block(tmp_path, "sdb", "8:16", queue__rotational="1", device__vendor="ATA")
    raid = block(tmp_path, "md0", "9:0")
    link(raid / "slaves/sda", sda)
    link(raid / "slaves/sdb", sdb)
    block(tmp_path, "vda", "254:0", queue__rotational="1")
    block(
        tmp_path,
        "sdc",
        "8:32",
        queue__rotational="1",
        device__vendor="Msft    ",
        device__model="Virtual Disk",
    )
    mount(tmp_path, "/", "252:1", "ext4", "/dev/mapper/vg-root")
    mount(tmp_path, "/raid", "9:0", "xfs", "/dev/md0")
    mount(tmp_path, "/sata", "8:0", "ext4", "/dev/sda")
    mount(tmp_path, "/with\\040blank", "8:16", "ext4", "/dev/sdb")
    mount(tmp_path, "/virtual", "254:0", "ext4", "/dev/vda")
    mount(tmp_path, "/hyper-v", "8:32", "ext4", "/dev/sdc")
    mount(tmp_path, "/net", "0:50", "nfs4", "server:/export")
    mount(tmp_path, "/dev/shm", "0:24", "tmpfs", "tmpfs")
    mount(tmp_path, "/btrfs", "0:33", "btrfs", "/dev/nvme0n1")  # its number is no device's
    kinds = {
        "/srv/models/not/yet": "nvme",
        "/raid/models": "hdd",  # as slow as its slowest
        "/raider": "nvme",  # not below /raid
        "/sata": "ssd",
        "/with blank/models": "hdd",
        "/virtual": "other",
        "/hyper-v": "other",
        "/net/models": "network",
        "/dev/shm/models": "memory",
        "/btrfs": "nvme",
    }
    found = machine_disks.disks(tmp_path, list(kinds))
    assert {folder: disk["kind"] for folder, disk in found.items()} == kinds
    assert found["/raid/models"]["mount"] == "/raid" and found["/raid/models"]["device"] == "/dev/md0"
    assert found["/srv/models/not/yet"]["filesystem"] == "ext4"
    assert found["/srv/models/not/yet"]["free_gib"] == pytest.approx(
        shutil.disk_usage(tmp_path).free / GIB, abs=0.5
    )


def test_a_link_to_another_disk_is_followed(tmp_path):
    block(tmp_path, "sdb", "8:16", queue__rotational="1")
    mount(tmp_path, "/", "0:1", "overlay", "overlay")
    mount(tmp_path, "/data", "8:16", "ext4", "/dev/sdb")
    link(tmp_path / "models", tmp_path / "data")
    found = machine_disks.disks(tmp_path, ["/models/new", "/"])
    assert found["/models/new"]["mount"] == "/data"
    assert (found["/"]["kind"], found["/"]["filesystem"]) == ("other", "overlay")


def test_the_last_of_two_mounts_on_one_folder_counts(tmp_path):
    block(tmp_path, "sda", "8:0", queue__rotational="1")
    block(tmp_path, "nvme0n1", "259:0", queue__rotational="0")
    mount(tmp_path, "/data", "8:0", "ext4", "/dev/sda")
    mount(tmp_path, "/data", "259:0", "ext4", "/dev/nvme0n1")
    assert machine_disks.disks(tmp_path, ["/data/x"])["/data/x"]["kind"] == "nvme"


def test_swaps(tmp_path):
    table = "Filename\tType\tSize\tUsed\tPriority\n/swap\\040file  file  8388604 0 -2\n/dev/zram0 partition 2097152 0 100\n"
    tree(tmp_path, {"proc/swaps": table})
    assert machine_disks.swaps(tmp_path) == [
        {"path": "/swap file", "type": "file", "size_gib": 8.0},
        {"path": "/dev/zram0", "type": "partition", "size_gib": 2.0},
    ]
    assert machine_disks.swaps(tmp_path / "none") == []
