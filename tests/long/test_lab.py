"""The lab that the playbook is tested in: its hosts are bare Debian, and its stand-ins behave like what they stand for."""

import time

import pytest

from tests.provision import standins
from tests.provision.lab import RELEASES, difference
from tests.provision.plays import add_vendor, install
from tests.provision.standin import vendors

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

TWO_CARDS: list[standins.Card] = [
    ("0000:01:00.0", "RTX 3090"),
    ("0000:02:00.0", "RTX 3090", {"current_link_width": "4"}),
]
PLAYBOOK = """
- hosts: all
  become: true
  tasks:
    - name: Write a file
      copy: {content: "{{ text }}", dest: /etc/made}
    - name: Look at it
      command: cat /etc/made
      changed_when: false
"""


@pytest.mark.parametrize("release", RELEASES)
def test_a_playbook_changes_a_host_and_what_it_left_is_seen(host, release, tmp_path):
    started = time.monotonic()
    machine = host(release)
    assert time.monotonic() - started < 20  # two seconds on an idle machine
    assert f"VERSION_CODENAME={release}" in machine.read("/etc/os-release")
    assert machine.run("sudo -n id", user="guest", check=False).returncode != 0

    before = machine.state()
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    first = machine.play(tmp_path / "play.yml", extra={"text": "hello"})
    assert (first.recap["changed"], first.tasks_changed) == (1, ["Write a file"])
    again = machine.play(tmp_path / "play.yml", extra={"text": "hello"})
    assert (again.recap["changed"], again.recap["failed"], again.tasks_changed) == (0, 0, [])
    assert [line.split(":")[1] for line in difference(before, machine.state())] == [" /etc/made"]

    broken = machine.play(tmp_path / "play.yml", check=False)
    assert (broken.returncode, broken.recap["failed"]) == (2, 1)

    machine.run("rm /etc/made; apt-get update; apt-get install -y patch; useradd --system made")
    new = difference(before, machine.state())
    assert (
        len(new) == 2 and "packages: patch: nothing before" in new[0] and "installed by hand: patch" in new[1]
    )
    machine.run("apt-get purge -y patch; usermod --append --groups made owner; sysctl vm.swappiness=11")
    left = difference(before, machine.state())
    assert (
        len(left) == 3 and all("owner" in line for line in left[:2]) and "vm.swappiness: 60 before" in left[2]
    )


def test_the_network_goes_half_way_and_comes_back(host, mirror):
    machine = host("bookworm")
    machine.run("apt-get update")
    mirror.fail_after(2)
    assert machine.run("apt-get install -y patch dpkg-dev", check=False).returncode != 0
    assert mirror.gone()
    assert machine.run("apt-get update 2>&1 | grep -c '^W: Failed to fetch'").stdout.strip() == "3"
    mirror.up()
    install(machine, "patch", "dpkg-dev")


def test_a_driver_is_built_and_loaded_where_nothing_is_in_its_way(host):
    machine = host("bookworm")
    release = standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS, driver="nouveau", secure_boot=True)
    assert machine.run("uname -r").stdout.strip() == release

    add_vendor(machine, "nvidia", "debian12/x86_64/", "key.pub")
    machine.run("apt-get update")
    install(machine, "nvidia-driver-pinning-580")
    install(machine, "linux-headers-amd64", "nvidia-driver-cuda", "nvidia-kernel-open-dkms")
    assert f"{vendors.DRIVER}, {release}, x86_64: installed" in machine.run("dkms status").stdout

    assert machine.run("nvidia-smi", check=False).returncode == 9
    assert "Key was rejected" in machine.run("modprobe nvidia", check=False).stderr, "nobody enrolled it"
    machine.run("touch /opt/standin/mok-enrolled")
    assert "No such device" in machine.run("modprobe nvidia", check=False).stderr, "nouveau holds the cards"
    machine.run("echo blacklist nouveau >/etc/modprobe.d/nouveau.conf")
    machine.reboot()
    query = "nvidia-smi --query-gpu=index,driver_version,pcie.link.width.current,power.limit --format=csv,noheader"
    assert (
        machine.run(query).stdout == f"0, {vendors.DRIVER}, 16, 350.00 W\n1, {vendors.DRIVER}, 4, 350.00 W\n"
    )
    assert machine.run("systemctl is-active nvidia-persistenced").stdout == "active\n"
    machine.run("nvidia-smi -i 1 -pl 250")
    assert machine.run(query).stdout.endswith("250.00 W\n")
    assert "not a valid power limit" in machine.run("nvidia-smi -pl 900", check=False).stdout


def test_old_cards_need_the_closed_modules(host):
    machine = host("bookworm")
    release = standins.kernel(machine)
    standins.gpus(machine, [("0000:01:00.0", "GTX 1080 Ti")])
    add_vendor(machine, "nvidia", "debian12/x86_64/", "key.pub")
    machine.run("apt-get update")
    install(machine, "linux-headers-amd64", "nvidia-kernel-open-dkms=580*")
    assert "No such device" in machine.run("modprobe nvidia", check=False).stderr
    install(machine, "nvidia-kernel-dkms=580*")
    assert f"{vendors.DRIVER}, {release}" in machine.run("dkms status").stdout
    machine.run("modprobe nvidia")


@pytest.mark.parametrize("release", RELEASES)
def test_docker_gives_containers_the_gpus_that_they_ask_for(host, release):
    machine = host(release)
    standins.gpus(machine, TWO_CARDS, driver="nvidia")
    machine.put(
        "/usr/bin/nvidia-smi",
        (standins.FILES / "nvidia-smi").read_text().replace("@VERSION@", vendors.DRIVER),
        0o755,
    )
    add_vendor(machine, "toolkit", "stable/deb/amd64/", "gpgkey")
    add_vendor(machine, "docker", "debian", "gpg", f"{release}\nComponents: stable")
    machine.run("apt-get update")
    install(machine, *vendors.DOCKER, "nvidia-container-toolkit")
    machine.put("/etc/docker/daemon.json", '{"features": {"cdi": true, "containerd-snapshotter": true}}')
    machine.run("nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml && systemctl restart docker")
    standins.tiny_image(machine)
    listed = machine.run("docker run --rm --device nvidia.com/gpu=all tiny nvidia-smi -L").stdout.splitlines()
    assert [line.partition(" (")[0] for line in listed] == [
        f"GPU {index}: NVIDIA GeForce RTX 3090" for index in (0, 1)
    ]
    assert machine.run("docker run --rm --device nvidia.com/gpu=1 tiny nvidia-smi -L").stdout.startswith(
        "GPU 1"
    )
    assert machine.run("docker run --rm tiny nvidia-smi -L", check=False).returncode == 127


def test_a_host_passes_for_ubuntu(host, tmp_path):
    machine = host("trixie")
    standins.ubuntu(machine, "24.04")
    (tmp_path / "play.yml").write_text("""
- hosts: all
  become: true
  tasks:
    - assert: {that: "ansible_facts.distribution ~ ansible_facts.distribution_version == 'Ubuntu24.04'"}
    - name: Install
      apt: {name: [nvidia-headless-580-server-open, docker-compose-v2, linux-headers-generic], update_cache: true}
""")
    assert machine.play(tmp_path / "play.yml", "--check").tasks_changed == ["Install"]


def test_memory_swap_and_an_image_of_a_host(host):
    machine = host("bookworm")
    standins.meminfo(machine, total_gib=64, available_gib=60)
    machine.run(
        "fallocate -l 16M /var/lib/docker/swap; chmod 600 /var/lib/docker/swap; mkswap /var/lib/docker/swap"
    )
    machine.run("echo /var/lib/docker/swap none swap sw 0 0 >>/etc/fstab; swapon -a")
    machine.put("/etc/sysctl.d/90-made.conf", "vm.swappiness=12\n")
    machine.reboot()
    state = machine.state()
    assert (list(state["swaps"]), state["kernel settings"]) == (
        ["/var/lib/docker/swap"],
        {"vm.swappiness": "12"},
    )
    machine.run("sed -i /swap/d /etc/fstab")
    machine.reboot()  # ends it, for this machine's kernel goes on
    assert not machine.state()["swaps"]
    image = machine.commit("made")
    other = host("bookworm", image=image)
    assert other.read("/etc/sysctl.d/90-made.conf") == machine.read("/etc/sysctl.d/90-made.conf")
    assert "MemTotal:       67108864 kB" in other.read("/proc/meminfo")
