"""How fast a step can be at best: arithmetic alone, against a card's dense rate.

QLoRA needs 4 FLOP per parameter and token: forward 2, gradients of the inputs 2; frozen weights need no gradient of
their own. Layers that keep only their input need up to 2 more, less down_proj, whose output no gradient needs. Nothing
runs at a card's full rate, so every time is an "at least".
"""

from __future__ import annotations

from dataclasses import dataclass

from recipe.plan.shapes import ModelShape

FORWARD = BACKWARD = RECOMPUTATION = 2  # FLOP per parameter and token


@dataclass(frozen=True)
class Card:
    """Dense 16-bit rate with fp32 accumulation (vendor figures; H100 and H200 as measured on 8192³ bf16)."""

    name: str
    tflops: float
    memory_gib: int
    memory_gb_per_second: int


CARDS = [
    Card("RTX 3090", 71, 24, 936),
    Card("RTX 4090", 165, 24, 1008),
    Card("RTX 5090", 209, 32, 1792),
    Card("A6000", 155, 48, 768),
    Card("A100", 312, 80, 2039),
    Card("H100", 790, 80, 3350),
    Card("H200", 790, 141, 4800),
]


def slowest_card(names: list[str]) -> Card | None:
    """The slowest of the cards that nvidia-smi calls so; None where the rate of one is not known here."""
    # "NVIDIA RTX A6000" and "NVIDIA A100-SXM4-80GB" contain their card's name; "RTX 6000 Ada" is another.
    cards = [next((card for card in CARDS if card.name in name), None) for name in names]
    known = [card for card in cards if card]
    return min(known, key=lambda card: card.tflops) if known and len(known) == len(cards) else None


def card_with(vram_gib: float) -> Card | None:
    """The slowest known card with about that much memory: for a machine that only exists on paper."""
    near = [card for card in CARDS if abs(card.memory_gib - vram_gib) <= 1]
    return min(near, key=lambda card: card.tflops, default=None)


def floor_seconds(shape: ModelShape, tokens: int, card: Card, gpus: int, keep_layers: int = 0) -> float:
    """Seconds below which that many tokens cannot be trained on so many cards."""
    down = shape.linears["down_proj"][0] * shape.linears["down_proj"][1]
    again = (shape.layers - keep_layers) * (shape.layer_linear_parameters - down)
    used = shape.layers * shape.layer_linear_parameters + shape.embedding_parameters  # the head's products
    flop = (FORWARD + BACKWARD) * used + RECOMPUTATION * again
    return flop * tokens / (card.tflops * 1e12 * gpus)
