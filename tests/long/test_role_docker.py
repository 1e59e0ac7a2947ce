"""The role `docker`: which engine comes, the user's settings kept and brought back, and nobody's containers ended unasked."""

import json
import re

import pytest

from tests.provision import standins
from tests.provision.lab import ROOT, difference
from tests.provision.plays import TWO_CARDS, provision, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

ONLY = ("--tags", "docker")
SETTINGS = "/etc/docker/daemon.json"
# As somebody may write it; its last line would have the engine find no driver in containerd's store.
USERS = '{"log-driver": "local",\n\t"features": {"buildkit": true, "cdi": false},\n\n "storage-driver":"overlay2" }'


def info(host, user="root"):
    return json.loads(host.run("docker info --format '{{json .}}'", user=user).stdout)


def store(host, user="root"):
    """Which of the engine's two stores it works with."""
    found = info(host, user)["DriverStatus"]
    return "containerd" if ["driver-type", "io.containerd.snapshotter.v1"] in found else "old"


def install(host, *packages):
    host.run(
        "apt-get -qq update && DEBIAN_FRONTEND=noninteractive"
        f" apt-get -qq install -y --no-install-recommends {' '.join(packages)}"
    )


def run_forever(host):
    """A container that runs until it is told to end."""
    standins.tiny_image(host)
    host.run("docker run --detach --interactive --name theirs tiny sh -c 'read -r x'")


# --- the user's own engine ----------------------------------------------------------------------------------


def test_the_users_engine_keeps_its_settings_and_its_containers(host):
    machine = host("trixie")
    machine.put(SETTINGS, USERS, mode=0o640)
    install(machine, "docker.io", "docker-cli")
    machine.run("usermod --append --groups docker guest")
    assert store(machine) == "old"
    run_forever(machine)
    before = machine.state()
    proxy = machine.mirror.address  # which is one

    refused = provision(machine, *ONLY, check=False, http_proxy=proxy)
    said = "Docker must restart for its new settings, which would end 1 running container; end them"
    assert said in words(refused.stdout) and "docker_restart_busy=true" in refused.stdout
    assert machine.run("docker inspect --format '{{.State.Running}}' theirs").stdout == "true\n"
    assert store(machine) == "old"

    first = provision(machine, *ONLY, http_proxy=proxy, docker_restart_busy=True)
    assert "1 image and 1 container of the older one (overlay2) stay on disk but are not seen" in words(
        first.stdout
    )
    assert store(machine, "owner") == "containerd", "and the user needs no sudo"
    assert info(machine)["HttpProxy"] == proxy
    assert json.loads(machine.read(SETTINGS)) == {
        "log-driver": "local",
        "features": {"buildkit": True, "cdi": True, "containerd-snapshotter": True},
    }
    assert machine.run("dpkg-query -W -f '${db:Status-Abbrev}' docker.io").stdout == "ii "
    standins.tiny_image(machine)
    assert machine.run("docker run --rm tiny sh -c 'echo works'", user="owner").stdout == "works\n"
    second = provision(machine, *ONLY, http_proxy=proxy)
    assert second.recap["changed"] == 0, second.tasks_changed

    unprovision(machine)
    assert machine.read(SETTINGS) == USERS
    assert machine.run(f"stat -c %a {SETTINGS}").stdout == "640\n"
    assert store(machine) == "old" and not info(machine).get("HttpProxy")
    assert machine.run("docker ps --all --format '{{.Names}}'").stdout == "theirs\n"
    assert machine.run("id -nG guest").stdout.split() == ["guest", "docker"]
    assert "docker" not in machine.run("id -nG owner").stdout.split()
    assert difference(before, machine.state()) == []


def test_an_engine_of_dockers_own_stays_where_the_distributions_would_do_too(host):
    machine = host("trixie")
    address, key = machine.mirror.address, "/etc/apt/keyrings/docker.asc"
    machine.put(key, (machine.mirror.folders["docker"] / "gpg").read_text())
    machine.put(
        "/etc/apt/sources.list.d/docker.list",
        f"deb [arch=amd64 signed-by={key}] {address}/docker/debian trixie stable\n",
    )
    install(machine, "docker-ce", "docker-ce-cli", "containerd.io")
    provisioned = provision(machine, *ONLY)
    installed = machine.run(
        "dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' 'docker*' 'containerd*'"
    ).stdout
    installed = {line[3:] for line in installed.splitlines() if line.startswith("ii")}
    assert {"docker-ce", "docker-buildx-plugin", "docker-compose-plugin"} <= installed, provisioned.stdout
    assert not {"docker.io", "docker-cli", "containerd"} & installed
    assert store(machine, "owner") == "containerd"
    assert machine.run("ls /etc/apt/sources.list.d").stdout.split().count("recipe-docker.sources") == 0


def test_an_older_engine_makes_way_when_nothing_runs_or_it_may(host):
    machine = host("bookworm")
    # The lab's docker-ce holds a program of Debian's tini, Docker's own does not.
    machine.put("/etc/dpkg/dpkg.cfg.d/lab", "force-overwrite\n")
    install(machine, "docker.io")
    old = info(machine)["ServerVersion"]
    assert old.startswith("20.10.")
    run_forever(machine)

    refused = provision(machine, "--tags", "checks,docker", check=False, gpus_wanted=0)
    row = (
        rf"FAIL +docker +{re.escape(old)}\S* is to be replaced \(Docker's \w+ to come\), but 1 container runs"
    )
    assert re.search(row, words(refused.stdout)), refused.stdout
    refused = provision(machine, *ONLY, check=False)
    assert f"Docker {old}" in words(refused.stdout) and "would end 1 running container;" in words(
        refused.stdout
    )
    assert info(machine)["ContainersRunning"] == 1
    assert machine.run("ls /etc/docker /etc/apt/sources.list.d").stdout.count("recipe") == 0

    replaced = provision(machine, "--tags", "checks,docker", docker_replace=True, gpus_wanted=0)
    assert re.search(
        rf"ok +docker +{re.escape(old)}\S* is there, Docker's \w+ to come", words(replaced.stdout)
    )
    assert info(machine, "owner")["ServerVersion"].split(".")[0] > "25"
    assert store(machine) == "containerd"
    kept = machine.run(
        "dpkg-query -W -f '${Package} ${db:Status-Status}\\n' docker.io docker-ce", check=False
    ).stdout
    assert "docker-ce installed" in kept and "docker.io installed" not in kept

    said = words(unprovision(machine).stdout)
    assert re.search(r"not brought back; if you want them: `apt install [^`]*\bdocker\.io\b", said), said


def words(text):
    """As it was before Ansible broke its lines."""
    return " ".join(text.split())


# --- an engine of the user's own, without root ------------------------------------------------------------------


USERS_ENGINE = "unix:///run/user/1000/docker.sock"
GPU_CHECK = ROOT / "ansible/roles/container_toolkit/files/gpu-check"
# What the lab has put over /proc and /sys: a kernel gives a container without root no new ones where it would show more.
VEILS = "/proc/sys/kernel/random/boot_id /proc/sys/vm /proc/sys/kernel/osrelease /sys/bus/pci/devices /sys/firmware"


def test_rootless(host):
    machine = host("trixie")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    before = machine.state()
    machine.run("chmod 666 /dev/net/tun")  # as udev has it on a machine
    # A file system on which the user's engine can lay its images over each other; the host's own is such a layer.
    store_folder = "/home/owner/.local/share/docker"
    machine.run(
        f"su owner -c 'mkdir -p {store_folder}'; mount -t tmpfs -o uid=1000,gid=1000 tmpfs {store_folder}"
    )

    def play():
        # Behind the veils the play's own look at a container with GPUs fails, which reboot=no lets pass.
        return provision(
            machine, "--tags", "driver,docker,container_toolkit", docker_rootless=True, reboot="no"
        )

    play()
    assert "name=rootless" in info(machine, "owner")["SecurityOptions"]
    assert store(machine, "owner") == "containerd"
    assert "docker" not in machine.run("id -nG owner").stdout.split()
    assert info(machine, "root")["SecurityOptions"] != info(machine, "owner")["SecurityOptions"], (
        "the machine's is one too"
    )
    second = play()
    assert second.recap["changed"] == 0, second.tasks_changed

    # The engine has mounts of its own, with those that were there when it began.
    machine.run(f"umount {VEILS}; systemctl --user -M owner@ restart docker")
    machine.put("/tmp/gpu-check", GPU_CHECK.read_text(), 0o755)
    seen = machine.run(f"DOCKER_HOST={USERS_ENGINE} /tmp/gpu-check cdi 2")
    assert seen.stdout == "a container sees 2 GPUs\n"

    machine.reboot()
    machine.run("chmod 666 /dev/net/tun")
    assert machine.run(
        "systemctl --user -M owner@ restart docker && systemctl --user -M owner@ is-enabled docker"
    ).stdout
    assert store(machine, "owner") == "containerd", "without a session of the owner's"

    unprovision(machine)
    left = [line for line in difference(before, machine.state()) if not line.startswith("units: session-")]
    assert left == []  # but for the test's own sessions
    assert "rootless" not in machine.run("grep -rs . /home/owner/.docker", check=False).stdout
    assert machine.run("ls -A /home/owner/.config /var/lib/systemd/linger").stdout.split() == [
        "/home/owner/.config:",
        "/var/lib/systemd/linger:",
    ]
