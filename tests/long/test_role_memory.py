"""The role `memory`: swap that is on now and after a reboot, limits, swappiness, and who has to go when RAM runs out."""

import fcntl
import re
import secrets
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.machine import lacks
from tests.provision.lab import CACHE, difference
from tests.provision.plays import SWAP_FOLDER, provision, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]

ONLY = ("--tags", "memory")
# Eats the MiB that it is told, under the name that it is told: earlyoom sees names.
EATER = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
eaten = bytearray(int(sys.argv[2]) << 20)
time.sleep(600)
"""


@pytest.fixture
def folder():
    """A name that no other host's swap has: /proc/swaps is the machine's."""
    return f"{SWAP_FOLDER}/swap-{secrets.token_hex(3)}"


def swapped_mib(host, file):
    """The size of a file's swap in /proc/swaps, with its header, as the kernel sees it now; None where it is off."""
    lines = [line.split() for line in host.read("/proc/swaps").splitlines()]
    return next((int(words[2]) / 1024 for words in lines if words[0] == file), None)


def make_filesystem(host, kind, folder, mib=1500):
    """Mount a new file system in a folder, at each start of the host."""
    image = f"{SWAP_FOLDER}/{kind}.img"
    host.run(
        f"truncate -s {mib}M {image} && mkfs.{kind} -q {image} && mkdir -p {folder}"
        f" && echo '{image} {folder} {kind} loop 0 0' >>/etc/fstab && systemctl daemon-reload && mount {folder}"
    )


# --- all of it, on a file system that is mounted at boot ----------------------------------------------------


def test_swap_limits_and_earlyoom_are_there_also_after_a_reboot_and_go_again(host, folder):
    machine, file = host("bookworm"), f"{folder}/recipe.swap"
    make_filesystem(machine, "ext4", folder)
    before = machine.state()

    provision(machine, *ONLY, memory_swap_folder=folder)
    assert swapped_mib(machine, file) == pytest.approx(256, abs=0.1)
    assert machine.run(f"stat -c '%a %U:%G %s' {file}").stdout == f"600 root:root {256 << 20}\n"
    assert memory_can_be_locked(machine)
    first_to_go(machine)
    second = provision(machine, *ONLY, memory_swap_folder=folder)
    assert second.recap["changed"] == 0, second.tasks_changed

    machine.reboot()
    assert swapped_mib(machine, file) == pytest.approx(256, abs=0.1)
    # On Debian / is read-only until then.
    assert "systemd-remount-fs.service" in machine.run("systemctl show -p After recipe-swap").stdout
    assert machine.read("/proc/sys/vm/swappiness").strip() == "10"
    assert machine.run("systemctl is-active earlyoom").stdout.strip() == "active"

    unprovision(machine)  # which is not told the folder
    assert swapped_mib(machine, file) is None
    assert machine.run(f"ls -A {folder}").stdout.split() == ["lost+found"]
    assert machine.read("/proc/sys/vm/swappiness").strip() == "60"
    assert difference(before, machine.state()) == []


def memory_can_be_locked(machine):
    """Where the lab's root may not raise limits, what PAM makes of ours is seen in its log."""
    if machine.run("su - owner -c 'ulimit -l'").stdout.strip() == "unlimited":
        return True
    machine.run("cp /etc/pam.d/su /tmp/su && sed -i 's/pam_limits.so/& debug/' /etc/pam.d/su")
    machine.run("su - owner -c true; su - guest -c true; cp /tmp/su /etc/pam.d/su")
    log = machine.run("journalctl --sync && journalctl --identifier su --output cat").stdout
    tried = "Could not set limit for 'memlock' to soft=-1, hard=-1" in log
    return tried and log.count("processing - memlock unlimited for USER") == 1  # the owner's, not the guest's


def first_to_go(machine):
    """What earlyoom would end if RAM ran out now, with the arguments that it runs with."""
    pid = machine.run("systemctl show --property MainPID --value earlyoom").stdout.strip()
    words = machine.run(f"cat /proc/{pid}/cmdline").stdout.split("\0")[1:-1]
    arguments = dict(zip(words[::2], words[1::2], strict=True))
    assert (arguments["-m"], arguments["-s"]) == ("4", "50")
    preferred = f"--prefer '{arguments['--prefer']}' --avoid '{arguments['--avoid']}'"
    machine.put("/tmp/eater.py", EATER)
    # The larger ones are not to be ended for it.
    for name, mib in (
        ("sshd", 90),
        ("dockerd", 90),
        ("tmux: server", 90),
        ("gnome-shell", 90),
        ("firefox", 60),
    ):
        start(machine, name, mib)
    for name in ("python3", "python3.11", "pt_main_thread", "recipe"):
        eater = start(machine, name, 30)
        assert victim(machine, preferred) == (eater, name)
        machine.run(f"kill {eater}")
    assert victim(machine, preferred)[1] == "firefox", "before those that are avoided"


def start(machine, name, mib):
    """The process id of a program of this name and size."""
    return machine.run(f"python3 /tmp/eater.py '{name}' {mib} >/dev/null 2>&1 & echo $!").stdout.strip()


def victim(machine, preferred):
    """(pid, name) of what a dry run says that it ends; everything is below its thresholds."""
    for _ in range(20):  # until what was started has its memory
        said = machine.run(f"timeout 0.3 earlyoom -m 99 -s 100 -r 0 --dryrun {preferred} 2>&1 | cat").stdout
        found = re.findall(r'sending SIGTERM to process (\d+) uid \d+ "(.+?)"', said)
        if len(set(found)) == 1:
            return found[0]
    raise AssertionError(said)


# --- other file systems -------------------------------------------------------------------------------------


def test_swap_files_of_xfs_and_btrfs_and_one_that_moves(host, folder):
    machine = host("trixie")
    machine.run(
        "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y xfsprogs btrfs-progs"
    )
    for kind in ("xfs", "btrfs"):
        make_filesystem(machine, kind, f"{folder}-{kind}")
    machine.run("apt-get -qq purge -y xfsprogs btrfs-progs")  # which the role does not need

    # After a play that was stopped at the worst moment: a file in use cannot be replaced.
    part = f"{folder}-xfs/recipe.swap.part"
    machine.run(f"fallocate -l 20M {part} && chmod 600 {part} && mkswap {part} && swapon {part}")
    provision(machine, *ONLY, memory_swap_folder=f"{folder}-xfs", memory_swap_gib=1, memory_earlyoom=False)
    assert machine.run(f"stat -f -c %T {folder}-xfs").stdout == "xfs\n"
    assert swapped_mib(machine, f"{folder}-xfs/recipe.swap") == pytest.approx(1024, abs=0.1)
    assert swapped_mib(machine, part) is None

    provision(machine, *ONLY, memory_swap_folder=f"{folder}-btrfs", memory_earlyoom=False)
    assert machine.run(f"stat -f -c %T {folder}-btrfs").stdout == "btrfs\n"
    file = f"{folder}-btrfs/recipe.swap"
    assert swapped_mib(machine, file) == pytest.approx(256, abs=0.1)
    assert "C" in machine.run(f"lsattr {file}").stdout.split()[0], "not copied on write"
    assert swapped_mib(machine, f"{folder}-xfs/recipe.swap") is None
    assert machine.run(f"ls -A {folder}-xfs").stdout == "", "the file is one, and has moved"

    # What cannot be is said in a line, and nothing is left of the attempt; what was there is on as before.
    full = provision(
        machine,
        *ONLY,
        memory_swap_folder=f"{folder}-xfs",
        memory_swap_gib=2,
        memory_earlyoom=False,
        check=False,
    )
    assert re.search(
        rf"{folder}-xfs/recipe.swap: 2(.0)? GiB cannot be made on xfs \(fallocate: .*No space left on device\);\s+make room",
        full.stdout,
    ), full.stdout
    assert machine.run(f"ls -A {folder}-xfs").stdout == ""
    assert swapped_mib(machine, file) == pytest.approx(256, abs=0.1)
    unprovision(machine, *ONLY)
    assert swapped_mib(machine, file) is None
    assert machine.run(f"ls -A {folder}-btrfs").stdout == ""


# --- zram ---------------------------------------------------------------------------------------------------


@contextmanager
def the_zram_device(machine):
    """/dev/zram0 is the kernel's, so one session's at a time; and none where this machine itself uses it."""
    with (CACHE / "zram.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        size = Path("/sys/block/zram0/disksize")
        if not size.exists() or size.read_text().strip() != "0":
            lacks("this machine's kernel has no /dev/zram0 that is free")
        try:
            yield
        finally:
            machine.run("swapoff /dev/lab-zram0; echo 1 >/sys/block/zram0/reset", check=False)


def test_zram(host, folder):
    machine = host("trixie")
    before = machine.state()
    settings = {"memory_swap": "zram", "memory_swap_gib": 0.25, "memory_swap_folder": folder}

    # In a container it is only set up.
    contained = provision(machine, *ONLY, **settings)
    assert "zram is set up but not in use: this is a container (docker)" in contained.stdout
    made = generated(machine)
    assert "What=/dev/zram0" in made["dev-zram0.swap"] and "swap.target.wants/dev-zram0.swap" in made
    assert "BindsTo=dev-%i.swap" in made["systemd-zram-setup@zram0.service.d/bindings.conf"]

    # Where it is no container, as far as the role can see, it is also started.
    machine.run("rm /.dockerenv")
    # systemd knows no swap units in a container; this does what the generated one does, under a name that no other
    # host's end takes for its own.
    generator = "/usr/lib/systemd/system-generators/zram-generator"
    machine.put(
        "/run/systemd/system/systemd-zram-setup@zram0.service.d/bindings.conf",
        "[Service]\nExecStartPost=/bin/sh -c 'cp -a /dev/zram0 /dev/lab-zram0 && swapon /dev/lab-zram0'\n"
        f"ExecStop=\nExecStop=/sbin/swapoff /dev/lab-zram0\nExecStop={generator} --reset-device zram0\n",
    )
    with the_zram_device(machine):
        provision(machine, *ONLY, **settings)
        assert swapped_mib(machine, "/dev/lab-zram0") == pytest.approx(256, abs=0.1)
        second = provision(machine, *ONLY, **settings)
        assert second.recap["changed"] == 0, second.tasks_changed
        unprovision(machine)
        assert swapped_mib(machine, "/dev/lab-zram0") is None
        assert machine.read("/sys/block/zram0/disksize") == "0\n"
    assert difference(before, machine.state()) == []


def generated(machine):
    """{name: text} of the units that zram-generator makes of what the role wrote, outside of a container."""
    machine.run(
        "mkdir -p /tmp/root/proc /tmp/root/etc /tmp/root/usr/lib /tmp/units && cp -r /etc/systemd /tmp/root/etc"
        " && cp -r /usr/lib/systemd /tmp/root/usr/lib && cp /proc/meminfo /proc/cmdline /tmp/root/proc"
        " && ZRAM_GENERATOR_ROOT=/tmp/root /usr/lib/systemd/system-generators/zram-generator /tmp/units"
    )
    names = machine.run("cd /tmp/units && find . ! -type d -printf '%P\n'").stdout.split()
    return {name: machine.read(f"/tmp/units/{name}") for name in names}
