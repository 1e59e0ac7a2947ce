"""What ansible/judging/host.py says of the host, each check once good and once bad; and of whole hosts."""

import pytest

from tests.provision.verdict_cases import CHOICES, FILTERS, PLAN, SETTINGS, UBUNTU_22, UBUNTU_24, one, rows

# --- whole hosts ----------------------------------------------------------------------------------------


def test_a_bare_machine_goes_on():
    found = rows()
    assert {name for name, row in found.items() if row["status"] == "fail"} == set()
    assert {name for name, row in found.items() if row["status"] == "warn"} == {"nouveau"}
    assert "dpkg" not in found and "wsl2" not in found and "desktop" not in found  # nothing to say of these


def test_a_ready_machine_has_nothing_to_say_also_in_a_second_run():
    packages = ["nvidia-headless-580-server-open", "no-such|nvidia-utils-580-server"]
    for source in ("installed", "distribution"):
        choices = {"driver.source": source, "driver.packages": packages, "driver.dkms": True}
        found = rows({"disks": UBUNTU_22["disks"]}, choices, base=UBUNTU_24)
        assert {row["status"] for row in found.values()} == {"ok"}, found
        assert found["driver"]["found"] == "580.95.05 is loaded"
        assert found["docker"]["found"] == "28.2.2 is there"


def test_missing_keys_are_unknown_not_errors():
    found = FILTERS["verdicts"]({}, None, None, None)
    assert {row["status"] for row in found} >= {"fail", "skip"}
    FILTERS["verdicts"](
        {"gpus": [{}, {}]}, {"driver": {"source": "nvidia"}, "disk": {"/x": 3}}, {}, {"driver_branch": "580"}
    )
    assert "" not in FILTERS["verdict_table"](found).splitlines()


@pytest.mark.parametrize(
    "check, machine, status, words",
    [
        ("release", {}, "ok", "Ubuntu 22.04.5 LTS"),
        (
            "release",
            {"release": {"id": "linuxmint", "version": "22", "name": "Linux Mint 22"}},
            "fail",
            "Linux Mint 22; one of Debian 12, Debian 13, Ubuntu 22.04, Ubuntu 24.04",
        ),
        ("architecture", {"architecture": "aarch64"}, "fail", "built for x86_64 only"),
        ("systemd", {"systemd": False}, "fail", "systemd as the first program"),
        ("systemd", {"systemd": False, "wsl2": True}, "fail", "`systemd=true` to /etc/wsl.conf"),
        (
            "apt",
            {"apt_lock": {"pid": 812, "name": "unattended-upgr"}},
            "fail",
            "unattended-upgr (process 812) is installing packages; apt's lock is free; wait",
        ),
        ("dpkg", {"dpkg_interrupted": True}, "warn", "`dpkg --configure -a` is run first"),
        (
            "docker",
            {"docker.version": "28.1", "docker.origin": "other"},
            "fail",
            "`sudo snap remove docker`",
        ),
        ("docker", {"docker.rootless": True}, "fail", "dockerd-rootless-setuptool.sh uninstall"),
        ("docker", {"docker.settings_error": "daemon.json, line 2: Expecting"}, "fail", "line 2"),
    ],
)
def test_one_thing_found_decides(check, machine, status, words):
    found, said = one(check, machine)
    assert found == status and words in said


# --- the system -----------------------------------------------------------------------------------------


def test_a_kernel_that_no_package_brought():
    own = {"kernel_package": None, "headers_for_kernel": False, "kernel": "6.18.1-own"}
    status, words = one("kernel", own)
    assert status == "warn" and "`sudo apt install linux-generic`" in words and "6.18.1-own" in words
    assert one("kernel", own | {"headers_for_kernel": True})[0] == "ok"
    assert one("kernel", own, {"driver.source": "installed"})[0] == "ok"


def test_wsl2():
    machine = {"wsl2": True, "driver.loaded": None, "driver.smi": "581.29"}
    assert "Windows brings the driver" in one("wsl2", machine)[1]
    assert "wsl2" not in rows()
    assert one("driver", machine, {"driver.source": "none"}) == (
        "ok",
        "581.29 of Windows; branch 580 or newer; ",
    )
    status, words = one("driver", machine | {"driver.smi": "551.1"}, {"driver.source": "none"})
    assert status == "fail" and "in Windows" in words


def test_a_pending_reboot():
    machine = {"reboot_required": True, "newer_kernel": "5.15.0-130-generic"}
    assert one("reboot", machine)[0] == "warn"
    status, words = one("reboot", machine | {"headers_for_kernel": False})
    assert status == "fail" and "no headers for 5.15.0-119-generic" in words and "`sudo reboot`" in words
    had = {"headers_for_kernel": False, "candidates": {"linux-headers-5.15.0-119-generic": "5.15.0-119.129"}}
    assert one("reboot", machine | had)[0] == "warn"
    assert one("reboot", machine | {"headers_for_kernel": False}, {"driver.source": "none"})[0] == "warn"


def test_a_kernel_so_old_that_apt_has_no_headers_for_it():
    """A machine that was installed long ago: another boot of the same kernel would not help."""
    old = {"headers_for_kernel": False, "candidates": {"docker.io": "28.2.2"}}
    status, words = one("reboot", old)
    assert status == "fail" and "in apt's sources there are no headers for 5.15.0-119-generic" in words
    assert "`sudo apt full-upgrade` and `sudo reboot` into the newest kernel, then provision again" in words
    for known in ({"headers_for_kernel": True}, {"candidates": {}}, {"kernel_package": None}):
        assert one("reboot", old | known)[0] == "ok", known


# --- memory and disks -----------------------------------------------------------------------------------


def test_ram():
    assert one("ram")[0] == "ok"
    reasons, ways = ["host RAM: 40.0 GiB needed, 31.1 there"], [{"change": "40 GiB of RAM"}]
    plan = PLAN | {"ram_needed_gib": 40.0, "reasons": reasons, "ways": ways, "fits": False}
    status, words = one("ram", {"ram_gib": 31.1}, plan=plan)
    assert status == "fail" and "31.1 GiB; 40.0 GiB for the plan; host RAM: 40.0 GiB needed" in words
    assert words.endswith("31.1 there; would fit: 40 GiB of RAM")
    assert one("ram", settings={"ram_needed_gib": "200"})[0] == "fail"  # instead of the plan's
    assert one("ram", plan=None)[0] == "skip"


def test_swap():
    assert "a file of 16 GiB to come in /srv/models" in one("swap")[1]
    assert one("swap", {"disks./srv/models.filesystem": "zfs"})[0] == "fail"
    assert one("swap", {"disks./srv/models.kind": "hdd"})[0] == "warn"
    assert "zram of 8 GiB" in one("swap", {}, {"swap": {"kind": "zram", "gib": 8}})[1]
    for kind, ours in (("file", "file in /srv/models"), ("zram", "zram")):
        made = {"swap": {"kind": kind, "gib": 8, "folder": "/srv/models", "there": True}}
        said = one("swap", {"swap_gib": 10.0}, made)[1]
        assert said.startswith(f"10.0 GiB there, 8 GiB of it the recipe's {ours};"), said
    none = {"swap": {"kind": "none", "gib": 0}}
    assert one("swap", {}, none)[0] == "ok"
    assert one("swap", {"ram_gib": 15.5, "swap_gib": 0}, none)[0] == "warn"


def test_disk():
    assert one("disk")[1].startswith("800.0 GiB free on /, 180.0 needed for /srv/models and /srv/runs")
    status, words = one("disk", {"disks./srv/models.free_gib": 175})
    assert status == "fail" and "175.0 GiB free on /; 180.0 GiB for /srv/models and /srv/runs" in words
    assert words.endswith("; free some")  # nobody knows which variable named these
    named = {"models_folder": "/srv/models", "runs_folder": "/srv/runs"}
    full = {"disks./srv/models.free_gib": 175}
    assert one("disk", full, settings=named)[1].endswith(
        "free some, or name a folder on a larger disk (`-e models_folder=`, `-e runs_folder=`)"
    )
    swap = {"memory_swap_folder": "/srv/models"}
    words = one("disk", full | {"docker.data_root": "/srv/runs"}, settings=swap)[1]
    assert "`-e memory_swap_gib=`" in words and "`data-root`" in words and "models_folder" not in words
    apart = {"disks./srv/runs.mount": "/srv", "disks./srv/runs.free_gib": 5}
    assert "5.0 GiB free on /srv; 10.0 GiB for /srv/runs" in one("disk", apart)[1]
    status, words = one("disk", {"disks./srv/models.kind": "hdd"}, {"disk": {"/srv/models": 170}})
    assert status == "warn" and "a hard disk" in words
    assert one("disk", {"disks./srv/models.kind": "network"})[0] == "warn"
    assert one("disk", {"disks./srv/models.kind": "memory"})[0] == "fail"
    assert one("disk", {}, {"disk": {"/elsewhere": 1}})[0] == "skip"


# --- packages, Docker, network --------------------------------------------------------------------------


def test_docker():
    assert one("docker")[1].startswith("none is there, Ubuntu 22.04.5 LTS to come")
    assert one("docker", base=UBUNTU_24)[1].startswith("28.2.2 is there")


def test_an_engine_is_not_replaced_under_running_containers():
    old = {"docker.version": "20.10.24", "docker.origin": "distribution", "docker.running": 2}
    status, words = one("docker", old, {"docker.source": "docker"})
    assert status == "fail" and "2 containers run" in words and "`-e docker_replace=true`" in words
    assert one("docker", old, {"docker.source": "docker"}, settings={"docker_replace": True})[0] == "ok"
    assert one("docker", old | {"docker.running": 0}, {"docker.source": "docker"})[0] == "ok"
    assert one("docker", old, {"docker.source": "installed"})[0] == "fail"  # it stays, and is too old


def test_network():
    away = [{"url": "https://download.docker.com/linux/debian/gpg", "for": "Docker", "error": "timed out"}]
    status, words = one("network", {}, {"unreachable": away})
    assert status == "fail"
    assert "no network for Docker: https://download.docker.com/linux/debian/gpg (timed out)" in words
    without = {key: value for key, value in CHOICES.items() if key != "unreachable"}
    assert "network" not in {row["check"] for row in FILTERS["verdicts"](UBUNTU_22, without, PLAN, SETTINGS)}
