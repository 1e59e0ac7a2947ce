"""Hosts for the tests of the playbook that take minutes each (tests/provision/conftest.py)."""

from tests.provision.conftest import debian_mirror, host, host_images, mirror, ssh_key  # noqa: F401
