"""tests/provision/test_make_provision.py on Debian 13, with its newer Python."""

import pytest

from tests.provision.test_make_provision import as_its_owner_types_it

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]


def test_as_its_owner_types_it_on_trixie(host):
    as_its_owner_types_it(host("trixie"))
