"""`make build-check`: the image has one digest however often it is built from nothing."""

import re

import pytest

from tests.docker.calls import ROOT, make
from tests.docker.conftest import engine, image  # noqa: F401

pytestmark = [pytest.mark.docker, pytest.mark.slow]


def test_two_builds_from_nothing_and_a_third_have_one_digest(request):
    done = make(ROOT, "build-check")
    assert done.returncode == 0, done.stderr
    digest = re.fullmatch(r"two builds from nothing, one digest: (sha256:[0-9a-f]{64})\n", done.stdout)[1]
    third = request.getfixturevalue("image")  # made only now: it finds all steps done
    assert third.record["digest"] == digest
