"""What the playbook refuses, what it only warns of, and in which words; a refused host is as it was before."""

import tempfile
from pathlib import Path

import pytest

from tests.provision import standins
from tests.provision.lab import Host, Played, difference, docker
from tests.provision.plays import TWO_CARDS, add_vendor, install, provision
from tests.provision.standin.packages import Package

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

CONFIG_70B = {"recipe_config": "recipe/configs/llama-3.1-70b.yaml"}
# Debian's updates at night, in the middle of one.
UPDATES = """#!/usr/bin/python3
import fcntl, time
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
time.sleep(600)
"""


def look(host: Host, **more: object) -> Played:
    return provision(host, "--tags", "checks", check=False, **more)


def table(played: Played) -> str:
    """The table of checks with its lines joined, after a play that went on."""
    assert played.returncode == 0 and played.recap["changed"] == 0, played.stdout + played.stderr
    return " ".join(played.stdout.partition("TASK [checks : Show what was found]")[2].split())


def refused(played: Played, *checks: str) -> dict[str, str]:
    """What the play ended with, by check; these and no others, and no task has changed anything."""
    said = last_words(played).splitlines()
    found: dict[str, str] = {}
    for line in said[1:]:
        name, _, words = line.partition(": ")
        found[name] = f"{found[name]}\n{words}" if name in found else words
    assert sorted(found) == sorted(checks), said
    assert played.recap["changed"] == 0
    return found


def last_words(played: Played) -> str:
    assert played.returncode == 2, played.stdout + played.stderr
    text = played.stdout.rpartition("[ERROR]: Task failed: Action failed: ")[2]
    return text.partition("\nOrigin: ")[0]


# --- all at once ------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once_and_put_right_as_told(host, mirror):
    """The wrong release, no GPU, a lock of apt's, no network; a pending reboot is only a warning."""
    machine = host("bookworm")
    machine.put("/tmp/unattended-upgrade", UPDATES, 0o755)
    machine.run("systemd-run --unit=upgrade /tmp/unattended-upgrade; touch /run/reboot-required")
    machine.run("cp /usr/lib/os-release /tmp; sed -i 's/12/11/g; s/bookworm/bullseye/g' /usr/lib/os-release")
    before = machine.state()
    mirror.down()

    played = look(machine)
    said = refused(played, "release", "gpu", "apt", "network")
    assert "Debian GNU/Linux 11 (bullseye); expected one of Debian 12, Debian 13, Ubuntu" in said["release"]
    assert "none on the PCI bus; expected at least 1 NVIDIA GPU; put one in" in said["gpu"]
    assert "`-e gpus_wanted=0` sets up a machine that computes on its CPU" in said["gpu"]
    pid = machine.run("systemctl show --value -p MainPID upgrade").stdout.strip()
    assert f"unattended-upgr (process {pid}) is installing packages" in said["apt"]
    assert f"wait until it has ended (`ps -p {pid}`)" in said["apt"]
    for component in ("the distribution's packages", "the driver", "Docker"):
        assert f"no network for {component}: http://" in said["network"]
    assert "WARN reboot a reboot is pending" in " ".join(played.stdout.split())
    assert difference(before, machine.state()) == []

    mirror.up()
    machine.run("cp /tmp/os-release /usr/lib/os-release; systemctl stop upgrade")
    assert " 0 failed" in table(look(machine, gpus_wanted=0))


# --- who calls --------------------------------------------------------------------------------------------


def test_without_sudo_it_is_said_what_to_do(host):
    machine = host("trixie")
    machine.run("echo guest:secret | chpasswd; echo owner:secret | chpasswd")
    machine.run("sed -i s/NOPASSWD:/PASSWD:/ /etc/sudoers.d/owner")
    before = machine.state()

    def no_root(user: str, **more: object) -> str:
        said = last_words(look(machine, ansible_user=user, **more))
        assert said.startswith(f"{user} may not become root on {machine.name} (")
        assert "; expected: a user with sudo; " in said and said.endswith("Nothing was changed.")
        return said

    said = no_root("guest")
    assert "(Missing sudo password)" in said and "`usermod -aG sudo guest` as root" in said
    said = no_root("guest", ansible_become_password="secret")
    assert "(guest is not in the sudoers file" in said and "add -K" not in said
    said = no_root("owner")
    assert "add -K, which asks for the password (`make provision` asks by itself)" in said
    said = no_root("owner", ansible_become_password="wrong")
    assert "(Incorrect sudo password)" in said and "give the password of owner again" in said
    assert " 0 failed" in table(look(machine, gpus_wanted=0, ansible_become_password="secret"))
    assert difference(before, machine.state()) == []

    # A Debian that was installed with a password for root has none.
    machine.run("mv /usr/bin/sudo /usr/bin/sudo.away")
    assert "sudo: not found" in (said := no_root("owner")) and "`apt install sudo`" in said
    # Root itself needs none.
    machine.run("install -D -m 600 /home/owner/.ssh/authorized_keys /root/.ssh/authorized_keys")
    assert " 0 failed" in table(look(machine, gpus_wanted=0, ansible_user="root"))


# --- GPUs, driver, Secure Boot ----------------------------------------------------------------------------


def test_one_gpu_goes_on_with_the_plans_figures_where_its_ram_suffices(host):
    machine = host("bookworm")
    standins.gpus(machine, TWO_CARDS[:1])
    standins.meminfo(machine, total_gib=64, available_gib=60)
    before = machine.state()

    found = table(look(machine, checks_ignore=["disk"], **CONFIG_70B))
    warning = found.partition("WARN gpu NVIDIA GeForce RTX 3090 expected: two or more -> ")[2]
    remedy = warning.partition(" ok ")[0]
    assert remedy.startswith("it goes on: what does not fit the card lies in RAM, which is slower (")
    ram, speed = remedy.partition("(")[2].rstrip(")").split(" of RAM needed, ")
    assert 40 < float(ram.removesuffix(" GiB")) < 64
    assert (
        100 < float(speed.removesuffix(" tokens/s predicted")) < 300
    )  # the README's table has two cards' 310
    assert (
        "ignored, as checks_ignore says; free some, or name a folder on a larger disk (`-e models_folder=`"
        in found
    )

    standins.meminfo(machine, total_gib=16, available_gib=12)
    said = refused(look(machine, checks_ignore=["disk"], **CONFIG_70B), "ram")["ram"]
    assert "16.0 GiB; expected 28.8 GiB for the plan; host RAM: 28.8 GiB needed, 16.0 there" in said
    assert "would fit: 29 GiB of RAM, or 1 more GPU of 24 GiB" in said
    assert difference(before, machine.state()) == []


def test_secure_boot_a_kernel_without_headers_and_a_desktop(host):
    machine = host("bookworm")
    release = standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS, secure_boot=True)

    def boot(kernel: str) -> None:
        machine.run(f"echo {kernel} >/opt/standin/osrelease; /opt/standin/boot mounts")

    # The kernel that runs is older than the one that is installed, and the archive has no headers for it any more.
    old = "6.1.0-1-amd64"
    with tempfile.TemporaryDirectory() as scratch:
        Package(f"linux-image-{old}", "6.1.1-1").write(Path(scratch))
        docker("cp", scratch, f"{machine.container}:/srv/debs")
    machine.run("dpkg -i /srv/debs/*.deb")
    boot(old)
    machine.put("/etc/systemd/system/gdm3.service", "[Service]\nExecStart=/usr/bin/sleep infinity\n")
    link = "/etc/systemd/system/display-manager.service"
    machine.run(f"ln -s gdm3.service {link}; systemctl daemon-reload; systemctl start display-manager")
    before = machine.state()

    played = look(machine, checks_allow_desktop=False)
    said = refused(played, "secure boot", "reboot")
    assert (
        "on, and the driver's modules will be built here; expected off, or their key enrolled"
        in said["secure boot"]
    )
    assert "`-e checks_mok=true` if you sit at the machine" in said["secure boot"]
    assert "`sudo mokutil --import /var/lib/dkms/mok.pub`" in said["secure boot"]
    assert "a blue screen asks: Enroll MOK, Continue, Yes, that password, Reboot" in said["secure boot"]
    assert said["secure boot"].endswith("or switch Secure Boot off in the BIOS")
    assert f"{old} runs, {release} is installed, and there are no headers for {old}" in said["reboot"]
    assert "`sudo reboot`, then provision again" in said["reboot"]
    words = " ".join(played.stdout.split())
    assert "WARN desktop gdm3 draws on NVIDIA GeForce RTX 3090 at 0000:01:00.0" in words
    assert "`-e checks_allow_desktop=true` says that it is known" in words

    boot(release)
    found = table(look(machine, checks_mok=True))
    assert "WARN secure boot on, and the driver's modules will be built here" in found
    assert "-> it goes on: once they are built, `sudo mokutil --import" in found
    assert "ok desktop gdm3 on 0000:01:00.0" in found
    assert difference(before, machine.state()) == []


def test_drivers_that_came_by_other_ways(host):
    """NVIDIA's .run installer; then an older branch of NVIDIA's repository that its owner holds."""
    machine = host("bookworm")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    machine.put("/usr/bin/nvidia-uninstall", "#!/bin/sh\n", 0o755)
    before = machine.state()
    said = refused(look(machine), "driver")["driver"]
    assert (
        "a driver that NVIDIA's .run installer put here; expected branch 580 or newer of apt, or none" in said
    )
    assert "`sudo nvidia-uninstall`, reboot, and provision again" in said
    assert difference(before, machine.state()) == []
    machine.run("rm /usr/bin/nvidia-uninstall")

    add_vendor(machine, "nvidia", "debian12/x86_64/", "key.pub")
    machine.run("apt-get update")
    names = ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"]
    install(machine, *(f"{name}=575.57.08-1" for name in names))
    machine.run(f"apt-mark hold {' '.join(names[:2])}")
    before = machine.state()
    said = refused(look(machine), "driver")["driver"]
    assert "nvidia-driver-cuda 575.57.08-1 is installed and held; expected branch 580 or newer" in said
    assert f"`sudo apt-mark unhold {' '.join(names[:2])}`, then provision again" in said
    assert difference(before, machine.state()) == []


# --- disk, packages, network ------------------------------------------------------------------------------


def test_swap_for_which_the_disk_has_no_room(host):
    machine = host("bookworm")
    machine.run(
        "fallocate -l 64M /srv/disk; mkfs.ext4 -q /srv/disk; mkdir /srv/small; mount -o loop /srv/disk /srv/small"
    )
    swap = {"gpus_wanted": 0, "memory_swap_folder": "/srv/small", "memory_swap_gib": 0.5}
    listed, before = machine.run("ls -A /srv/small").stdout, machine.state()

    said = refused(look(machine, **swap), "disk")["disk"]
    assert "GiB free on /srv/small; expected 0.5 GiB for /srv/small; free some" in said
    assert (
        "(`-e memory_swap_folder=`), or take less swap (`-e memory_swap_gib=`, `-e memory_swap=none`)" in said
    )

    said = last_words(provision(machine, "--tags", "memory", check=False, **swap))
    assert (
        said.startswith("/srv/small/recipe.swap: 0.5 GiB cannot be made")
        and "No space left on device" in said
    )
    assert "\n" not in said and "-e memory_swap_folder=" in said and "-e memory_swap=none" in said
    assert machine.run("ls -A /srv/small").stdout == listed
    assert difference(before, machine.state()) == []


def test_an_installation_that_was_cut_off_is_completed(host):
    machine = host("trixie")
    machine.run("apt-get update; cd /tmp; apt-get download patch; dpkg --unpack patch_*.deb")
    found = table(look(machine, gpus_wanted=0))
    assert "WARN dpkg an earlier installation was cut off" in found
    assert "-> it goes on: `dpkg --configure -a` is run first" in found
    provision(machine, "--tags", "memory", gpus_wanted=0, memory_swap="none")
    state = machine.state()["packages"]
    assert state["patch"].endswith(" installed") and state["earlyoom"].endswith(" installed")


def test_what_cannot_be_fetched_is_named_and_apts_own_proxy_is_a_way(host, mirror):
    machine = host("bookworm")
    standins.gpus(machine, TWO_CARDS)
    # The lab's apt has a proxy, and from now on nothing else leads to Debian.
    machine.run("echo 127.0.0.1 deb.debian.org >>/etc/hosts")
    before = machine.state()
    assert "ok network what will be fetched answers" in table(look(machine))

    mirror.down()
    said = refused(look(machine), "network")["network"].splitlines()
    for component, url in (
        ("the distribution's packages", "http://deb.debian.org/debian"),
        ("the driver", f"{mirror.address}/nvidia/key.pub"),
        ("Docker", f"{mirror.address}/docker/gpg"),
        ("the container toolkit", f"{mirror.address}/toolkit/gpgkey"),
    ):
        assert any(line.startswith(f"no network for {component}: {url} (") for line in said), (
            component,
            said,
        )
    assert all("check network and proxy (`-e https_proxy=`), or name a mirror" in line for line in said)
    assert difference(before, machine.state()) == []
