"""A fresh clone's scripts, for the tests of set-up, locks and make: loaded here, or run in a folder of their own."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makefile_words(head):
    """What a line of the Makefile lists, over its continuations."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    return re.search(rf"^{head} (.*)", text, re.MULTILINE).group(1).split()


setup, lock = script("setup"), script("lock")
MAKE_SETTINGS = makefile_words("export")


@pytest.fixture
def clone(tmp_path):
    """What set-up needs of a fresh clone, without a .venv."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in setup.LOCKS.values():
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "Makefile", folder)
    return folder


def environment(**changes):
    """This process's environment, without anything that steers make, set-up or pip, and then the changes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS"))}
    for name in MAKE_SETTINGS:  # `make test` hands its own on
        kept.pop(name, None)
    return kept | {"PIP_CONFIG_FILE": os.devnull, "FLAVOUR": "cpu"} | changes
