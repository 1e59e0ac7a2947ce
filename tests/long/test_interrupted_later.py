"""Two more moments at which a play is cut off: while packages are removed, and while the driver is built."""

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
