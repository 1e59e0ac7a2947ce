"""From a bare host to preflight's table: the play builds the image (the CPU's) with the engine that it installed, and ends with the table.

Times are printed, for docs/provision.md; no limit is tested, but that a second run changes nothing.
"""

import os
import time
from pathlib import Path

import pytest

from tests.provision import standins
from tests.provision.lab import docker
from tests.provision.plays import TWO_CARDS, provision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_a_bare_host_ends_with_preflights_table(host, release):
    machine = host(release)
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    # Where torch's own index cannot be reached, its build for CPUs may lie in a folder that pip is told of.
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute() and Path(wheels).is_dir():
        machine.run(f"mkdir -p {Path(wheels).parent}")
        docker("cp", wheels, f"{machine.container}:{wheels}")
        machine.put("/etc/pip.conf", f"[global]\nfind-links = {wheels}\n")
    # No CUDA can run on these cards: the CPU's image, in which the demo's config runs on the CPU.
    wanted = {
        "project_image": "build",
        "project_flavour": "cpu",
        "debian_mirror": f"{machine.mirror.address}/debian",
    }
    for turn in ("first", "second", "third"):
        started = time.monotonic()
        done = provision(machine, **wanted)
        print(f"{release}, {turn} run: {time.monotonic() - started:.0f} s, changed={done.recap['changed']}")
        table = done.stdout.rpartition("TASK [project : Show its table]")[2]
        assert "ready: " in table and "0 failed" in table, done.stdout
        assert turn == "first" or done.recap["changed"] == 0, done.tasks_changed
    assert (
        "qlora-70b-recipe:cpu"
        in machine.run("docker image ls --format '{{.Repository}}:{{.Tag}}'", user="owner").stdout
    )
