"""More moments at which a play is cut off: while packages are removed, while the driver is built, without its network."""

import re

import pytest

from tests.provision import standins
from tests.provision.lab import difference, docker
from tests.provision.plays import TWO_CARDS, provision, unprovision
from tests.provision.test_interrupted_play import DPKG_LOG, cut_off, kill, start, wait

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_killed_while_packages_are_removed(host):
    machine = host("trixie")
    before = machine.state()
    provision(machine, "--tags", "docker")
    machine.run(f"rm {DPKG_LOG}")
    cut_off(machine, start(machine, "unprovision.yml"), "half-installed", "docker.io")

    unprovision(machine)
    assert difference(before, machine.state()) == []


def test_the_machine_goes_down_while_the_driver_is_built(host):
    machine = host("bookworm")
    kernel = standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    playing = start(machine, "provision.yml", "--tags", "driver")
    wait(machine, "grep -qsx cc1 /proc/[0-9]*/comm")
    docker("kill", machine.container)
    kill(playing)
    machine.reboot(degraded=True)  # the daemon that keeps the driver awake had none to wake
    assert "nvidia" in machine.run("dpkg --audit").stdout

    provision(machine, "--tags", "driver")
    assert f", {kernel}, x86_64: installed" in machine.run("dkms status").stdout
    assert machine.run("nvidia-smi --list-gpus").stdout.count("RTX 3090") == 2
    third = provision(machine, "--tags", "driver")
    assert third.recap["changed"] == 0, third.tasks_changed


def test_the_network_goes_half_way(host, mirror):
    machine = host("bookworm")
    address = re.escape(mirror.address.removeprefix("http://"))
    unreached = rf"apt cannot reach ({address}|deb\.debian\.org) \(.+\), needed for"
    for answered, problem in (
        (0, rf"key of docker: cannot load http://{address}/docker/gpg \(.+\)"),
        (2, rf"{unreached} the source docker"),
        (8, rf"{unreached} docker-ce, docker-ce-cli, .*"),
    ):
        mirror.fail_after(answered)
        failed = provision(machine, "--tags", "docker", check=False)
        assert (failed.returncode, failed.recap["failed"], mirror.gone()) == (2, 1, True)
        said = " ".join(failed.stdout.partition("    msg: ")[2].partition("    stderr:")[0].split())
        remedy = "check the network, proxy or mirror, then run the play again: it goes on where it stopped"
        assert re.fullmatch(rf"'?{problem}; {remedy}(; nothing was changed)?'?", said), said
        mirror.up()
    assert "docker-ce" not in machine.state()["packages"]

    provision(machine, "--tags", "docker")
    assert machine.run("docker info --format '{{.ServerVersion}}'", user="owner").stdout.strip()
    third = provision(machine, "--tags", "docker")
    assert third.recap["changed"] == 0, third.tasks_changed
