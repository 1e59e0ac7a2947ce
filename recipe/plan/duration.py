"""How long a run takes, what limits it, and what it draws from the wall."""

from __future__ import annotations

from dataclasses import dataclass

from recipe.plan.cards import Card, floor_seconds
from recipe.plan.placement import Placement
from recipe.plan.seconds import Seconds, adamw_seconds, micro_batch_seconds, passes
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

# Of the machine around the cards, at the wall: board, processor, memory, disk, and what the supply loses.
HOST_WATTS = 150
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Duration:
    """Seconds; None where the number of steps is not known."""

    step_seconds: float
    floor_step_seconds: float  # for the matrix products alone, at the card's full rate
    tokens_per_second: float
    parts: dict[str, float]  # of a step, in seconds; more than the step where they run beside each other
    limited_by: str
    steps: int | None
    epoch_steps: float | None  # steps for each row once
    measured: bool  # the card's rates, rather than its vendor's
    watts: float

    @property
    def run_seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_seconds

    @property
    def floor_seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.floor_step_seconds

    @property
    def epoch_seconds(self) -> float | None:
        return None if self.epoch_steps is None else self.epoch_steps * self.step_seconds

    @property
    def run_kwh(self) -> float | None:
        """Every card at its limit for the whole run, as 70B shapes load them."""
        return None if self.run_seconds is None else self.watts * self.run_seconds / JOULES_PER_KWH


def duration(
    shape: ModelShape,
    settings: Settings,
    world_size: int,
    cards: tuple[Card, ...],
    slowest: Card,
    placement: Placement,
    data_tokens: float | None = None,
) -> Duration:
    """Of a run whose settings have numbers for all that a plan decides; `data_tokens`: of the training rows, once."""
    tokens = settings.train.global_batch_tokens
    micro = micro_batch_seconds(shape, settings, world_size, slowest, placement)
    times = passes(settings, world_size, micro)
    adamw = adamw_seconds(shape, settings, world_size, slowest)
    step = times * micro.total + adamw
    epoch = data_tokens / tokens if data_tokens else None
    steps = settings.train.steps
    if steps is None and epoch is not None and settings.train.epochs is not None:
        steps = max(1, round(epoch * settings.train.epochs))
    return Duration(
        step_seconds=step,
        floor_step_seconds=floor_seconds(
            shape, tokens, slowest, world_size, placement.keep_layers, settings.compute.accumulate
        ),
        tokens_per_second=tokens / step,
        parts={name: times * seconds for name, seconds in _parts(micro).items()} | {"AdamW": adamw},
        limited_by=_limit(micro),
        steps=steps,
        epoch_steps=epoch,
        measured=all(card.source != "vendor" for card in cards),
        watts=sum(card.watts for card in cards) + HOST_WATTS,
    )


def _parts(micro: Seconds) -> dict[str, float]:
    return {
        "matrix products": micro.products,
        "attention": micro.attention,
        "element-wise": micro.element_wise,
        "dequantisation": micro.dequantisation,
        "starting kernels": micro.launches,
        "gathers": micro.gathers,
        "copies to and from the host": micro.host_copies,
        "embedding": micro.embedding,
        "exchange for the loss": micro.exchange,
    }


def _limit(micro: Seconds) -> str:
    """What a faster step would need."""
    if micro.launches > max(micro.arithmetic, micro.copies):
        return "the host, which starts the kernels: more tokens per micro-batch"
    if micro.copies > micro.arithmetic:
        if micro.gathers > micro.host_copies:
            return "gathers between the cards: more tokens per micro-batch, or a faster link"
        return "copies to and from the host over PCIe: more GPU memory, or more tokens per micro-batch"
    return "arithmetic: a faster card, or one more"
