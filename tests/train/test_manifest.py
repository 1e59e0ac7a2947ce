"""Where a run's code came from: the checkout's commit, or the one that the image was built from."""

import subprocess
from pathlib import Path

import pytest

from recipe.hardware import probe
from recipe.prepare import Prepared
from recipe.settings import from_dict
from recipe.train import manifest
from recipe.train.run import first_difference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def written(folder: Path) -> dict:
    settings = from_dict({"model": "demo", "data": {"path": "demo"}})
    return manifest.manifest(
        settings,
        Prepared(folder, "demo", None, fresh=False),
        probe(),
        2,
        {},
        {"train": ["0" * 64], "held_out": []},
    )


@pytest.fixture
def image(tmp_path, monkeypatch):
    """The code in a folder that is no checkout, as in the image, with the locks beside the package."""
    (tmp_path / "requirements-gpu.lock").write_text("torch==2.13.0\n")
    monkeypatch.setattr(manifest, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("RECIPE_COMMIT", COMMIT)
    return tmp_path


def test_a_checkout_has_its_own_commit(image):
    git = ["git", "-C", str(image), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    commit = written(image)["git_commit"]
    assert commit == subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip() != COMMIT


def test_the_image_names_the_commit_that_it_was_built_from_and_its_locks(image):
    found = written(image)
    assert found["git_commit"] == COMMIT
    assert list(found["lock_sha256"]) == ["requirements-gpu.lock"]


def test_the_image_has_no_git(image, monkeypatch):
    (image / "bin").mkdir()
    monkeypatch.setenv("PATH", str(image / "bin"))
    assert written(image)["git_commit"] == COMMIT


@pytest.mark.parametrize("value", ["", None])
def test_what_is_not_known_is_null(image, monkeypatch, value):
    for name in ("RECIPE_COMMIT", "RECIPE_IMAGE_DIGEST"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    found = written(image)
    assert found["git_commit"] is None and found["image_digest"] is None


def test_the_images_digest_is_written(image, monkeypatch):
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:abc")
    assert written(image)["image_digest"] == "sha256:abc"


def test_each_source_has_its_hash(tmp_path):
    """And of all of them one, so that a change in any is seen."""
    sources = [{"path": "a.jsonl", "weight": 0.5}, {"path": "org/rows"}]
    settings = from_dict({"model": "demo", "data": {"sources": sources}})
    prepared = Prepared(tmp_path, "demo", None, fresh=False)

    def data(*hashes):
        return manifest.manifest(settings, prepared, probe(), 2, {}, {"train": list(hashes), "held_out": []})[
            "data"
        ]

    found = data("1" * 64, "2" * 64)
    assert [(s["path"], s["weight"], s["sha256"][0]) for s in found["sources"]] == [
        ("a.jsonl", 0.5, "1"),
        ("org/rows", 1.0, "2"),
    ]
    assert found["sha256"] != data("1" * 64, "3" * 64)["sha256"] and len(found["sha256"]) == 64


def test_a_run_goes_on_only_with_the_sources_that_it_was_begun_with():
    old = from_dict({"data": {"sources": [{"path": "a.jsonl"}]}}).to_dict()
    new = from_dict({"data": {"sources": [{"path": "a.jsonl", "weight": 2}]}}).to_dict()
    assert first_difference(old, old) is None
    assert str(first_difference(old, new)).startswith("data.sources was [{'path': 'a.jsonl', 'weight': 1.0")
