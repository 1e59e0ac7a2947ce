"""tests/provision/test_check_mode.py with every option, on Debian 12, Ubuntu 22.04 and 24.04, and in WSL2.

Nothing of Ubuntu or of WSL2 can be had here: those hosts are Debian under another name, with packages that are empty, and what
these tests keep is which names the play chooses there, and that it gets to its end.
"""

import re
import tempfile
from pathlib import Path

import pytest

from tests.provision import lab, standins
from tests.provision.lab import Host
from tests.provision.plays import TWO_CARDS, provision
from tests.provision.standin import vendors
from tests.provision.standin.packages import Package
from tests.provision.test_check_mode import added, all_is_shown, unchanged

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

UBUNTU_KERNEL = "6.8.0-88-generic"
UBUNTU_DRIVER = {"nvidia-headless-580-server-open", "nvidia-utils-580-server", "linux-headers-generic"}
UBUNTU_DRIVER_SIGNED = {
    "linux-modules-nvidia-580-server-open-generic",
    "nvidia-headless-no-dkms-580-server-open",
    "nvidia-utils-580-server",
}
UBUNTU_DOCKER = {"docker.io", "docker-buildx", "docker-compose-v2"}
# What no option brings unasked, each with a part of its own that must know that nothing is there yet.
EVERY_OPTION = {
    "memory_swap": "zram",
    "memory_swap_folder": "/srv",  # in the tests' usual one, /proc/swaps may name a file of another host
    "docker_rootless": True,
    "host_cuda": True,
    "power_limit_watts": 280,
    "power_resume_run": "demo",
    "project_hf_token": "hf_secret",
    "project_image": "build",
    "checks_ignore": ["disk"],
}


def as_kernel(host: Host, release: str, package: str = "") -> None:
    """Have the host take this name for its kernel's; with a package, an empty one, that it came from."""
    if package:
        with tempfile.TemporaryDirectory() as scratch:
            empty = Package(package, "1", files={f"/boot/vmlinuz-{release}": ""}).write(Path(scratch))
            lab.docker("cp", str(empty), f"{host.container}:/opt/standin/kernel.deb")
        host.run("dpkg --install /opt/standin/kernel.deb && rm /opt/standin/kernel.deb")
    host.put("/usr/local/bin/uname", (standins.FILES / "uname").read_text(), 0o755)
    host.put("/opt/standin/osrelease", f"{release}\n")
    host.run("/opt/standin/boot mounts")


def test_all_is_shown_and_nothing_changed_on_bookworm(host, mirror):
    all_is_shown(host("bookworm"), mirror, "bookworm")


def test_every_option_is_shown_and_nothing_changed(host):
    machine = host("bookworm")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    with unchanged(machine):
        shown = provision(machine, "--check", "--diff", **EVERY_OPTION)
    assert {"systemd-zram-generator", "libnccl-dev", "g++"} <= added(shown)
    assert any(name.startswith("cuda-toolkit-13") for name in added(shown))
    assert "hf_secret" not in shown.stdout + shown.stderr


@pytest.mark.parametrize(("version", "release"), [("22.04", "bookworm"), ("24.04", "trixie")])
def test_on_ubuntu_its_own_packages_are_chosen(host, mirror, version, release):
    machine = host(release)
    standins.ubuntu(machine, version)
    standins.gpus(machine, TWO_CARDS, secure_boot=False)
    as_kernel(machine, UBUNTU_KERNEL, f"linux-image-{UBUNTU_KERNEL}")
    mirror.requests.clear()
    with unchanged(machine):
        shown = provision(machine, "--check", "--diff")
    # With Secure Boot, modules that Ubuntu has built and signed.
    standins.gpus(machine, TWO_CARDS, secure_boot=True)
    with unchanged(machine):
        signed = provision(machine, "--check", "--diff", "--tags", "checks,driver")
    assert UBUNTU_DRIVER | UBUNTU_DOCKER | {"earlyoom"} <= added(shown)
    assert f"branch 580 of Ubuntu {version} LTS to come" in shown.stdout
    assert "on; no module is built here" in signed.stdout
    assert added(signed) == UBUNTU_DRIVER_SIGNED
    assert {path for path, _ in mirror.requests} <= {"/ubuntu", "/toolkit/gpgkey"}


def test_on_wsl2_the_driver_stays_with_windows(host):
    machine = host("bookworm")
    standins.gpus(machine, TWO_CARDS, driver="nvidia")
    # No card is on the bus; Windows' own nvidia-smi tells of them.
    smi = (Path(standins.FILES) / "nvidia-smi").read_text().replace("@VERSION@", vendors.DRIVER)
    machine.put("/usr/lib/wsl/lib/nvidia-smi", smi, 0o755)
    as_kernel(machine, "5.15.167.4-microsoft-standard-WSL2")
    machine.run("mkdir /opt/standin/empty && mount --bind /opt/standin/empty /sys/bus/pci/devices")
    with unchanged(machine):
        shown = provision(machine, "--check", "--diff")
    assert "WSL2: Windows brings the driver, so none is installed here" in shown.stdout
    assert f"{vendors.DRIVER} of Windows" in shown.stdout and "2 × NVIDIA GeForce RTX 3090" in shown.stdout
    assert "TASK [driver" not in shown.stdout
    assert {"docker-ce", "nvidia-container-toolkit", "earlyoom"} <= added(shown)
    assert not any(re.match("nvidia-(kernel|driver|headless)|linux-headers", name) for name in added(shown))
