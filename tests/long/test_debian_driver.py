"""Debian's own driver, of its non-free component: really installed, its module really built by DKMS, and taken back.

Where an older branch is enough (driver_branch=535), `driver_source: auto` takes it. What no machine without a GPU can do is
load the module: the play says that a reboot is needed, or goes on with reboot=no.
"""

import pytest

from tests.provision import standins
from tests.provision.conftest import debian_mirror, host, host_images, mirror, ssh_key  # noqa: F401
from tests.provision.lab import difference
from tests.provision.plays import TWO_CARDS, provision, unprovision

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


@pytest.mark.parametrize(
    "release, branch, package",
    [("bookworm", 535, "nvidia-open-kernel-dkms"), ("trixie", 550, "nvidia-open-kernel-dkms")],
)
def test_debians_driver_is_installed_and_built(host, release, branch, package):  # noqa: F811
    machine = host(release)
    kernel = standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS)
    before = machine.state()

    first = provision(machine, "--tags", "driver", check=False, driver_branch=branch)
    assert first.returncode and "reboot (`sudo reboot`), then run the same command again" in first.stdout, (
        first.stdout
    )
    assert f", {kernel}, x86_64: installed" in machine.run("dkms status").stdout
    version = machine.run(f"dpkg-query -W -f '${{Version}}' {package}").stdout
    built = machine.run(
        f"modinfo -F version $(find /lib/modules/{kernel}/updates/dkms -name 'nvidia*.ko*' | head -1)"
    ).stdout
    assert version.startswith(f"{branch}.") and version.startswith(built.strip())
    assert package in machine.run("apt-mark showhold").stdout.split()

    second = provision(machine, "--tags", "driver", driver_branch=branch, reboot="no")
    assert second.recap["changed"] == 0, second.tasks_changed
    unprovision(machine)
    assert difference(before, machine.state()) == []
