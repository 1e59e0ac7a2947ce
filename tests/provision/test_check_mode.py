"""`--check --diff` shows what would come and changes nothing; `--tags checks` only looks.

Each on one release: tests/long/test_check_mode_elsewhere.py has the others. Debian's hosts are Debian. Nothing of Ubuntu or
of WSL2 can be had here: those hosts are Debian under another name, with packages that are empty, and what these tests keep is
which names the play chooses there, and that it gets to its end.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.provision import lab, standins
from tests.provision.lab import Host, Played, difference
from tests.provision.plays import TWO_CARDS, provision, unprovision
from tests.provision.standin import vendors
from tests.provision.standin.packages import Package

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


@contextmanager
def unchanged(host: Host) -> Iterator[None]:
    """Nothing of the host is written meanwhile, but logs, apt's own caches and Ansible's folder for its modules."""
    before = host.state()
    host.run("touch /opt/before")
    yield
    assert difference(before, host.state()) == []
    written = host.run(
        "find / /var/lib/docker /var/lib/containerd -xdev -cnewer /opt/before"
    ).stdout.splitlines()
    own = re.compile(r"/(proc|sys|run|tmp|var/(log|cache/apt|tmp)|home/owner/\.ansible)(/|$)|/home/owner$")
    assert [path for path in written if not own.match(path)] == []


def added(played: Played) -> set[str]:
    """Names of packages that the diffs say would come."""
    return {line.split()[1] for line in played.stdout.splitlines() if line.startswith("++ ")}


def files(played: Played) -> set[str]:
    """Files that the diffs say would be written."""
    return set(re.findall(r"^\+\+\+ after: (/\S+)$", played.stdout, re.MULTILINE))


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


@pytest.mark.parametrize("playbook", ["provision.yml", "unprovision.yml"])
def test_the_syntax(playbook, tmp_path):
    words = [lab._ansible_playbook(), "--syntax-check", "-i", "localhost,", playbook]
    done = subprocess.run(words, cwd=lab.ROOT / "ansible", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_all_is_shown_and_nothing_changed(host, mirror):
    all_is_shown(host("trixie"), mirror, "trixie")


def all_is_shown(machine: Host, mirror, release: str) -> None:
    kernel = standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    mirror.requests.clear()
    with unchanged(machine):
        shown = provision(machine, "--check", "--diff")
        looked = provision(machine, "--tags", "checks")
    assert looked.recap["changed"] == 0 and "0 failed" in looked.stdout

    driver = {
        "nvidia-kernel-open-dkms",
        "nvidia-driver-cuda",
        "linux-headers-amd64",
        f"linux-headers-{kernel}",
    }
    docker = (
        set(vendors.DOCKER) if release == "bookworm" else {"docker.io", "docker-cli", "containerd", "runc"}
    )
    assert driver | docker | {"earlyoom", "nvidia-container-toolkit"} <= added(shown)
    # Without its repository apt cannot say what more a vendor's package brings.
    assert "++ nvidia-driver-cuda (not known to apt yet)\n" in shown.stdout
    sources = {"nvidia", "nvidia-container-toolkit", *(["docker"] if release == "bookworm" else [])}
    assert files(shown) >= {
        *(f"/etc/apt/sources.list.d/recipe-{name}.sources" for name in sources),
        "/etc/modprobe.d/recipe-nouveau.conf",
        "/etc/systemd/system/recipe-swap.service",
        "/etc/sysctl.d/90-recipe.conf",
        "/etc/docker/daemon.json",
    }
    assert "+vm.swappiness = 10\n" in shown.stdout and "+blacklist nouveau\n" in shown.stdout
    # Of the vendors, only whether their keys are there was asked, by each of the two plays once; no repository was read.
    keys = ["/nvidia/key.pub", "/toolkit/gpgkey", *(["/docker/gpg"] if release == "bookworm" else [])]
    vendors_asked = [request for request in mirror.requests if not request[0].startswith("/debian")]
    assert sorted(vendors_asked) == sorted((key, 200) for key in [*keys, *keys])


def test_every_option_is_shown_and_nothing_changed(host):
    machine = host("bookworm")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    with unchanged(machine):
        shown = provision(machine, "--check", "--diff", **EVERY_OPTION)
    assert {"systemd-zram-generator", "libnccl-dev", "g++"} <= added(shown)
    assert any(name.startswith("cuda-toolkit-13") for name in added(shown))
    assert "hf_secret" not in shown.stdout + shown.stderr


def test_what_is_there_stays_as_it_is(host):
    machine = host("bookworm")
    provision(machine, "--tags", "memory", gpus_wanted=0)
    with unchanged(machine):
        again = provision(machine, "--tags", "memory", "--check", gpus_wanted=0)
        removed = unprovision(machine, "--check", "--diff")
    assert again.recap["changed"] == 0, again.tasks_changed
    assert "\n+- earlyoom " in removed.stdout and "path: /etc/sysctl.d/90-recipe.conf\n" in removed.stdout


def test_on_ubuntu_its_own_packages_are_chosen(host, mirror):
    ubuntus_own_packages_are_chosen(host("trixie"), mirror, "24.04")


def ubuntus_own_packages_are_chosen(machine: Host, mirror, version: str) -> None:
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
