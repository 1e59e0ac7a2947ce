"""Checks of the host: each is fine on a machine that is right, and fails once for each thing it is there for."""

import os

import pytest

from recipe.preflight import disks, host, system
from recipe.preflight.tasks import tasks
from recipe.probe import PROBE_FILE, read_probe
from tests.preflight.situation import HOST, PATH, context, found_broken

LARGE = {"model": "meta-llama/Llama-3.1-70B"}
OFFLOADED = {"compute": {"offload_layers": 8, "keep_layers": 0}}
# A tenth more than the plan needs.
THIN = context().plan.ram_needed_gib * 1.1
ZRAM = [{"path": "/dev/zram0", "kind": "zram", "gib": 16.0, "priority": 100}]


def folder_of_another_user(folder, monkeypatch):
    """Root may write everywhere, but not where the question is what another user may."""
    places = {"models": str(folder / "models"), "runs": str(folder / "runs")}
    yield context(paths=places)
    mode, user = folder.stat().st_mode, os.getuid()
    folder.chmod(0o555)
    if user == 0:
        os.setresuid(65534, -1, -1)
    try:
        yield context(paths=places)
    finally:
        if user == 0:
            os.setresuid(0, -1, -1)
        folder.chmod(mode)


# check, what is broken, the status it must give, parts of what it found and of its remedy
BROKEN = {
    "platform": (host.platform, {"machine": {"system": "Darwin"}}, "fail", "x86_64", "Linux machine"),
    "old python": (host.python, {"machine": {"python": "3.10.2"}}, "fail", "3.10.2", "make setup"),
    "new python": (host.python, {"machine": {"python": "3.15.0"}}, "fail", "3.15.0", "make setup"),
    "cores": (host.cores, {"machine": {"cores": 1}}, "warn", "1 (CPU)", "compute.processes"),
    "few tasks": (host.tasks, {"tasks": {"limit": 300, "used": 100}}, "warn", "200 left of 300", "--pids-limit"),
    "ram": (host.ram, {"machine": {"ram_total_gib": 4.0}}, "fail", "of 4.0", "add RAM"),
    "container limit": (
        host.ram,
        {"machine": {"ram_limit_gib": 3.0}},
        "fail",
        "container limit",
        "container's memory",
    ),
    "ram taken": (
        host.ram,
        {"machine": {"ram_available_gib": 3.0}},
        "warn",
        "3.0 GiB available",
        "close other",
    ),
    "no swap": (
        host.swap,
        {"machine": {"swap_total_gib": 0.0, "swap_free_gib": 0.0, "ram_available_gib": THIN}},
        "warn",
        "0.0 GiB",
        "add swap",
    ),
    "swapping": (host.swap, {"machine": {"swap_free_gib": 1.0}}, "warn", "7.0 used", "RAM is short already"),
    "shm": (host.shm, {"machine": {"shm_total_gib": 0.0625}}, "fail", "0.06 GiB", "--shm-size"),
    "no shm": (host.shm, {"machine": {"shm_total_gib": None}}, "fail", "missing", "--shm-size"),
    "full disk": (host.disk, {"model": "demo", "paths": {"models": "/proc"}}, "fail", "0.0 GiB free in /proc", "paths.models"),
    "slow disk": (host.disk_speed, LARGE | {"disk": {"kind": "rotational", "read_gib_per_second": 0.12}}, "warn",
                  "rotational: 0.12 GiB/s", "NVMe"),
    "turning disk not measured": (host.disk_speed, {"disk": {"skipped": "quick", "kind": "rotational"}}, "warn",
                                   "rotational", "NVMe"),
    "disk errors": (host.disk_speed, {"disk": {"error": "models: input/output error", "kind": "ssd"}}, "fail",
                    "input/output error", "dmesg"),
    "zram": (system.swap_kind, OFFLOADED | {"host": {"swap": ZRAM}}, "warn", "zram of 16.0", "swap file"),
    "memlock": (system.memlock, OFFLOADED | {"host": {"limits": {"memlock_bytes": 8 * 2**20, "overcommit": 0}}},
                "warn", "0.01 GiB", "memlock"),
    "overcommit": (system.overcommit, {"host": {"limits": {"memlock_bytes": None, "overcommit": 2}}}, "fail", "2",
                   "vm.overcommit_memory=0"),
    "two nodes": (system.numa, {"host": {"gpu_paths": [PATH, PATH | {"numa_node": 1}]}}, "warn", "nodes 0, 1",
                  "slots of one CPU"),
    "oom": (system.kernel_log, {"host": {"kernel_log": [{"kind": "oom", "seconds": 1.0, "text": "Out of memory: Killed"}]}},
            "warn", "Out of memory", "make plan"),
    "machine check": (system.kernel_log, {"host": {"kernel_log": [{"kind": "mce", "seconds": 1.0, "text": "mce: x"}]}},
                      "warn", "mce: x", "memtest86+"),
    "pcie error": (system.kernel_log, {"host": {"kernel_log": [{"kind": "aer", "seconds": 1.0, "text": "AER: y"}]}},
                   "warn", "AER: y", "reseat"),
    "failed unit": (system.services, {"host": {"units": {"states": {}, "failed": ["nvidia-persistenced.service"]}}},
                    "warn", "nvidia-persistenced.service", "systemctl status"),
    "stopped daemon": (system.services,
                       {"host": {"units": {"states": {"nvidia-persistenced": "inactive"}, "failed": []}}},
                       "warn", "is inactive", "enable --now"),
    "early oom": (system.services,
                  OFFLOADED | {"host": {"units": {"states": {"earlyoom": "active"}, "failed": []}}},
                  "warn", "earlyoom active", "systemctl stop earlyoom"),
    "old docker": (system.docker, {"host": {"docker": {"engine": "20.10.24", "why": None, "toolkit": "1.17"}}},
                   "warn", "engine 20.10.24", "make provision"),
    "no toolkit": (system.docker, {"host": {"docker": {"engine": "26.1.5", "why": None, "toolkit": None}}},
                   "warn", "toolkit missing", "nvidia-container-toolkit"),
    "docker is down": (system.docker, {"host": {"docker": {"engine": None, "why": "Cannot connect", "toolkit": None}}},
                       "warn", "Cannot connect", "systemctl start docker"),
    "folder of another user": (system.user, folder_of_another_user, "fail", "may not be written by user", "chown"),
    "wrong clock": (system.clock, {"host": {"clock": False}}, "warn", "not synchronised", "set-ntp true"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy, tmp_path, monkeypatch):
    found_broken(check, broken, status, found, remedy, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "check", [c for c in system.CHECKS if c is not system.user], ids=lambda c: c.__name__
)
def test_what_the_host_does_not_tell_is_skipped_with_the_reason(check):
    """A container without the host's probe, and a host whose parts are missing one by one."""
    assert (check(context(host="no probe")).status, check(context(host="no probe")).found[:8]) == (
        "skip",
        "no probe",
    )
    missing = check(context(host=dict.fromkeys(HOST, "is not readable")))
    assert missing.status == "skip" and "is not readable" in missing.found


def test_the_containers_own_memlock_counts(monkeypatch):
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:0")
    monkeypatch.setattr(system.resource, "getrlimit", lambda which: (2**20, 2**20))
    assert system.memlock(context(**OFFLOADED)).status == "warn"
    monkeypatch.setattr(system.resource, "getrlimit", lambda which: (system.resource.RLIM_INFINITY,) * 2)
    limits = {"memlock_bytes": 1, "overcommit": 0}
    assert system.memlock(context(host={"limits": limits}, **OFFLOADED)).status == "ok"


def test_a_full_disk_is_found_for_each_disk(tmp_path, monkeypatch):
    paths = {"models": str(tmp_path / "models"), "runs": str(tmp_path / "runs")}
    monkeypatch.setattr(host, "disk_free_gib", lambda folder: 1.0)
    one = host.disk(context(paths=paths))
    assert one.status == "fail" and one.found.count("GiB free") == 1 and "paths.models" in one.remedy
    monkeypatch.setattr(host, "_device_of", lambda folder: hash(folder.name))
    assert host.disk(context(paths=paths)).found.count("GiB free") == 2
    monkeypatch.setattr(host, "disk_free_gib", lambda folder: 900.0)
    assert host.disk(context(paths=paths)).status == "ok"


def test_the_tightest_group_counts(tmp_path):
    assert tasks(tmp_path) == {}
    places = {"": ("max", "900"), "user.slice": ("1000", "900"), "user.slice/job": ("500", "20")}
    for place, (limit, used) in places.items():
        folder = tmp_path / "sys/fs/cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pids.max").write_text(f"{limit}\n")
        (folder / "pids.current").write_text(f"{used}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/job\n")
    assert tasks(tmp_path) == {"limit": 1000, "used": 900}
    (tmp_path / "sys/fs/cgroup/user.slice/pids.max").write_text("max\n")
    assert tasks(tmp_path) == {"limit": 500, "used": 20}


@pytest.mark.parametrize(
    ("mount", "name", "turning", "kind"),
    [
        ("ext4", "nvme0n1", "0", "nvme"),
        ("ext4", "sda", "0", "ssd"),
        ("ext4", "sda", "1", "rotational"),
        ("ext4", "vda", "1", "virtual"),
        ("nfs4", "", "", "network"),
        ("tmpfs", "", "", "memory"),
        ("overlay", "", "", "unknown"),
    ],
)
def test_the_kind_of_a_disk(tmp_path, mount, name, turning, kind):
    """A partition's kind is its disk's."""
    root, folder = tmp_path / "root", tmp_path / "models"
    folder.mkdir()
    number = folder.stat().st_dev
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mounts").write_text(f"/dev/x / {mount} rw 0 0\n")
    (root / "sys/dev/block").mkdir(parents=True)
    if name:
        (root / f"sys/devices/{name}/queue").mkdir(parents=True)
        (root / f"sys/devices/{name}/queue/rotational").write_text(turning)
        (root / f"sys/devices/{name}/{name}1").mkdir()
        link = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
        link.symlink_to(root / f"sys/devices/{name}/{name}1")
    assert disks.kind_of(folder / "not" / "yet", root) == kind


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "cannot be read"),
        ("{", "is not what"),
        ('{"time": 1}', "is not what"),
        ('{"time": 1, "parts": {}}', "minutes old"),
    ],
)
def test_a_probe_that_does_not_count_says_why(tmp_path, monkeypatch, text, part):
    file = tmp_path / "host-probe.json"
    if text is not None:
        file.write_text(text)
    assert part in read_probe(file)["why"]
    monkeypatch.setenv(PROBE_FILE, str(file))
    made = context()
    del made.__dict__["host"]
    result = system.overcommit(made)
    assert result.status == "skip" and part in result.found


def test_a_container_without_a_probe_does_not_speak_for_its_host(monkeypatch):
    monkeypatch.delenv(PROBE_FILE, raising=False)
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:0")
    made = context()
    del made.__dict__["host"]
    assert "handed in no probe" in made.host["why"]
