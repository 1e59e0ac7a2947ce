"""A run that does not fit comes with the three cheapest ways out, and each of them fits when it is taken."""

import re

import pytest

from recipe.cli import main
from recipe.plan import plan_for, render, target_of, ways_out
from recipe.settings import from_dict

LLAMA_70B = "meta-llama/Llama-3.1-70B"
CONFIG = "recipe/configs/llama-3.1-70b.yaml"


def settings(**sections):
    return from_dict({"model": LLAMA_70B, **sections})


@pytest.mark.parametrize(
    ("sections", "target", "kinds"),
    [
        # Not enough RAM for the layers that one card has no room for.
        ({}, {"gpus": 1, "vram_gib": 24.0, "ram_gib": 16.0}, ["RAM", "more GPU", "GPUs with"]),
        # Too many tokens: shorter ones are free.
        (
            {"train": {"micro_batch_tokens": 65536, "global_batch_tokens": 131072}},
            {"gpus": 2, "vram_gib": 24.0, "ram_gib": 64.0},
            ["micro_batch_tokens=", "RAM"],
        ),
        ({"lora": {"rank": 512}}, {"gpus": 2, "vram_gib": 24.0, "ram_gib": 48.0}, ["lora.rank="]),
        ({}, {"gpus": 1, "vram_gib": 6.0, "ram_gib": 64.0}, ["GPUs with"]),
        ({"compute": {"processes": 3}, "train": {"global_batch_tokens": 3072}},
         {"gpus": 1, "vram_gib": 24.0, "ram_gib": 64.0}, ["compute.processes=auto"]),
        ({}, {"gpus": 2, "vram_gib": 24.0, "ram_gib": 64.0, "disk_gib": 100.0}, ["keep_source=false"]),
    ],
)  # fmt: skip
def test_every_way_fits(sections, target, kinds):
    run, machine = settings(**sections), target_of(**target)
    assert not plan_for(run, machine).fits
    ways = ways_out(run, machine)
    assert 1 <= len(ways) <= 3 and all(way.plan.fits for way in ways)
    for kind in kinds:
        assert any(kind in way.change for way in ways), [way.change for way in ways]


def test_what_costs_nothing_comes_first_and_another_model_last():
    run = settings(train={"micro_batch_tokens": 8192})
    changes = [way.change for way in ways_out(run, target_of(gpus=1, vram_gib=24.0, ram_gib=24.0))]
    assert changes[0].startswith("--set train.micro_batch_tokens=") and "GiB of RAM" in changes[1]
    small = [way.change for way in ways_out(settings(), target_of(gpus=1, vram_gib=8.0, ram_gib=12.0))]
    assert small[-1] == "--set model.id=meta-llama/Llama-3.1-8B"


def test_the_ram_that_is_named_is_the_least():
    run, machine = settings(), {"gpus": 1, "vram_gib": 24.0}
    (way,) = [w for w in ways_out(run, target_of(**machine, ram_gib=8.0)) if "GiB of RAM" in w.change]
    gib = int(way.change.split()[0])
    assert plan_for(run, target_of(**machine, ram_gib=gib)).fits
    assert not plan_for(run, target_of(**machine, ram_gib=gib - 1)).fits


def test_the_words_can_be_typed(capsys):
    """The first way, taken as it stands, fits."""
    machine = ["--gpus", "1", "--vram-gib", "24", "--ram-gib", "24"]
    asked = ["plan", "--config", CONFIG, *machine, "--set", "train.micro_batch_tokens=8192"]
    assert main(asked) == 1
    text = capsys.readouterr().out
    way = re.search(r"the cheapest first:\n  - ((--set \S+ ?)+)", text)
    assert way and main([*asked, *way[1].rstrip(": ").split()]) == 0


def test_a_run_that_fits_needs_none():
    run, machine = settings(), target_of(gpus=2, vram_gib=24.0, ram_gib=64.0)
    assert "What would fit" not in render(plan_for(run, machine))
