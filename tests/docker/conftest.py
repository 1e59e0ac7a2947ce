"""What the tests with a real Docker engine share: the CPU image, built here, and a checkout to run it from."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.docker.calls import CALLER, ROOT, make
from tests.machine import engine_answers, lacks

MADE_FROM = (
    "Makefile",
    "Dockerfile",
    ".dockerignore",
    "compose.yaml",
    "LICENSE",
    "pyproject.toml",
    "scripts",
    "image",
    "recipe",
)


@pytest.fixture(scope="session", autouse=True)
def engine():
    if not engine_answers("buildx", "compose"):
        lacks("needs a Docker engine with buildx and compose")


@pytest.fixture(scope="session")
def image():
    """`make build FLAVOUR=cpu`: what it said and wrote, and the name of the image."""
    done = make(ROOT, "build")
    assert done.returncode == 0, done.stderr
    out = ROOT / "build/image"
    return SimpleNamespace(
        name="qlora-70b-recipe:cpu", said=done, out=out, record=json.loads((out / "cpu.json").read_text())
    )


@pytest.fixture(scope="session")
def copy_of_the_sources(tmp_path_factory):
    """copy(): a checkout of these sources, of which the image is not made again."""

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("checkout") / "recipe here"
        folder.mkdir()
        for name in MADE_FROM:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / name)
        for lock in ROOT.glob("requirements*"):
            shutil.copy2(lock, folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def checkout(image, copy_of_the_sources):
    folder = copy_of_the_sources()
    os.chown(folder, *CALLER)
    return folder
