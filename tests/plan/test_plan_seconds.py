"""The predicted seconds: near the measured ones, and moved by what moves them on a machine."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from recipe.plan import make_plan
from recipe.plan.budget import choose_placement
from recipe.plan.cards import CARDS, floor_seconds
from recipe.plan.choose import TIE
from recipe.plan.duration import HOST_WATTS, duration
from recipe.plan.memory import outside_allocator
from recipe.plan.parts import total_gib
from recipe.plan.placement import Placement
from recipe.plan.seconds import micro_batch_seconds, step_seconds
from recipe.plan.shapes import ModelShape, shape_of
from recipe.settings import from_dict

LLAMA_70B, LLAMA_8B = shape_of("llama-3.1-70b"), shape_of("llama-3.1-8b")
BY_NAME = {card.name: card for card in CARDS}
H100 = BY_NAME["H100"]


def layers(count):
    return dataclasses.replace(LLAMA_70B, layers=count)


def run(tokens, document=None, ranks=1, **compute):
    document = min(document or tokens, tokens)
    return from_dict(
        {
            "model": "meta-llama/Llama-3.1-70B",
            "data": {"max_length": document},
            "train": {"micro_batch_tokens": tokens, "global_batch_tokens": tokens * ranks},
            "compute": compute,
        }
    )


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, least and most, in `recipe bench` on one or two H100s (docs/benchmarks.md)."""

    least: float
    most: float
    shape: ModelShape
    tokens: int
    document: int | None = None
    ranks: int = 1
    cap_gib: float = 22.5
    ram_gib: float | None = None
    placement: Placement | None = None  # None: what auto chooses
    bound: float = 0.05

    @property
    def settings(self):
        return run(self.tokens, self.document, self.ranks)

    def placed(self):
        if self.placement:
            return self.placement
        vram_gib = self.cap_gib + total_gib(outside_allocator(self.ranks))
        return choose_placement(self.shape, self.settings, self.ranks, vram_gib, self.ram_gib, H100)


HEADLINE = Measured(2.828, 2.838, LLAMA_70B, 4096, ram_gib=42, placement=Placement(80, 47, 77, 0, 2048, 3))
NO_CAP = Measured(2.425, 2.463, LLAMA_70B, 4096, cap_gib=78)
RESIDENT = Placement(80, 0, 80, 0, 4096, 1)  # on two cards: 8,192 tokens, nothing offloaded
# Rank 0 of 2 whose peer does not exist: what it "gathers" is NaN from the first layer on, on which an H100 draws less
# power and runs faster than on numbers.
PEERLESS_LONG = Measured(27.7, 28.7, LLAMA_70B, 32768, ranks=2, ram_gib=118)
MEASURED = {
    "70B, 22.5 GiB": HEADLINE,
    "70B, no cap": NO_CAP,
    "two cards": Measured(6.118, 6.151, LLAMA_70B, 8192, ranks=2, placement=RESIDENT, bound=0.15),
    "two cards, two documents": Measured(
        6.053, 6.088, LLAMA_70B, 8192, 4096, ranks=2, placement=RESIDENT, bound=0.15
    ),
    "two cards, two documents, auto": Measured(
        6.066, 6.189, LLAMA_70B, 8192, 4096, ranks=2, ram_gib=32, bound=0.15
    ),
    "70B, rank 0 of 2, 32,768 tokens": PEERLESS_LONG,
    # A spread whose cause was not found; slower than predicted by 22 % in the middle.
    "8B": Measured(0.32, 0.47, LLAMA_8B, 4096, bound=0.15),
    "8 layers": Measured(0.256, 0.284, layers(8), 4096),
    "16 layers, two documents": Measured(1.177, 1.223, layers(16), 8192, 4096, placement=Placement(16)),
    "by hand, 8,192 tokens": Measured(
        5.92, 5.92, LLAMA_70B, 8192, 4096, placement=Placement(80, 48, 80, 0, 2048, 1)
    ),
    "by hand, 8 layers kept": Measured(
        2.94, 2.94, LLAMA_70B, 4096, placement=Placement(80, 46, 80, 8, 2048, 1)
    ),
    "by hand, chunks of 4,096": Measured(
        2.825, 2.825, LLAMA_70B, 4096, placement=Placement(80, 46, 75, 0, 4096, 1)
    ),
}


@pytest.mark.parametrize("measured", MEASURED.values(), ids=MEASURED)
def test_a_step_takes_what_was_measured(measured):
    peerless = measured is PEERLESS_LONG
    card = dataclasses.replace(H100, link_gb_per_second=float("inf")) if peerless else H100
    found = step_seconds(measured.shape, measured.settings, measured.ranks, card, measured.placed())
    assert measured.least * (1 - measured.bound) <= found <= measured.most * (1 + measured.bound)


def test_the_headlines_parts_are_what_the_profiler_saw():
    """2,104 ms of matrix products, 213 of attention, 274 element-wise, 131 of dequantisation, 925 of 954 copying."""
    found = micro_batch_seconds(LLAMA_70B, HEADLINE.settings, 1, H100, HEADLINE.placed())
    parts = [found.products, found.attention, found.element_wise, found.dequantisation, found.host_copies]
    assert parts == pytest.approx([2.104, 0.213, 0.274, 0.131, 0.925], rel=0.03)


def test_auto_is_as_fast_as_what_was_measured():
    auto = dataclasses.replace(HEADLINE, placement=None)
    seconds = [
        step_seconds(LLAMA_70B, HEADLINE.settings, 1, H100, place)
        for place in (auto.placed(), HEADLINE.placed())
    ]
    assert seconds[0] <= seconds[1] * TIE
    assert NO_CAP.placed() == Placement(80, 0, 0, 50, 2048, 3)


def rate(card, gpus, tokens=4096, document=1024, ram_gib=128.0, **compute):
    """Tokens per second of 70B on so many 24 GiB cards."""
    settings = run(tokens, document, gpus, **compute)
    placement = choose_placement(LLAMA_70B, settings, gpus, 24.0, ram_gib, card)
    return tokens * gpus / step_seconds(LLAMA_70B, settings, gpus, card, placement)


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 4090"])
def test_more_cards_train_more_tokens(name):
    rates = [rate(BY_NAME[name], gpus) for gpus in (1, 2, 4, 8)]
    assert rates == sorted(rates)


def test_fp16_sums_speed_up_geforce_cards_only():
    def gain(name, document):
        fp32, fp16 = (
            rate(BY_NAME[name], 2, 8192, document, dtype="fp16", accumulate=sums) for sums in ("fp32", "fp16")
        )
        return fp16 / fp32

    assert 1.3 < gain("RTX 3090", 8192) < gain("RTX 3090", 1024) < 2  # attention adds up in fp32 in any case
    assert gain("H100", 1024) == 1


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("accumulate", ["fp32", "fp16"])
@pytest.mark.parametrize("keep", [0, 40, 80])
def test_nothing_is_faster_than_the_floor(card, accumulate, keep):
    settings = run(4096, 1024, dtype="fp16", accumulate=accumulate)
    floor = floor_seconds(LLAMA_70B, 4096, card, 1, keep, accumulate)
    found = micro_batch_seconds(LLAMA_70B, settings, 1, card, Placement(80, keep_layers=keep)).total
    assert floor < found < 3 * floor


def test_what_is_kept_is_not_computed_again():
    for accumulate in ("fp32", "fp16"):
        settings = run(4096, 1024, dtype="fp16", accumulate=accumulate)
        for card in CARDS:
            all_kept, half, none = (
                micro_batch_seconds(LLAMA_70B, settings, 1, card, Placement(80, keep_layers=keep)).total
                for keep in (80, 40, 0)
            )
            assert all_kept < half < none


def test_copies_cost_what_they_take_longer_than_arithmetic():
    def total(link, offload):
        card = dataclasses.replace(BY_NAME["RTX 4090"], link_gb_per_second=link)
        found = micro_batch_seconds(LLAMA_70B, run(4096), 1, card, Placement(80, offload))
        return found.total, found

    hidden, parts = total(12, 40)
    assert parts.host_copies < parts.arithmetic
    assert hidden == pytest.approx(total(12, 0)[0], rel=0.02)
    slow, parts = total(1, 40)
    assert parts.host_copies > parts.arithmetic
    assert slow == pytest.approx(parts.host_copies, rel=0.05)


def test_the_plan_says_the_time_of_the_whole_run():
    def lasts(**train):
        settings = from_dict(
            {"model": "meta-llama/Llama-3.1-70B", "train": {"micro_batch_tokens": 4096, **train}}
        )
        return make_plan(settings, gpus=2, vram_gib=24.0, ram_gib=64.0).duration

    hundred = lasts(steps=100)
    assert hundred.run_seconds == 100 * hundred.step_seconds > hundred.floor_seconds
    assert lasts(steps=200).run_seconds == pytest.approx(2 * hundred.run_seconds)
    twice = lasts(steps=100, global_batch_tokens=32768)  # AdamW's share is the same
    assert twice.run_seconds == pytest.approx(2 * hundred.run_seconds, rel=1e-3)
    assert lasts(steps=None, epochs=1).run_seconds is None


def test_an_epoch_is_counted_in_characters(tmp_path):
    rows = [{"prompt": "a" * 60, "completion": "b" * 340}] * 1000  # 100 tokens each
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lasts(**data):
        settings = from_dict(
            {
                "model": "meta-llama/Llama-3.1-70B",
                "data": {"path": str(file), **data},
                "train": {"steps": None, "epochs": 3, "global_batch_tokens": 4096},
            }
        )
        return make_plan(settings, gpus=2, vram_gib=24.0, ram_gib=64.0).duration

    assert lasts(eval_fraction=0.0).epoch_steps == pytest.approx(100_000 / 4096)
    assert lasts(eval_fraction=0.5).epoch_steps == pytest.approx(50_000 / 4096)
    assert lasts(eval_fraction=0.0).steps == 73
    file.write_text("")
    assert lasts().epoch_steps is None


def test_the_part_that_limits_is_named():
    def limit(link, tokens, offload, name="RTX 4090"):
        card = dataclasses.replace(BY_NAME[name], link_gb_per_second=link)
        settings = run(tokens)
        return duration(LLAMA_70B, settings, 1, (card,), card, Placement(80, offload)).limited_by

    assert limit(12, 4096, 40).startswith("arithmetic")
    assert limit(1, 4096, 40).startswith("copies to and from the host")
    assert limit(56, 64, 0, "H200").startswith("the host, which starts the kernels")
    two = dataclasses.replace(BY_NAME["RTX 4090"], link_gb_per_second=1)
    gathered = duration(LLAMA_70B, run(4096, ranks=2), 2, (two, two), two, Placement(80))
    assert gathered.limited_by.startswith("gathers between the cards")


def test_energy_is_every_card_at_its_limit():
    settings = from_dict({"model": "meta-llama/Llama-3.1-70B"})
    lasts = make_plan(settings, gpus=2, card_names=["3090", "4090"], ram_gib=64.0).duration
    assert lasts.watts == 350 + 450 + HOST_WATTS
    assert lasts.run_kwh == pytest.approx(lasts.watts * lasts.run_seconds / 3.6e6)
    assert not lasts.measured
    assert make_plan(settings, gpus=1, card_names="H100", ram_gib=64.0).duration.measured
