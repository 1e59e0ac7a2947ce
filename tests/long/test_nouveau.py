"""A machine whose cards nouveau drives: the play goes on to the reboot that frees them, and from there."""

import pytest

from tests.provision import standins
from tests.provision.plays import TWO_CARDS, provision
from tests.provision.test_failure_paths import last_words, look, refused, table

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_nouveau_holds_the_cards_until_a_reboot(host):
    machine = host("bookworm")
    standins.kernel(machine)
    standins.gpus(machine, TWO_CARDS, driver="nouveau")
    assert "`-e reboot=yes` or `ask`" in refused(look(machine, reboot="no"), "nouveau")["nouveau"]
    found = table(look(machine))
    assert "WARN nouveau it drives 0000:01:00.0, 0000:02:00.0 expected: NVIDIA's driver" in found
    assert "-> it goes on: nouveau is blacklisted; a reboot follows" in found

    said = last_words(provision(machine, "--tags", "driver", check=False))
    assert said.startswith("the driver is installed but does not answer yet (NVIDIA-SMI has failed")
    assert "reboot (`sudo reboot`), then run the same command again: it goes on from here" in said
    assert "(nouveau holds 0000:01:00.0, 0000:02:00.0 until then)" in said
    machine.reboot()
    again = provision(machine, "--tags", "driver")
    assert again.recap["changed"] == 0, again.tasks_changed
    assert machine.run("nvidia-smi -L").stdout.count("RTX 3090") == 2

    # A new kernel that DKMS could not build for: to reboot again and again would not help.
    machine.run("modprobe -r nvidia; rm /lib/modules/$(uname -r)/updates/dkms/nvidia.ko*")
    said = last_words(provision(machine, "--tags", "driver", check=False, reboot=True))
    assert "its module was not built for kernel" in said and "so no reboot helps: `dkms status`" in said
    machine.run("test ! -e /run/systemd/shutdown/scheduled")
