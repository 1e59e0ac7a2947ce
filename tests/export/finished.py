"""A finished run with its exported adapters, made once for all tests of a session."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import shutil
import tempfile
from pathlib import Path

from recipe.cli import main
from tests.train.tiny_run import plain_run

LLAMA_LICENCE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n\nLlama 3.1 Version Release Date: July 23, 2024\n"


@functools.cache
def finished_run() -> Path:
    """The run's folder. Read only."""
    root = Path(tempfile.mkdtemp(prefix="finished-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    shutil.copytree(plain_run(), root / "good")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["export", "--run", "good", "--set", f"paths.runs={root}"]) == 0
    return root / "good"


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
