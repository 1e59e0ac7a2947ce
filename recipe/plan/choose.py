"""Which layers to offload and what to keep: the fastest placement that fits, by the memory model and a cost in seconds.

Cost: the matrix products that the placement computes, dequantising as often as it must, and the copies that do not hide
behind them. Ties go to fewer offloaded layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from recipe.plan import memory
from recipe.plan.cards import Card
from recipe.plan.placement import MLP_CHUNK, MLP_SLOTS, Placement
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

# A card that is not known: what matters are the ratios, which are those of most.
UNKNOWN = Card("unknown", 100, 24, 900)
COPY_GB_PER_SECOND = 12  # PCIe 4.0 x8, as a second card often has
MORE_OFFLOADED = 8  # layers: room on the device for what other layers keep
TIGHT_CHUNK = 4096  # tokens of the MLP at once where there is room for one dequantised matrix only


def choose(
    shape: ModelShape,
    settings: Settings,
    world_size: int,
    on_gpu: bool,
    card: Card | None,
    fits: Callable[[Placement], bool],
) -> Placement:
    """The placement of a run; the one that needs least of the device where none fits.

    `compute.offload_layers` and `compute.keep_layers` fix what they name. fits: whether a placement fits the machine.
    """
    possible = [p for p in _candidates(shape, settings, on_gpu, fits) if fits(p)]
    if not possible:
        return _smallest(shape, settings, on_gpu)
    return min(
        possible,
        key=lambda p: (
            round(_seconds(shape, settings, world_size, card or UNKNOWN, p), 3),
            p.offload_layers,
            p.away_layers,
        ),
    )


def _ways(settings: Settings) -> list[tuple[int, int]]:
    """(slots, tokens of the MLP at once): a whole MLP dequantised, or a matrix at a time for more tokens."""
    tokens = settings.micro_batch_tokens
    return [(MLP_SLOTS, min(MLP_CHUNK, tokens)), (1, min(TIGHT_CHUNK, tokens))]


def _candidates(
    shape: ModelShape, settings: Settings, on_gpu: bool, fits: Callable[[Placement], bool]
) -> Iterator[Placement]:
    compute, layers = settings.compute, shape.layers
    for slots, chunk in _ways(settings):
        for away in sorted({0, layers} if on_gpu else {0}):
            base = Placement(layers, 0, away, 0, chunk, slots)
            if compute.offload_layers != "auto":
                offloads = range(min(int(compute.offload_layers), layers), layers + 1)[:1]
            elif on_gpu:
                fewest = _first(base, "offload_layers", layers, fits).offload_layers
                offloads = range(fewest, min(fewest + MORE_OFFLOADED, layers) + 1)
            else:
                offloads = range(1)
            for offload in offloads:
                placement = dataclasses.replace(base, offload_layers=offload)
                if compute.keep_layers == "auto":
                    placement = _last(placement, "keep_layers", layers, fits)
                else:
                    placement = dataclasses.replace(
                        placement, keep_layers=min(int(compute.keep_layers), layers)
                    )
                yield placement
                if away:  # what the device has room for need not go to the host
                    yield _first(placement, "away_layers", layers, fits)


def _first(placement: Placement, name: str, most: int, fits: Callable[[Placement], bool]) -> Placement:
    """The least value of a field with which it fits: more offloaded layers need ever less of the device."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if fits(dataclasses.replace(placement, **{name: middle})):
            high = middle
        else:
            low = middle + 1
    return dataclasses.replace(placement, **{name: low})


def _last(placement: Placement, name: str, most: int, fits: Callable[[Placement], bool]) -> Placement:
    """The greatest value of a field with which it still fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(dataclasses.replace(placement, **{name: middle})):
            low = middle
        else:
            high = middle - 1
    return dataclasses.replace(placement, **{name: low})


def _smallest(shape: ModelShape, settings: Settings, on_gpu: bool) -> Placement:
    """What takes least of the device, for a plan that says what is missing."""
    compute, (slots, chunk) = settings.compute, _ways(settings)[-1]
    layers = shape.layers
    offload = layers if compute.offload_layers == "auto" else min(int(compute.offload_layers), layers)
    keep = 0 if compute.keep_layers == "auto" else min(int(compute.keep_layers), layers)
    return Placement(layers, offload if on_gpu else 0, layers if on_gpu else 0, keep, chunk, slots)


def _seconds(
    shape: ModelShape, settings: Settings, world_size: int, card: Card, placement: Placement
) -> float:
    """Of one micro-batch on one rank."""
    tokens, layers = settings.micro_batch_tokens, shape.layers
    down = shape.linears["down_proj"][0] * shape.linears["down_proj"][1]
    linear = shape.layer_linear_parameters
    products = 2 * tokens * (2 * linear * layers + (linear - down) * (layers - placement.keep_layers))
    matrices = _dequantised(shape, settings, placement)
    arithmetic = products / (card.tflops * 1e12) + matrices * 2.5 / (card.memory_gb_per_second * 1e9)
    layer = memory.layer_bytes(shape, settings)
    width = memory.compute_bytes(settings, on_gpu=True)
    gathered = 0 if world_size == 1 else layers * layer * (world_size - 1) / world_size
    away = sum(
        memory.kept_bytes(shape, keep, tokens, width)
        for keep, is_away in zip(placement.keep, placement.away, strict=True)
        if is_away
    )
    copies = 2 * (placement.offload_layers * layer / world_size + gathered + away) / (
        COPY_GB_PER_SECOND * 1e9
    )
    # Copies are not quite free where they hide: memory bandwidth is shared.
    return arithmetic + max(0.0, copies - arithmetic) + 0.02 * min(copies, arithmetic)


def _dequantised(shape: ModelShape, settings: Settings, placement: Placement) -> float:
    """Weights that are dequantised in one micro-batch, counted as often as they are."""
    linear, layers = shape.layer_linear_parameters, shape.layers
    mlp = 3 * shape.linears["down_proj"][0] * shape.linears["down_proj"][1]
    attention = linear - mlp
    chunks = -(-settings.micro_batch_tokens // placement.mlp_chunk)
    again = layers - placement.keep_layers
    if placement.slots >= MLP_SLOTS:
        return 2 * layers * linear + again * attention
    recomputed = chunks * mlp * 2 / 3
    return layers * (attention + chunks * mlp) * 2 + again * (attention + recomputed)


