"""Which layers to offload and what to keep: of the placements that fit, the fastest by seconds.py.

Where that tells no difference, the one with fewer offloaded layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recipe.errors import UserError
from recipe.plan.cards import COPY_GB_PER_SECOND, Card
from recipe.plan.placement import MLP_CHUNK, MLP_SLOTS, Placement
from recipe.plan.seconds import micro_batch_seconds
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

# A card that is not known: what matters are the ratios, which are those of most.
UNKNOWN = Card("unknown", 100, 24, 900, 0)
MORE_OFFLOADED = 8  # layers: room on the device for what other layers keep
TIGHT_CHUNK = 4096  # tokens of the MLP at once where there is room for one dequantised matrix only
TIE = 1.015  # the seconds tell nothing finer: they miss what was measured by 1 to 4 %


@dataclass(frozen=True)
class Room:
    """GiB that a placement needs beyond what the device and the host have; 0 or less: it fits."""

    device_missing: Callable[[Placement], float]
    host_missing: Callable[[Placement], float]

    def on_device(self, placement: Placement) -> bool:
        return self.device_missing(placement) <= 0

    def everywhere(self, placement: Placement) -> bool:
        return self.on_device(placement) and self.host_missing(placement) <= 0


def choose(
    shape: ModelShape, settings: Settings, world_size: int, on_gpu: bool, card: Card | None, room: Room
) -> Placement:
    """The placement of a run; where none fits, the one that lacks least.

    `compute.offload_layers` and `compute.keep_layers` fix what they name. Raises UserError where they name more layers
    than the model has.
    """
    for name in ("offload_layers", "keep_layers"):
        count = getattr(settings.compute, name)
        if count != "auto" and count > shape.layers:
            raise UserError(
                f"compute.{name} is {count}, but the model has {shape.layers} layers; "
                f"expected 0 to {shape.layers}, or auto"
            )
    candidates = list(_candidates(shape, settings, on_gpu, room))
    possible = [placement for placement in candidates if room.everywhere(placement)]
    if not possible:
        # With less RAM than any needs, the least of it; with too small a device, the least of that.
        on_device = [placement for placement in candidates if room.on_device(placement)]
        return min(on_device or candidates, key=room.host_missing if on_device else room.device_missing)
    card = card or UNKNOWN
    if card.source != "calibrated":
        # How fast a slot is, nobody knows: a placement that counts on a fast one would crawl in a slow one.
        card = dataclasses.replace(card, link_gb_per_second=COPY_GB_PER_SECOND)
    seconds = {p: micro_batch_seconds(shape, settings, world_size, card, p).total for p in possible}
    limit = TIE * min(seconds.values())
    as_fast = [placement for placement in possible if seconds[placement] <= limit]
    return min(as_fast, key=lambda p: (p.offload_layers, seconds[p], p.away_layers))


def _candidates(shape: ModelShape, settings: Settings, on_gpu: bool, room: Room) -> Iterator[Placement]:
    for slots, chunk in _ways(settings):
        # Of the activations, all go to the host, or none.
        for away in (0, shape.layers) if on_gpu else (0,):
            base = Placement(shape.layers, 0, away, 0, chunk, slots)
            for offload in _offloads(base, settings, on_gpu, room):
                placement = _kept(dataclasses.replace(base, offload_layers=offload), settings, room)
                yield placement
                if away:  # what the device has room for need not go to the host
                    yield _first(placement, "away_layers", room.on_device)


def _ways(settings: Settings) -> list[tuple[int, int]]:
    """(slots, tokens of the MLP at once): a whole MLP dequantised, or a matrix at a time for more tokens."""
    tokens = settings.micro_batch_tokens
    return [(MLP_SLOTS, min(MLP_CHUNK, tokens)), (1, min(TIGHT_CHUNK, tokens))]


def _offloads(base: Placement, settings: Settings, on_gpu: bool, room: Room) -> range:
    fixed = settings.compute.offload_layers
    if not isinstance(fixed, str):
        return range(fixed, fixed + 1)
    if not on_gpu:  # host RAM is all there is
        return range(1)
    least = 0 if settings.compute.keep_layers == "auto" else int(settings.compute.keep_layers)
    fewest = _first(
        dataclasses.replace(base, keep_layers=least), "offload_layers", room.on_device
    ).offload_layers
    return range(fewest, min(fewest + MORE_OFFLOADED, base.layers) + 1)


def _kept(placement: Placement, settings: Settings, room: Room) -> Placement:
    fixed = settings.compute.keep_layers
    if not isinstance(fixed, str):
        return dataclasses.replace(placement, keep_layers=fixed)
    return _last(placement, "keep_layers", room.everywhere)


def _first(placement: Placement, name: str, fits: Callable[[Placement], bool]) -> Placement:
    """The least number of layers with which it fits, or all: the more are elsewhere, the less the device holds."""
    low, high = 0, placement.layers
    while low < high:
        middle = (low + high) // 2
        if fits(dataclasses.replace(placement, **{name: middle})):
            high = middle
        else:
            low = middle + 1
    return dataclasses.replace(placement, **{name: low})


def _last(placement: Placement, name: str, fits: Callable[[Placement], bool]) -> Placement:
    """The greatest number of layers with which it still fits, or none."""
    low, high = 0, placement.layers
    while low < high:
        middle = (low + high + 1) // 2
        if fits(dataclasses.replace(placement, **{name: middle})):
            low = middle
        else:
            high = middle - 1
    return dataclasses.replace(placement, **{name: low})
