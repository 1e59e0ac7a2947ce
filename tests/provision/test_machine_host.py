"""What library/machine.py says of the system: release, Secure Boot, loaded driver, desktop; and all of a host at once."""

import json
import os

import pytest

from tests.provision.fake_root import (
    REPOSITORY,
    dpkg_root,
    link,
    needs_dpkg,
    nvidia_device,
    put_on_path,
    tree,
)

# isort: split
from ansible.module_utils import machine_host

# What roles and filters are written against.
KEYS = """
    release kernel architecture wsl2 container python cpu ram_gib ram_available_gib swap_gib swaps disks
    gpus amd_gpu iommu secure_boot nouveau driver docker desktop
    installed candidates held headers_for_kernel kernel_package newer_kernel reboot_required
    ours apt apt_lock dpkg_interrupted systemd oomd_active unattended_upgrades group_docker
"""


@pytest.mark.parametrize(
    "values, expected",
    [
        (None, "none"),
        ({}, "off"),
        ({machine_host.SECURE_BOOT: 0}, "off"),
        ({machine_host.SECURE_BOOT: 1, machine_host.SETUP_MODE: 0}, "on"),
        ({machine_host.SECURE_BOOT: 1, machine_host.SETUP_MODE: 1}, "off"),
        ({machine_host.SECURE_BOOT: 1, machine_host.NO_VALIDATION: 1}, "off"),
    ],
)
def test_secure_boot(tmp_path, values, expected):
    if values is not None:
        (tmp_path / machine_host.EFI_VARIABLES).mkdir(parents=True)
        for name, value in values.items():
            tree(tmp_path / machine_host.EFI_VARIABLES, {name: b"\x06\0\0\0" + bytes([value])})
    assert machine_host.secure_boot(tmp_path) == expected


def test_release_kernel_and_container(tmp_path):
    tree(
        tmp_path,
        {
            "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\nVERSION_ID="22.04"\nVERSION_CODENAME=jammy\nID=ubuntu\n',
            "proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n",
            "run/systemd/container": "wsl\n",
        },
    )
    assert machine_host.release(tmp_path) == {
        "id": "ubuntu",
        "version": "22.04",
        "codename": "jammy",
        "name": "Ubuntu 22.04.5 LTS",
    }
    assert machine_host.is_wsl2(machine_host.running_kernel(tmp_path))
    assert machine_host.container(tmp_path) == ""
    assert machine_host.container(tree(tmp_path / "box", {".dockerenv": ""})) == "docker"


@pytest.mark.parametrize(
    "text, version, kind",
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
            "580.95.05",
            "open",
        ),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n",
            "535.183.01",
            "proprietary",
        ),
    ],
)
@needs_dpkg
def test_loaded_driver(tmp_path, text, version, kind):
    dpkg_root(tmp_path, {})
    tree(tmp_path, {"proc/driver/nvidia/version": text})
    found = machine_host.driver(tmp_path, None, "nvidia-smi ended with 9")
    assert (found["loaded"], found["loaded_kind"], found["smi_error"]) == (
        version,
        kind,
        "nvidia-smi ended with 9",
    )


def test_services_desktop_and_groups(tmp_path, monkeypatch):
    put_on_path(
        monkeypatch, tmp_path, systemctl='[ "$1" = is-active ] && printf "active\\ninactive\\n"; exit 3'
    )
    active = machine_host.active_services()
    assert active == ["display-manager.service"]
    tree(
        tmp_path,
        {
            "etc/group": "root:x:0:\ndocker:x:999:ann,bob\n",
            "etc/X11/default-display-manager": "/usr/sbin/gdm3\n",
        },
    )
    assert machine_host.desktop(tmp_path, active) == {"active": True, "manager": "gdm3"}
    link(tmp_path / "etc/systemd/system/display-manager.service", "/lib/systemd/system/sddm.service")
    assert machine_host.desktop(tmp_path, [])["manager"] == "sddm"
    assert machine_host.group_members(tmp_path, "docker") == ["ann", "bob"]
    assert machine_host.group_members(tmp_path, "video") == []


def test_unattended_upgrades_needs_package_and_setting(tmp_path):
    tree(tmp_path, {"etc/apt/apt.conf.d/20auto-upgrades": 'APT::Periodic::Unattended-Upgrade "1";\n'})
    packages = {"unattended-upgrades": ("2.9", "ii")}
    assert machine_host.unattended_upgrades(tmp_path, packages)
    assert not machine_host.unattended_upgrades(tmp_path, {})
    tree(tmp_path, {"etc/apt/apt.conf.d/99off": 'APT::Periodic::Unattended-Upgrade "0";\n'})
    assert not machine_host.unattended_upgrades(tmp_path, packages)


# --- everything -------------------------------------------------------------------------------------------


@needs_dpkg
def test_a_whole_host(tmp_path, monkeypatch):
    put_on_path(
        monkeypatch, tmp_path, nvidia_smi="exit 127", docker="exit 1", systemctl="exit 1", apt_cache="exit 0"
    )
    kernel = "6.8.0-45-generic"
    nvidia_device(tmp_path, "0000:01:00.0", "2204", driver="nouveau", boot_vga="1")
    dpkg_root(
        tmp_path, {f"linux-image-{kernel}": "6.8.0-45.45", "linux-image-6.8.0-50-generic": "6.8.0-50.51"}
    )
    tree(
        tmp_path,
        {
            "proc/sys/kernel/osrelease": kernel,
            "proc/meminfo": "MemTotal: 65536000 kB\nMemAvailable: 60000000 kB\nSwapTotal: 2097152 kB\nSwapFree: 2097152 kB\n",
            "proc/cpuinfo": "model name\t: AMD Ryzen 9 5950X\n",
            f"lib/modules/{kernel}/build/Makefile": "",
            "etc/os-release": 'ID=ubuntu\nVERSION_ID="24.04"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n',
        },
    )
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    machine = machine_host.inspect(tmp_path, ["/srv/models"], ["earlyoom"])
    json.dumps(machine)
    assert machine["kernel"] == kernel and machine["kernel_package"] == f"linux-image-{kernel}"
    assert machine["headers_for_kernel"] and machine["systemd"] and not machine["wsl2"]
    assert machine["newer_kernel"] == "6.8.0-50-generic" and machine["reboot_required"]
    assert (machine["ram_gib"], machine["swap_gib"]) == (62.5, 2.0)
    assert machine["nouveau"]["bound"] == ["0000:01:00.0"] and machine["secure_boot"] == "none"
    assert list(machine["disks"]) == ["/srv/models", machine["docker"]["data_root"]]
    assert sorted(machine) == sorted(KEYS.split())


def test_the_shared_hardware_file_is_the_recipes_own():
    shared = REPOSITORY / "ansible/module_utils/hardware.py"
    assert os.readlink(shared) == "../../recipe/hardware.py"
