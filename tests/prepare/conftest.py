"""A published model and the hub that serves it."""

import shutil

import pytest

from recipe.prepare import prepare
from recipe.settings import from_dict
from tests.models import tiny_checkpoint
from tests.prepare.fake_hub import FakeHub, weights_of


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny", shard_size="200KB")


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    folder = shutil.copytree(published, tmp_path / "published")
    with FakeHub(folder) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        yield hub


@pytest.fixture(scope="module")
def expected(published, tmp_path_factory):
    """The quantised weights, made from the local folder."""
    models = tmp_path_factory.mktemp("expected")
    return weights_of(
        prepare(from_dict({"model": {"id": str(published)}, "paths": {"models": str(models)}})).folder
    )
