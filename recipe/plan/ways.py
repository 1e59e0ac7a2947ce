"""What would make a run fit that does not: single changes, the cheapest first, each planned anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipe.plan.budget import Plan, plan_for
from recipe.plan.cards import card_with
from recipe.plan.shapes import KNOWN, shape_of
from recipe.plan.target import Target
from recipe.settings import Settings

SMALLEST_RANK = 4
SHORTEST_LENGTH = 128  # tokens that are suggested at least
LARGEST_GROUP = 16  # GPUs that are suggested at most
USUAL_GIB = 24.0  # of a card where there is none yet
CARD_SIZES_GIB = (12, 16, 24, 32, 48, 80, 96, 141)
WAYS = 3
# Hub names of models that can stand in for a larger one.
MODELS = {
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
}


@dataclass(frozen=True)
class Way:
    """One change, in words that can be typed where it is a setting, and the plan with it."""

    change: str
    plan: Plan


def ways_out(settings: Settings, target: Target, prepared: Path | None = None) -> list[Way]:
    """Up to three: what costs nothing comes before RAM, RAM before cards, and another model last."""
    ways = []
    for change, changed, machine in _changes(settings, target, prepared):
        plan = plan_for(changed, machine, prepared if changed.model == settings.model else None)
        if plan.fits:
            ways.append(Way(change, plan))
        if len(ways) == WAYS:
            break
    return ways


def _changes(
    settings: Settings, target: Target, prepared: Path | None
) -> Iterator[tuple[str, Settings, Target]]:
    """(words, settings, machine): of each kind the least that fits, where one does."""

    def tried(changed: Settings, machine: Target) -> Plan:
        return plan_for(_leanest(changed), machine, prepared)

    if isinstance(settings.compute.processes, int) and settings.compute.processes > target.gpus > 0:
        compute = dataclasses.replace(settings.compute, processes="auto")
        yield "--set compute.processes=auto", dataclasses.replace(settings, compute=compute), target
    if settings.prepare.keep_source:
        prepare = dataclasses.replace(settings.prepare, keep_source=False)
        yield "--set prepare.keep_source=false", dataclasses.replace(settings, prepare=prepare), target
    for length in _halves(settings.micro_batch_tokens, SHORTEST_LENGTH):
        shorter = _with_length(settings, length)
        if tried(shorter, target).fits:
            yield _length_words(settings, length), shorter, target
            break
    for rank in _halves(settings.lora.rank, SMALLEST_RANK):
        smaller = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, rank=rank))
        if tried(smaller, target).fits:
            yield f"--set lora.rank={rank}", smaller, target
            break
    if target.ram_gib is not None:
        # A plan that lacks RAM is the one that needs the least.
        enough = math.ceil(tried(settings, target).ram_needed_gib)
        if enough > target.ram_gib:
            yield f"{enough} GiB of RAM", settings, dataclasses.replace(target, ram_gib=float(enough))
    yield from _more_cards(settings, target, tried)
    if target.gpus:
        yield from _larger_cards(settings, target, tried)
    yield from _other_models(settings, target)


def _leanest(settings: Settings) -> Settings:
    """Whether it fits, not how fast: nothing kept, and the fewest tokens that `auto` may take."""
    compute, train = settings.compute, settings.train
    if compute.keep_layers == "auto":
        compute = dataclasses.replace(compute, keep_layers=0)
    return dataclasses.replace(
        settings,
        compute=compute,
        train=dataclasses.replace(train, micro_batch_tokens=settings.micro_batch_tokens),
    )


def _halves(start: int, least: int) -> Iterator[int]:
    while start // 2 >= least:
        start //= 2
        yield start


def _with_length(settings: Settings, tokens: int) -> Settings:
    length = min(_longest(settings, tokens), settings.data.max_length)
    return dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, micro_batch_tokens=tokens),
        data=dataclasses.replace(settings.data, max_length=length),
    )


def _longest(settings: Settings, tokens: int) -> int:
    """The longest row that a micro-batch of so many tokens has room for."""
    return tokens * settings.data.max_length // settings.longest_row


def _length_words(settings: Settings, tokens: int) -> str:
    words = f"--set train.micro_batch_tokens={tokens}"
    length = _longest(settings, tokens)
    return words if length >= settings.data.max_length else f"{words} --set data.max_length={length}"


def _more_cards(
    settings: Settings, target: Target, tried: Callable[[Settings, Target], Plan]
) -> Iterator[tuple[str, Settings, Target]]:
    if settings.compute.processes != "auto":
        return
    start = (
        target
        if target.gpus
        else dataclasses.replace(target, vram_gib=(USUAL_GIB,), cards=(card_with(USUAL_GIB),))
    )
    for count in range(target.gpus + 1, LARGEST_GROUP + 1):
        batch = settings.nearest_global_batch(count)
        train = dataclasses.replace(settings.train, global_batch_tokens=batch)
        changed, machine = dataclasses.replace(settings, train=train), start.with_gpus(count)
        if tried(changed, machine).fits:
            count -= target.gpus
            words = f"{count}{' more' if target.gpus else ''} GPU{'' if count == 1 else 's'} of {machine.vram_gib[-1]:g} GiB"
            if batch != settings.train.global_batch_tokens:
                words += f", --set train.global_batch_tokens={batch}"
            yield words, changed, machine
            return


def _larger_cards(
    settings: Settings, target: Target, tried: Callable[[Settings, Target], Plan]
) -> Iterator[tuple[str, Settings, Target]]:
    for size in CARD_SIZES_GIB:
        if size <= (target.smallest_gib or 0):
            continue
        larger = dataclasses.replace(
            target,
            vram_gib=tuple(max(float(size), gib) for gib in target.vram_gib),
            cards=tuple(
                card_with(size) if gib < size else card
                for gib, card in zip(target.vram_gib, target.cards, strict=True)
            ),
        )
        if tried(settings, larger).fits:
            yield f"GPUs with {size} GiB", settings, larger
            return


def _other_models(settings: Settings, target: Target) -> Iterator[tuple[str, Settings, Target]]:
    """The largest known one that is smaller."""
    parameters = shape_of(settings.model.id).parameters if settings.model.id else 0
    for name in sorted(MODELS, key=lambda name: -KNOWN[name].parameters):
        if KNOWN[name].parameters < parameters:
            model = dataclasses.replace(settings.model, id=MODELS[name], revision=None)
            changed = dataclasses.replace(settings, model=model)
            if plan_for(_leanest(changed), target).fits:
                yield f"--set model.id={MODELS[name]}", changed, target
                return
