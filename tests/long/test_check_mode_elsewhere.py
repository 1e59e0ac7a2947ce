"""tests/provision/test_check_mode.py on Debian 12, and on an Ubuntu 22.04 made of it."""

import pytest

from tests.provision.test_check_mode import all_is_shown, ubuntus_own_packages_are_chosen

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_all_is_shown_and_nothing_changed_on_bookworm(host, mirror):
    all_is_shown(host("bookworm"), mirror, "bookworm")


def test_on_ubuntu_22_its_own_packages_are_chosen(host, mirror):
    ubuntus_own_packages_are_chosen(host("bookworm"), mirror, "22.04")
