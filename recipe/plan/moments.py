"""What a rank holds for a moment: a training step walked through layer by layer, as recipe/engine does it.

Each moment holds what the forward has saved up to there, what is on its way to or from the host, and its own tensors.
The largest one is the peak of the step; what lies there all the time is memory.py's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from recipe.plan.parts import GIB, Part
from recipe.plan.placement import EVERYTHING, NOTHING, Placement, kept_bytes, spread, spread_before
from recipe.plan.shapes import ModelShape

FP32 = 4
LOGITS_BYTES = 256 * 2**20  # fp32 logits at once on a rank (recipe/engine/head.py)
LEAVING = 2  # layers whose activations may be on their way to the host (recipe/engine/activations.py)

# Bytes: saved and here, on their way, the moment's own; its name, and what it is.
Moment = tuple[float, float, float, str, str]


def peak(shape: ModelShape, tokens: int, width: int, world_size: int, placement: Placement) -> list[Part]:
    """The parts of the largest moment of a step. width: bytes per element of the activations."""
    # Where the weights lie makes no difference, and a plan asks for many a placement that differs in that alone.
    return list(_peak(shape, tokens, width, world_size, dataclasses.replace(placement, offload_layers=0)))


@functools.lru_cache(4096)
def _peak(
    shape: ModelShape, tokens: int, width: int, world_size: int, placement: Placement
) -> tuple[Part, ...]:
    moments = [
        *_backward(shape, tokens, width, placement),
        *_forward(shape, tokens, width, placement),
        _loss(shape, tokens, width, world_size, placement),
    ]
    saved, under_way, own, name, note = max(moments, key=lambda moment: sum(moment[:3]))
    here = placement.layers - placement.away_layers
    of = f"of {here} of {placement.layers} layers" if here else "of one layer at a time"
    return (
        Part("activations", saved / GIB, f"saved by the forward, {of}"),
        Part("activations under way", under_way / GIB, "to the host and back"),
        Part(name, own / GIB, note),
    )


@dataclass(frozen=True)
class _Walk:
    """What the layers save for their backward, in bytes: one that keeps everything, one that keeps its input only."""

    everything: float
    nothing: float
    placement: Placement

    @staticmethod
    def of(shape: ModelShape, tokens: int, width: int, placement: Placement) -> _Walk:
        everything, nothing = (kept_bytes(shape, keep, tokens, width) for keep in (EVERYTHING, NOTHING))
        return _Walk(everything, nothing, placement)

    def saved(self, layer: int) -> float:
        kept = spread(self.placement.layers, self.placement.keep_layers)
        return self.everything if kept[layer] else self.nothing

    def stay(self, layer: int) -> float:
        """Of the layers before this one, on the device."""
        away = min(self.placement.away_layers, layer)
        layers, kept = self.placement.layers, self.placement.keep_layers
        keeping = spread_before(layers, kept, layer) - spread_before(layers, kept, away)
        return keeping * self.everything + (layer - away - keeping) * self.nothing

    def leaving(self, layer: int) -> float:
        """Of the layers before this one, the last that go to the host are still here too."""
        end = min(layer, self.placement.away_layers)
        return sum(self.saved(before) for before in range(max(0, end - LEAVING), end))

    def layers(self) -> list[tuple[int, bool]]:
        """(layer, whether it keeps everything) of those that can be the peak: of layers alike, the last has most below."""
        return _last_alike(self.placement.layers, self.placement.keep_layers, self.placement.away_layers)


@functools.lru_cache(4096)
def _last_alike(layers: int, keep_layers: int, away_layers: int) -> list[tuple[int, bool]]:
    kept = spread(layers, keep_layers)
    alike: dict[tuple, int] = {}
    for i in range(layers):
        here = i <= away_layers  # what is under way differs
        alike[here, kept[i], kept[max(0, i - LEAVING) : i]] = i
    return [(i, kept[i]) for i in alike.values()]


def _forward(shape: ModelShape, tokens: int, width: int, placement: Placement) -> Iterator[Moment]:
    walk = _Walk.of(shape, tokens, width, placement)
    hidden, _, _ = _sizes(shape, tokens, width)
    chunk = min(placement.mlp_chunk, tokens) * width
    for i, keep in walk.layers():
        # The layer's output; one matrix of the MLP's width besides gate and up where those are kept.
        own = hidden + chunk * (shape.hidden + (1 if keep else 2) * shape.intermediate)
        here = walk.stay(i) + walk.saved(i)
        yield here, walk.leaving(i), own, "MLP forward", f"{chunk // width:,} tokens at a time"


def _backward(shape: ModelShape, tokens: int, width: int, placement: Placement) -> Iterator[Moment]:
    walk = _Walk.of(shape, tokens, width, placement)
    hidden, query, key = _sizes(shape, tokens, width)
    chunk = min(placement.mlp_chunk, tokens) * width
    above = hidden  # the gradient that comes from above
    # What FlashAttention needs besides: fp32 sums for q, or gradients of k and v for each head of q where those share,
    # which take as much. Not both: 16,384 tokens in documents of 4,096 took 0.5 GiB less than with both.
    kernel = query / width * FP32
    for i, keep in walk.layers():
        here = walk.stay(i) + walk.saved(i)
        # The activations of the layer below come back while this one computes.
        if i <= placement.away_layers:
            under_way = walk.saved(i - 1) if i else 0.0
        else:
            under_way = walk.leaving(i)
        recomputed = 0.0 if keep else query + 2 * key + query
        yield (
            here,
            under_way,
            above + recomputed + (0 if keep else hidden) + _mlp_backward(shape, chunk, keep),
            "MLP backward",
            f"gradients of the layer, and {chunk // width:,} tokens of the MLP at a time",
        )
        # gate, up and the residual stream are done with; the gradients of q, k, v and of the output come.
        done = hidden + 2 * shape.intermediate * tokens * width if keep else 0.0
        yield (
            here - done,
            under_way,
            above + recomputed + 2 * query + 2 * key + kernel,
            "attention backward",
            "q, k, v, output, their gradients, and the kernel's own",
        )


def _mlp_backward(shape: ModelShape, chunk: int, kept: bool) -> float:
    """The normed input and its gradient; gate and up where they are computed again, and the gradient of their product."""
    return chunk * (2 * shape.hidden + (1 if kept else 3) * shape.intermediate)


def _loss(shape: ModelShape, tokens: int, width: int, world_size: int, placement: Placement) -> Moment:
    walk = _Walk.of(shape, tokens, width, placement)
    hidden, _, _ = _sizes(shape, tokens, width)
    logits = min(LOGITS_BYTES, tokens * shape.vocab * FP32)
    rows = logits / FP32 / max(shape.vocab / world_size, 1)  # of all ranks
    chunk = logits * (1 + width / FP32) + rows * shape.hidden * (2 * width + FP32)
    own = 4 * hidden + chunk  # the last layer's output, of the labelled tokens, normed, and its gradient
    return (
        walk.stay(placement.layers),
        walk.leaving(placement.layers),
        own,
        "loss",
        "hidden states, their gradients, and a chunk of logits",
    )


def _sizes(shape: ModelShape, tokens: int, width: int) -> tuple[float, float, float]:
    """Bytes of the hidden states, of q, and of k, for a whole micro-batch."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return tokens * shape.hidden * width, tokens * query * width, tokens * key * width
