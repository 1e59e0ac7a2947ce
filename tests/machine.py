"""What a machine may lack: there a test that needs it is skipped, but in CI it fails, so that no skip hides a failure."""

import os
from typing import NoReturn

import pytest

IN_CI = bool(os.environ.get("RECIPE_REQUIRE_DOCKER"))


def needs(there: bool, what: str) -> pytest.MarkDecorator:
    """Mark a test; in CI it runs in any case."""
    return pytest.mark.skipif(not there and not IN_CI, reason=f"needs {what}")


def lacks(what: str) -> NoReturn:
    """End a test that this machine cannot run."""
    pytest.fail(f"in CI: {what}") if IN_CI else pytest.skip(what)
