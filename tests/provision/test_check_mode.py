"""`--check --diff` shows what would come and changes nothing; `--tags checks` only looks.

On Debian; options, Ubuntu and WSL2 are in tests/long/test_check_mode_elsewhere.py.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.provision import lab, standins
from tests.provision.lab import Host, Played, difference
from tests.provision.plays import TWO_CARDS, provision, unprovision
from tests.provision.standin import vendors

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


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


def test_what_is_there_stays_as_it_is(host):
    machine = host("bookworm")
    provision(machine, "--tags", "memory", gpus_wanted=0)
    with unchanged(machine):
        again = provision(machine, "--tags", "memory", "--check", gpus_wanted=0)
        removed = unprovision(machine, "--check", "--diff")
    assert again.recap["changed"] == 0, again.tasks_changed
    assert "\n+- earlyoom " in removed.stdout and "path: /etc/sysctl.d/90-recipe.conf\n" in removed.stdout
