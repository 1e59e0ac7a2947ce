"""`make demo RUNTIME=docker`: the whole job in the CPU image, on a real model, without a network after its first stage."""

import re

import pytest

from recipe.files import read_json
from tests.docker.calls import CALLER, make
from tests.docker.conftest import checkout, copy_of_the_sources, engine, image  # noqa: F401

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.registered]


def test_the_demo_in_the_container(checkout):  # noqa: F811
    done = make(checkout, "demo", "RUN=shown", timeout=1800)
    print(done.stderr, done.stdout, sep="\n")
    assert done.returncode == 0
    assert done.stderr.startswith("runtime: container qlora-70b-recipe:cpu (sha256:")
    for number, stage in enumerate(("plan", "prepare", "preflight", "train", "export", "eval"), 1):
        assert re.search(rf"^\[{number}/6\] {stage}: ", done.stderr, re.MULTILINE)
    result = read_json(checkout / "runs/shown/demo.json")
    gain = (
        100
        * (result["tuned"]["exact_matches"] - result["base"]["exact_matches"])
        / result["tuned"]["prompts"]
    )
    assert gain >= 40
    assert (checkout / "runs/shown/adapters/adapter_model.safetensors").stat().st_uid == CALLER[0]
    again = make(checkout, "demo", "RUN=shown", timeout=1800)
    assert again.returncode == 0 and "done already" in again.stderr
