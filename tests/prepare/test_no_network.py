"""A container without network: what is there is used, and what is not there is refused at once, in one line."""

import shutil

import pytest

from recipe.cli import main
from recipe.errors import UserError
from recipe.prepare import demo, prepare
from recipe.showcase import CONFIG
from tests.prepare.fake_hub import settings_for, weights_of


@pytest.fixture
def no_network(monkeypatch):
    """Call it: from then on this is a container without network."""
    return lambda: monkeypatch.setenv("RECIPE_NETWORK", "none")


def refusal(settings):
    with pytest.raises(UserError) as caught:
        prepare(settings)
    assert "\n" not in str(caught.value)
    assert "this container has no network, by design; run `make prepare` first" in str(caught.value)
    return str(caught.value)


def test_the_demo_model_is_not_looked_for(tmp_path, monkeypatch, capsys, no_network):
    no_network()
    monkeypatch.setattr(demo, "_fetch", lambda scratch: pytest.fail("pip was called"))
    models = tmp_path / "models"
    assert main(["prepare", "--config", str(CONFIG), "--set", f"paths.models={models}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: model.id demo: {models / demo.NAME} is not there yet, and this container has no network, by design; "
        "run `make prepare` first"
    )
    assert not models.exists()


def test_the_demo_model_that_is_there_is_taken(tmp_path, no_network):
    no_network()
    (tmp_path / demo.NAME).mkdir()
    (tmp_path / demo.NAME / "model.safetensors").touch()
    assert demo.demo_checkpoint(tmp_path) == tmp_path / demo.NAME


@pytest.mark.parametrize("keep", [True, False])
def test_a_hub_model_is_not_asked_for(hub, tmp_path, no_network, keep):
    no_network()
    said = refusal(settings_for(tmp_path, keep=keep))
    assert said.startswith("model.id is `org/tiny`: its files are not in ")
    assert hub.requests == []


def test_a_hub_model_that_is_prepared_or_kept_needs_no_network(hub, expected, tmp_path, no_network):
    prepared = prepare(settings_for(tmp_path))
    asked = len(hub.requests)
    no_network()
    assert not prepare(settings_for(tmp_path)).fresh
    shutil.rmtree(prepared.folder)
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    assert len(hub.requests) == asked


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00002-of-"])
def test_a_file_of_it_that_is_missing_is_named(hub, tmp_path, no_network, name):
    shutil.rmtree(prepare(settings_for(tmp_path)).folder)
    (gone,) = (tmp_path / "models" / "org--tiny").glob(f"{name}*")
    gone.unlink()
    asked = len(hub.requests)
    no_network()
    assert f"{gone.name} is not in {gone.parent} yet" in refusal(settings_for(tmp_path))
    assert len(hub.requests) == asked


def test_a_copy_that_somebody_has_brought_is_taken(hub, expected, tmp_path, no_network):
    no_network()
    shutil.copytree(hub.folder, tmp_path / "models" / "org--tiny")
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
