"""`make build-check`: the image has one digest however often it is built from nothing, and another for another byte."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docker.calls import ROOT, environment, make
from tests.docker.conftest import copy_of_the_sources, engine, image  # noqa: F401

pytestmark = [pytest.mark.docker, pytest.mark.slow]


def test_two_builds_from_nothing_and_a_third_have_one_digest(request):
    done = make(ROOT, "build-check")
    assert done.returncode == 0, done.stderr
    digest = re.fullmatch(r"two builds from nothing, one digest: (sha256:[0-9a-f]{64})\n", done.stdout)[1]
    third = request.getfixturevalue("image")  # made only now: it finds all steps done
    assert third.record["digest"] == digest


def test_one_byte_of_the_sources_is_another_digest(image, copy_of_the_sources):  # noqa: F811
    """In a clone with its commit; that a clone as such has the same digest is what `make build-check` compares."""
    folder = copy_of_the_sources()
    shutil.copytree(ROOT / ".git", folder / ".git")
    for name in ("debs", "wheels"):
        source, copy = ROOT / "build/image" / name / "cpu", folder / "build/image" / name / "cpu"
        shutil.copytree(source, copy, copy_function=os.link)
    changed = folder / "recipe/errors.py"
    changed.write_bytes(changed.read_bytes().replace(b"a", b"b", 1))
    command = [sys.executable, "scripts/image.py", "digest"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", done.stdout)
    assert done.stdout.strip() != image.record["digest"]
