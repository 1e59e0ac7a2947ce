"""The promise of the playbook, whole: a bare host is provisioned, a second run changes nothing, all of it can be taken back."""

import json

import pytest

from tests.provision import standins
from tests.provision.lab import difference
from tests.provision.plays import SWAP_FOLDER, TWO_CARDS, provision, unprovision
from tests.provision.standin import vendors

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_bare_provisioned_unchanged_and_taken_back(host):
    """Debian 13; Debian 12 is tests/long/test_provision_bookworm.py."""
    there_and_back(host("trixie"), engine="docker.io")


def there_and_back(with_gpus, engine):
    """engine: the package of Docker's engine that this release is to have."""
    kernel = standins.kernel(with_gpus)
    standins.gpus(with_gpus, TWO_CARDS)
    before = with_gpus.state()

    first = provision(with_gpus)
    assert first.recap["changed"] > 20, first.stdout
    look(with_gpus, kernel, engine)

    second = provision(with_gpus)
    assert second.recap["changed"] == 0, second.tasks_changed

    unprovision(with_gpus)
    assert difference(before, with_gpus.state()) == []
    again = unprovision(with_gpus)
    assert again.recap["failed"] == 0


def look(host, kernel, engine):
    """What a user would look at afterwards."""
    # The driver: of NVIDIA's repository, in the lock's branch or the oldest newer one, built by DKMS for this kernel,
    # held, awake, nouveau off.
    cards = host.run("nvidia-smi --query-gpu=driver_version,persistence_mode --format=csv,noheader").stdout
    expected = {"docker-ce": f"{vendors.DRIVER}, Enabled\n", "docker.io": "590.48.01, Enabled\n"}
    assert cards == 2 * expected[engine]
    assert f", {kernel}, x86_64: installed" in host.run("dkms status").stdout
    held = host.run("apt-mark showhold").stdout.split()
    assert {"nvidia-kernel-open-dkms", "nvidia-driver-cuda"} <= set(
        held
    ) and "nvidia-container-toolkit" not in held
    assert "blacklist nouveau" in host.read("/etc/modprobe.d/recipe-nouveau.conf")
    assert host.run("systemctl is-active nvidia-persistenced").stdout.strip() == "active"
    # Memory.
    assert f"{SWAP_FOLDER}/recipe.swap" in host.read("/proc/swaps")
    assert host.read("/proc/sys/vm/swappiness").strip() == "10"
    assert host.run("systemctl is-active earlyoom").stdout.strip() == "active"
    # Docker: the engine of this release, as `make build` and compose.yaml need it, without sudo.
    assert host.run(f"dpkg-query -W -f '${{Status}}' {engine}").stdout == "install ok installed"
    info = json.loads(host.run("docker info --format '{{json .}}'", user="owner").stdout)
    assert ["driver-type", "io.containerd.snapshotter.v1"] in info["DriverStatus"]
    assert host.run("docker compose version --short && docker buildx version", user="owner").stdout
    # GPUs in a container of the user's, by CDI, still there after a reload of systemd.
    standins.tiny_image(host)
    host.run(
        "docker run --detach --interactive --name gpus --device nvidia.com/gpu=all tiny sh -c 'read -r x'",
        user="owner",
    )
    host.run("systemctl daemon-reload")
    assert host.run("docker exec gpus nvidia-smi -L", user="owner").stdout.count("GPU ") == 2
    host.run("docker rm --force gpus && docker image rm tiny", user="owner")
    # The checkout, with what NCCL has to know of these cards.
    assert "NCCL_P2P_DISABLE=1" in host.read("/home/owner/qlora-70b-recipe/host.env")
    assert host.run("stat -c %U /home/owner/qlora-70b-recipe/models").stdout.strip() == "owner"
