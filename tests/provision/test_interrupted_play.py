"""The play can be stopped at any time and run again: it goes on where it was, and all of it can still be taken back.

Killed is what a power cut would end: Ansible here, and there the module, apt and dpkg, which else go on to their end.
More moments: tests/long/test_interrupted_later.py.
"""

import os
import re
import shlex
import signal
import subprocess

import pytest

from tests.provision.lab import Host, difference
from tests.provision.plays import provision, settings, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

DPKG_LOG = "/var/log/dpkg.log"


def start(host: Host, playbook: str, *options: str) -> subprocess.Popen[str]:
    return host.start_play(playbook, *options, extra=settings(host.mirror, host.release))


def wait(host: Host, sign: str, then: str = "true") -> None:
    """Until a shell command succeeds in the host (two minutes at most); runs another there at once."""
    host.run(f"for i in $(seq 6000); do if {sign}; then {then}; exit; fi; sleep 0.02; done; exit 1")


def kill(playing: subprocess.Popen[str]) -> None:
    """Ansible and its ssh, at once."""
    os.killpg(playing.pid, signal.SIGKILL)
    playing.communicate()


def cut_off(host: Host, playing: subprocess.Popen[str], state: str, package: str) -> None:
    """Kill a play and all that it has started in the host, once dpkg has brought a package into a state."""
    sign = f"grep -qs {shlex.quote(f' status {state} {package}:')} {DPKG_LOG}"
    # Nothing but sshd and what it has started is in its control group, also where a program began a session of its own.
    wait(host, sign, "systemctl kill --kill-who=all --signal=KILL ssh.service")
    kill(playing)
    assert package in host.run("dpkg --audit").stdout, "it was too late"
    assert not re.search(r"\b(apt-get|dpkg|python3)\b", host.run("cat /proc/[0-9]*/comm", check=False).stdout)
    host.run(
        f"rm {DPKG_LOG}; for i in $(seq 50); do systemctl -q is-active ssh && exit; sleep 0.1; done; exit 1"
    )


def test_killed_while_packages_are_unpacked(host):
    machine = host("bookworm")
    before = machine.state()
    cut_off(machine, start(machine, "provision.yml", "--tags", "docker"), "half-installed", "docker-ce")

    shown = provision(machine, "--tags", "docker", "--check", "--diff")
    assert "! an installation that was interrupted is completed" in shown.stdout
    provision(machine, "--tags", "docker")
    assert machine.run("docker info --format '{{.ServerVersion}}'", user="owner").stdout.strip()
    third = provision(machine, "--tags", "docker")
    assert third.recap["changed"] == 0, third.tasks_changed
    # Also what came in the run that was killed.
    unprovision(machine)
    assert difference(before, machine.state()) == []
