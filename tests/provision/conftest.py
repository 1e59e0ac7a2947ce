"""What the tests on throw-away hosts share: their images, their network, and a factory of hosts.

They need root (for debootstrap) and a Docker engine. Without, they are skipped; in CI (RECIPE_REQUIRE_DOCKER) they fail.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machine import engine_answers, lacks
from tests.provision import lab, standins
from tests.provision.standin.mirror import Mirror


def _missing() -> str | None:
    if os.getuid() != 0:
        return "needs root, to make the hosts' images"
    return None if engine_answers() else "needs a Docker engine"


@pytest.fixture(scope="session")
def debian_mirror() -> Iterator[Mirror]:
    """Debian's mirror, as the hosts see it."""
    if missing := _missing():
        lacks(missing)
    with lab.start_mirror() as mirror:
        yield mirror
    lab.remove_committed()


@pytest.fixture(scope="session")
def host_images(debian_mirror) -> dict[str, str]:
    """{release: image} of the bare hosts."""
    return lab.make_images(debian_mirror)


@pytest.fixture(scope="session")
def mirror(debian_mirror, host_images) -> Mirror:
    """The network of the hosts: Debian, and stand-ins of the vendors' repositories."""
    standins.serve_repositories(debian_mirror, host_images)
    return debian_mirror


@pytest.fixture(scope="session")
def ssh_key(tmp_path_factory) -> Path:
    return lab.make_key(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def host(mirror, ssh_key):
    """host("bookworm"): a host of this test alone; host("trixie", image=…): from what another's `commit` made."""
    with ExitStack() as hosts:
        yield lambda release, image=None: hosts.enter_context(lab.Host(release, mirror, ssh_key, image))
    mirror.up()
