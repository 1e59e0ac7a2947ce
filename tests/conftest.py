"""Order and marks of the tests, and small models that several of them share."""

import os
from pathlib import Path

import pytest

from tests.clones import clone  # noqa: F401, a fixture of two files

# Minutes each; `make test-long` runs them and nothing else.
collect_ignore = [] if os.environ.get("RECIPE_LONG") else ["long"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files that are slow as a whole come last, so that what is broken shows early.
    items.sort(key=lambda item: item.getparent(pytest.Module).get_closest_marker("slow") is not None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        if config.option.markexpr.strip() == "gpu":  # asked for: skipping all of them would look like success
            raise pytest.UsageError(
                "-m gpu: torch finds no NVIDIA GPU here; `make preflight` looks for the reason"
            )
        for item in marked:
            item.add_marker(
                pytest.mark.skip(reason="needs an NVIDIA GPU (torch.cuda.is_available() is False)")
            )


@pytest.fixture(scope="session")
def nf4_model(tmp_path_factory):
    """nf4_model(family="llama", tied=False, ...): folder of a tiny NF4 checkpoint, made once per session. Read only.

    Its unquantised source lies beside it, in `source_of(folder)` (tests/models.py).
    """
    from tests.models import tiny_nf4

    made: dict[tuple, Path] = {}

    def get(**options) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tiny_nf4(tmp_path_factory.mktemp("model"), **options)
        return made[key]

    return get
