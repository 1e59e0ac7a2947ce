"""The role `cuda_nccl`: what NCCL has to know of these cards, and a driver that the image's CUDA is too new for."""

import pytest

from tests.provision import standins
from tests.provision.plays import TWO_CARDS, provision
from tests.provision.standin import vendors

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

THERE = "/home/owner/qlora-70b-recipe"


def put_driver(host, version):
    """nvidia-smi of a version without its packages, whose modules would have to be built, and the cards in its hands."""
    host.run(
        f"cd /tmp && apt-get -qq download nvidia-driver-cuda={version}-1 && dpkg-deb -x nvidia-driver-cuda_*.deb / && rm *.deb"
    )
    standins.gpus(host, TWO_CARDS, driver="nvidia")
    host.put("/opt/standin/loaded", f"{version}\n")


def test_an_older_driver_is_refused_and_what_nccl_must_know_is_written(host):
    machine = host("bookworm")
    address, key = machine.mirror.address, "/etc/apt/keyrings/cuda.asc"
    machine.put(key, (machine.mirror.folders["nvidia"] / "key.pub").read_text())
    machine.put(
        "/etc/apt/sources.list.d/cuda.list", f"deb [signed-by={key}] {address}/nvidia/debian12/x86_64/ /\n"
    )
    machine.run("apt-get -qq update")

    put_driver(machine, "575.57.08")
    refused = provision(machine, "--tags", "cuda_nccl", check=False, driver_source="none")
    said = "the driver is 575.57.08, the image's CUDA 13.0 needs branch 580 or newer (requirements-gpu.lock); run the play without"
    assert said in " ".join(refused.stdout.split()), refused.stdout
    assert machine.run(f"ls {THERE}", check=False).returncode != 0

    put_driver(machine, vendors.DRIVER)
    lost = provision(machine, "--tags", "cuda_nccl", check=False, driver_source="none")
    assert "is the checkout there? --tags project brings it" in " ".join(lost.stdout.split()), lost.stdout
    first = provision(machine, "--tags", "project,cuda_nccl", driver_source="none")
    assert f"driver {vendors.DRIVER} for CUDA 13.0 and NCCL" in " ".join(first.stdout.split()), first.stdout
    written = machine.read(f"{THERE}/host.env").splitlines()
    assert "NCCL_P2P_DISABLE=1" in written and "NCCL_IB_DISABLE=1" in written
    assert machine.run(f"stat -c %U {THERE}/host.env").stdout == "owner\n"
    second = provision(machine, "--tags", "cuda_nccl", driver_source="none")
    assert second.recap["changed"] == 0, second.tasks_changed

    # Cards that can read each other's memory.
    standins.gpus(machine, TWO_CARDS, driver="nvidia", p2p="OK")
    third = provision(machine, "--tags", "cuda_nccl", driver_source="none")
    assert third.tasks_changed == ["cuda_nccl : See whether that is new"]
    assert "NCCL_P2P_DISABLE=1" not in machine.read(f"{THERE}/host.env").splitlines()
    machine.run(f"rm {THERE}/host.env; mkdir {THERE}/host.env")
    failed = provision(machine, "--tags", "cuda_nccl", check=False, driver_source="none")
    assert "host.env: could not be written" in " ".join(failed.stdout.split()), failed.stdout
