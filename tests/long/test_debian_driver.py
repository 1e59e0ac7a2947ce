"""Debian 12's own driver, of its non-free component: really installed, its module really built by DKMS, and taken back.

Where an older branch is enough (driver_branch=535), `driver_source: auto` takes it. What no machine without a GPU can do is
load the module: the play says that a reboot is needed, or goes on with reboot=no.

The kernel is not Debian's newest: since 6.1.187 and 6.12.107 neither Debian 12's 535.261.03 nor Debian 13's 550.163.01 can be
compiled (pci_resize_resource has another argument; seen on 2026-11-25).
"""

import pytest

from tests.provision import standins
from tests.provision.lab import difference
from tests.provision.plays import TWO_CARDS, provision, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


BRANCH, PACKAGE, OLD_KERNEL = 535, "nvidia-open-kernel-dkms", "6.1.0-47-amd64"


def test_debians_driver_is_installed_and_built(host):
    machine = host("bookworm")
    kernel = standins.kernel(machine, OLD_KERNEL)
    standins.gpus(machine, TWO_CARDS)
    machine.run(f"apt-get install -qq -y --no-install-recommends linux-headers-{kernel}")
    before = machine.state()

    wanted = {"driver_branch": BRANCH, "driver_headers": False}
    first = provision(machine, "--tags", "driver", check=False, **wanted)
    said = " ".join(first.stdout.split())
    assert first.returncode and "reboot (`sudo reboot`), then run the same command again" in said, (
        first.stdout
    )
    assert f", {kernel}, x86_64: installed" in machine.run("dkms status").stdout
    version = machine.run(f"dpkg-query -W -f '${{Version}}' {PACKAGE}").stdout
    module = machine.run(
        f"find /lib/modules/{kernel}/updates/dkms -name 'nvidia-current-open.ko*' -o -name 'nvidia.ko*'"
    ).stdout
    built = machine.run(f"modinfo -F version {module.split()[0]}").stdout.strip()
    assert version.startswith(f"{BRANCH}.") and version.startswith(built)
    assert PACKAGE in machine.run("apt-mark showhold").stdout.split()

    second = provision(machine, "--tags", "driver", reboot="no", **wanted)
    assert second.recap["changed"] == 0, second.tasks_changed
    unprovision(machine)
    assert difference(before, machine.state()) == []
