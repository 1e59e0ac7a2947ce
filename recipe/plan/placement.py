"""Where each layer's weights and activations lie, and how much of a layer exists at once: what a plan decides.

The engine (recipe/engine) builds what stands here and decides nothing itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from recipe.plan.shapes import ModelShape

# What a layer can keep of its forward besides its input; recipe/engine/layer.py computes again what is not kept.
KEEP = ("qkv", "attention", "middle", "gate_up")
EVERYTHING = frozenset(KEEP)
NOTHING: frozenset[str] = frozenset()
ALIGNMENT = 256  # bytes
MLP_CHUNK = 2048  # tokens of the MLP at once, where memory is not scarce
MLP_SLOTS = 3  # dequantised matrices at once: a whole MLP


@dataclass(frozen=True)
class Placement:
    """offload_layers: weights in host RAM; away_layers: activations in host RAM; keep_layers: nothing computed again.

    mlp_chunk: tokens of the MLP at once; slots: dequantised matrices at once.
    """

    layers: int
    offload_layers: int = 0
    away_layers: int = 0
    keep_layers: int = 0
    mlp_chunk: int = MLP_CHUNK
    slots: int = MLP_SLOTS

    @property
    def offloaded(self) -> tuple[bool, ...]:
        """Spread evenly, so that copies have the time of the layers between."""
        return spread(self.layers, self.offload_layers)

    @property
    def away(self) -> tuple[bool, ...]:
        """The first layers: the backward needs theirs last."""
        return tuple(i < self.away_layers for i in range(self.layers))

    @property
    def keep(self) -> tuple[frozenset[str], ...]:
        return tuple(EVERYTHING if flag else NOTHING for flag in spread(self.layers, self.keep_layers))


@functools.cache
def spread(layers: int, count: int) -> tuple[bool, ...]:
    """`count` of `layers`, as evenly as whole numbers allow."""
    return tuple((i + 1) * count // layers != i * count // layers for i in range(layers))


def spread_before(layers: int, count: int, end: int) -> int:
    """How many of them are among the first `end` layers."""
    return end * count // layers


@functools.lru_cache(1024)
def kept_bytes(shape: ModelShape, keep: frozenset[str], tokens: int, width: int) -> int:
    """Bytes of a layer's saved activations: its input and what it keeps besides; softmax statistics aside."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [shape.hidden * width]
    sizes += [query * width, key * width, key * width] if "qkv" in keep else []
    sizes += [query * width] if "attention" in keep else []
    sizes += [shape.hidden * width] if "middle" in keep else []
    sizes += [shape.intermediate * width] * 2 if "gate_up" in keep else []
    return sum(-(-size * tokens // ALIGNMENT) * ALIGNMENT for size in sizes)
