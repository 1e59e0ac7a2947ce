"""The promise of the playbook on Debian 12, whose engine is Docker's own; tests/provision/test_provision.py has Debian 13."""

import pytest

from tests.provision.test_provision import there_and_back

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_bare_provisioned_unchanged_and_taken_back_on_debian_12(host):
    there_and_back(host("bookworm"), engine="docker-ce")
