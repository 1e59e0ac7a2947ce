"""What a machine may lack: there a test that needs it is skipped, but in CI it fails, so that no skip hides a failure."""

import os
import subprocess
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("RECIPE_REQUIRE_DOCKER"))


def needs(there: bool, what: str) -> pytest.MarkDecorator:
    """Mark a test; in CI it runs in any case."""
    return pytest.mark.skipif(not there and not IN_CI, reason=f"needs {what}")


def engine_answers(*plugins: str) -> bool:
    """Whether a Docker engine is at work, and the client has these plugins."""
    # `docker buildx ls` ends with 0 without an engine too.
    commands = [["docker", "version"], *(["docker", plugin, "version"] for plugin in plugins)]
    try:
        return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    except FileNotFoundError:
        return False


def lacks(what: str) -> NoReturn:
    """End a test that this machine cannot run."""
    pytest.fail(f"in CI: {what}") if IN_CI else pytest.skip(what)
