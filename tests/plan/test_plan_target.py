"""What is planned for: this machine, another, or cards that differ."""

import dataclasses

import pytest

from recipe.hardware import Gpu, probe
from recipe.plan import make_plan, render, target_of
from recipe.plan.cards import card_called, card_in
from recipe.settings import from_dict

LLAMA_70B = "meta-llama/Llama-3.1-70B"


def machine(*names, memory_gib=24.0, **changes):
    gpus = [Gpu(i, name, memory_gib, memory_gib - 0.3, (8, 6), "580.95") for i, name in enumerate(names)]
    return dataclasses.replace(probe(), gpus=gpus, **changes)


def settings(**sections):
    return from_dict({"model": LLAMA_70B, **sections})


def test_cards_are_known_by_their_whole_name():
    assert card_in("NVIDIA GeForce RTX 3090 Ti").name == "RTX 3090 Ti"
    assert card_in("NVIDIA GeForce RTX 3090").name == "RTX 3090"
    assert card_in("NVIDIA H100 80GB HBM3").name == "H100"
    assert card_in("NVIDIA RTX 6000 Ada Generation") is None
    assert card_called("4090") == card_called("rtx 4090") == card_called(" RTX 4090 ")


def test_unequal_cards_are_planned_as_they_are():
    """The smaller one decides what fits, the slower one how long it takes, and both draw power."""

    def plan(**described):
        return make_plan(settings(train={"micro_batch_tokens": 2048}), ram_gib=64.0, **described)

    mixed = plan(gpus=2, vram_gib=[24, 16], card_names=["4090", "4080"])
    both_small = plan(gpus=2, vram_gib=16, card_names="4080")
    assert mixed.fits and mixed.placement == both_small.placement
    assert mixed.vram_gib == 16 and mixed.vram_each_gib == (24, 16)
    assert mixed.duration.tokens_per_second == both_small.duration.tokens_per_second
    assert mixed.duration.watts > both_small.duration.watts
    assert "2 GPUs of 24.0 and 16.0 GiB" in render(mixed)
    too_small = plan(gpus=2, vram_gib=[24, 6], card_names=["4090", "4080"])
    assert "there on the smallest of 24, 6" in too_small.reasons[0]


def test_cards_bring_their_memory_and_their_number():
    assert target_of(card_names=["3090", "4080"]).vram_gib == (24, 16)
    assert target_of(gpus=4, card_names="5090").vram_gib == (32,) * 4
    assert target_of(vram_gib=[24, 16]).gpus == 2


def test_a_described_machine_is_not_this_one():
    mine = machine("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090")
    here = target_of(mine)
    assert here.here and here.gpus == 2 and here.card.name == "RTX 3090" and not here.cards_assumed
    assert here.ram_gib == mine.usable_ram_gib
    other = target_of(mine, gpus=4, vram_gib=24)
    assert not other.here and other.ram_gib is None and other.cards_assumed
    one = target_of(mine, gpus=1)
    assert one.gpus == 1 and one.card.name == "RTX 3090"


def test_ranks_use_the_first_cards():
    plan = make_plan(
        settings(compute={"processes": 1}),
        gpus=2,
        vram_gib=[24, 8],
        card_names=["3090", "3060"],
        ram_gib=64.0,
    )
    assert plan.fits and plan.world_size == 1 and plan.vram_each_gib == (24,) and plan.cards == ("RTX 3090",)


@pytest.mark.parametrize("gpus", [1, 2])
def test_auto_takes_the_tokens_that_are_fastest(gpus):
    def plan(tokens):
        run = settings(train={"micro_batch_tokens": tokens}, data={"max_length": 512})
        return make_plan(run, gpus=gpus, vram_gib=24, card_names="4090", ram_gib=64.0)

    auto = plan("auto")
    fixed = [plan(tokens) for tokens in (512, 1024, 2048, 4096, 8192)]
    best = max(each.duration.tokens_per_second for each in fixed if each.fits)
    assert auto.fits and auto.duration.tokens_per_second * 1.015 >= best
    assert auto.micro_batch_tokens in (512, 1024, 2048, 4096, 8192, 16384)
    decided = auto.decided(settings())
    assert decided.train.micro_batch_tokens == auto.micro_batch_tokens == decided.micro_batch_tokens


def test_auto_on_a_cpu_is_the_length_of_a_row():
    assert make_plan(from_dict({"model": "demo"}), gpus=0, ram_gib=16.0).micro_batch_tokens == 1024
