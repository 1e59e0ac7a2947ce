"""In our container: data from a hub where there is no network, and remedies that hold there."""

import dataclasses
import sys

import pytest

from recipe import container
from recipe.data.rows import held_out_rows, training_rows
from recipe.errors import UserError
from recipe.preflight import host, software
from recipe.settings import Data
from tests.preflight.test_preflight_checks import context


@pytest.mark.parametrize(
    ("read", "data", "remedy"),
    [
        (training_rows, {"path": "org/rows"}, "to a JSONL file and pass DATA=FILE"),
        (
            held_out_rows,
            {"path": "demo", "eval_path": "org/rows"},
            "to a JSONL file and set data.eval_path to it",
        ),
    ],
)
def test_without_network_a_hub_data_set_is_refused_before_it_is_asked_for(monkeypatch, read, data, remedy):
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    with pytest.raises(UserError) as refused:
        list(read(Data(**data)))
    said = str(refused.value)
    assert "is `org/rows`: is no local file" in said and "no network, by design" in said
    assert said.endswith(remedy) and "\n" not in said


def test_without_network_a_file_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert len(list(training_rows(Data(path=str(tmp_path / "rows.jsonl"))))) == 1


@pytest.mark.parametrize("value", [None, "", "host"])
def test_any_other_network_is_one(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("RECIPE_NETWORK", raising=False)
    else:
        monkeypatch.setenv("RECIPE_NETWORK", value)
    container.require_network("nothing", "nothing")


REMEDIES = {
    "shm": (host.shm, {"machine": {"shm_total_gib": 0.0625}}, "compose.yaml sets shm_size", "--shm-size"),
    "torch": (software.torch_imports, {"stack": {"torch": "2.10.1"}}, "make build", "make setup"),
    "CPU build": (software.torch_sees_gpus, {"stack": {"cuda": None, "gpus": 0}}, "make build", "make setup"),
    "bitsandbytes": (software.nf4, {"stack": {"nf4_error": 1.4}}, "make build", "make setup"),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_remedies_are_those_of_the_place(monkeypatch, name):
    check, broken, inside, outside = REMEDIES[name]
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:abc")
    result = check(context(**broken))
    assert result.status == "fail" and inside in result.remedy and outside not in result.remedy
    for empty in (True, False):  # an image that was built without a digest, and no image
        monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "") if empty else monkeypatch.delenv("RECIPE_IMAGE_DIGEST")
        assert outside in check(context(**broken)).remedy


def test_missing_packages_in_the_image(monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:abc")
    (tmp_path / "requirements-gpu.lock").write_text("torch==2.13.0\n")
    monkeypatch.setattr(software, "_installed", lambda name: None)
    result = software.versions(dataclasses.replace(context(), lock_folder=tmp_path))
    assert result.status == "fail" and "make build" in result.remedy
