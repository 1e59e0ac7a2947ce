"""Hosts that ansible/filter_plugins/verdicts.py judges in the tests, and how they look at one check of them."""

import copy
import importlib.util
import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def load_filters() -> dict:
    """By its path and under another name, as Ansible does."""
    file = REPOSITORY / "ansible/filter_plugins/verdicts.py"
    spec = importlib.util.spec_from_file_location("verdicts_filters", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()


FILTERS = load_filters()

# Facts of two hosts, shortened: a bare Ubuntu 22.04 with two RTX 3090 under nouveau, and a 24.04 that is ready.
UBUNTU_22 = json.loads("""
{"release": {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04.5 LTS"},
 "kernel": "5.15.0-119-generic", "kernel_package": "linux-image-5.15.0-119-generic", "architecture": "x86_64",
 "wsl2": false, "container": "", "systemd": true, "ram_gib": 62.7, "ram_available_gib": 60.1, "swap_gib": 2.0,
 "swaps": [{"path": "/swap.img", "type": "file", "size_gib": 2.0}],
 "disks": {"/srv/models": {"free_gib": 800, "filesystem": "ext4", "device": "/dev/nvme0n1p2", "mount": "/", "kind": "nvme"},
           "/srv/runs": {"free_gib": 800, "filesystem": "ext4", "device": "/dev/nvme0n1p2", "mount": "/", "kind": "nvme"}},
 "gpus": [
  {"address": "0000:01:00.0", "device_id": "2204", "name": "NVIDIA GeForce RTX 3090", "memory_gib": 24,
   "architecture": "Ampere", "driver": "nouveau", "link_width": 16, "link_width_max": 16, "link_generation": 1,
   "link_generation_max": 4, "bar_gib": 32, "iommu_group": "1", "iommu_group_size": 2, "boot_vga": true,
   "open_modules": "possible"},
  {"address": "0000:02:00.0", "device_id": "2204", "name": "NVIDIA GeForce RTX 3090", "memory_gib": 24,
   "architecture": "Ampere", "driver": "nouveau", "link_width": 4, "link_width_max": 4, "link_generation": 1,
   "link_generation_max": 3, "bar_gib": 32, "iommu_group": "2", "iommu_group_size": 2, "boot_vga": false,
   "open_modules": "possible"}],
 "amd_gpu": false, "iommu": {"enabled": true, "acs_separated": true}, "secure_boot": "off",
 "nouveau": {"loaded": true, "bound": ["0000:01:00.0", "0000:02:00.0"]},
 "driver": {"loaded": null, "loaded_kind": null, "smi": null, "smi_error": null, "runfile": false, "foreign_sources": []},
 "installed": {"linux-image-5.15.0-119-generic": "5.15.0-119.129"}, "candidates": {}, "held": [],
 "headers_for_kernel": true, "newer_kernel": null, "reboot_required": false,
 "docker": {"version": null, "origin": null, "data_root": "/var/lib/docker", "running": null, "store": null,
            "rootless": false, "settings": {}, "settings_error": null},
 "desktop": {"active": false, "manager": null}, "apt_lock": null, "dpkg_interrupted": false}
""")
UBUNTU_24 = copy.deepcopy(UBUNTU_22) | json.loads("""
{"release": {"id": "ubuntu", "version": "24.04", "codename": "noble", "name": "Ubuntu 24.04.1 LTS"},
 "kernel": "6.8.0-45-generic", "kernel_package": "linux-image-6.8.0-45-generic",
 "nouveau": {"loaded": false, "bound": []}, "secure_boot": "on",
 "driver": {"loaded": "580.95.05", "loaded_kind": "open", "smi": "580.95.05", "smi_error": null, "runfile": false,
            "foreign_sources": []},
 "installed": {"nvidia-headless-580-server-open": "580.95.05-0ubuntu0.24.04.1", "nvidia-utils-580-server": "580.95.05-0ubuntu1"},
 "docker": {"version": "28.2.2", "origin": "distribution", "data_root": "/var/lib/docker", "running": 3,
            "store": "containerd", "rootless": false, "settings": {}, "settings_error": null}}
""")
CHOICES = {
    "driver": {"source": "distribution", "why": "branch 580 is there", "branch": 580, "modules": "open"},
    "docker": {"source": "distribution", "why": "28 is there"},
    "swap": {"kind": "file", "gib": 16, "folder": "/srv/models"},
    "disk": {"/srv/models": 170, "/srv/runs": 10},
    "unreachable": [],
}
PLAN = {
    "fits": True,
    "reasons": [],
    "device": "gpu",
    "world_size": 2,
    "ram_needed_gib": 14.25,
    "vram_needed_gib": 23.99,
    "placement": {"offload_layers": 0, "away_layers": 0},
    "duration": {"tokens_per_second": 100 * 16384 / 5221.0},
}
SETTINGS = {"driver_branch": 580, "gpus_wanted": None, "reboot": "ask"}


def changed(base: dict, changes: dict) -> dict:
    """A copy; a key may be a way into it: `driver.runfile`, `gpus.0.driver`."""
    base = copy.deepcopy(base)
    for way, value in changes.items():
        *parents, last = way.split(".")
        place = base
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[last] = value
    return base


def rows(machine=None, choices=None, plan=PLAN, settings=None, base=UBUNTU_22) -> dict[str, dict]:
    """By check; of several rows of one check the worst."""
    found: dict[str, dict] = {}
    plan = plan if plan is None else copy.deepcopy(plan)
    for row in FILTERS["verdicts"](
        changed(base, machine or {}), changed(CHOICES, choices or {}), plan, SETTINGS | (settings or {})
    ):
        assert row.keys() == {"check", "status", "found", "expected", "remedy"}
        assert all(isinstance(value, str) and "\n" not in value for value in row.values())
        if row["status"] in ("warn", "fail"):
            assert row["expected"] and row["remedy"], row
        if row["status"] == "warn":
            assert "goes on" in row["remedy"] or row["check"] in ("kernel", "secure boot", "driver"), row
        if row["check"] not in found or row["status"] == "fail":
            found[row["check"]] = row
    return found


def one(check: str, *arguments, **keywords) -> tuple[str, str]:
    """Status and the words of one check."""
    row = rows(*arguments, **keywords)[check]
    return row["status"], f"{row['found']}; {row['expected']}; {row['remedy']}"
