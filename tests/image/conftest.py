"""A checkout of its own, and a Docker that is none, for the tests of scripts/run.py and scripts/image.py."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.image.fake_docker import FakeDocker

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # scripts import one another by their names

COPIED = ("scripts", "image", "recipe", "Makefile", "Dockerfile", "compose.yaml", ".dockerignore", "LICENSE")


@pytest.fixture
def checkout(tmp_path):
    """All that a container image and its start are made of, without .venv, models or runs."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for path in [*(ROOT / name for name in COPIED), *ROOT.glob("requirements*"), ROOT / "pyproject.toml"]:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(path, folder)
    # Where GPUs are described on the machine that runs the tests shall not matter.
    engine = folder / "scripts/engine.py"
    told = '("/etc/cdi", "/var/run/cdi")'
    assert told in engine.read_text()
    engine.write_text(engine.read_text().replace(told, f'("{folder.parent}/cdi",)'))
    return folder


@pytest.fixture
def docker(tmp_path):
    return FakeDocker(tmp_path / "bin")


@pytest.fixture
def environment(docker):
    """environment(NAME=value, …): nothing but PATH, to the fake docker, and what is given."""

    def made(**changes):
        kept = {"PATH": str(docker.folder), "HOME": os.devnull, "LC_ALL": "C.UTF-8", "FLAVOUR": "cpu"}
        return {name: value for name, value in (kept | changes).items() if value is not None}

    return made
