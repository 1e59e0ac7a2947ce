"""How fast a step can be at best: arithmetic alone, against a card's dense rate.

QLoRA with full recomputation needs 6 FLOP per parameter and token: forward 2, recomputation 2, gradients of
the inputs 2; frozen weights need no gradient of their own. Nothing runs at a card's full rate, so every time
is an "at least".
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = BACKWARD = RECOMPUTATION = 2  # FLOP per parameter and token


@dataclass(frozen=True)
class Card:
    """Dense 16-bit rate with fp32 accumulation (vendor figures; H100 and H200 as measured on 8192³ bf16)."""

    name: str
    tflops: float
    memory_gib: int


CARDS = [
    Card("RTX 3090", 71, 24),
    Card("RTX 4090", 165, 24),
    Card("RTX 5090", 209, 32),
    Card("A6000", 155, 48),
    Card("A100", 312, 80),
    Card("H100", 790, 80),
    Card("H200", 790, 141),
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


def floor_seconds(parameters: int, tokens: int, card: Card, gpus: int, recompute: bool = True) -> float:
    """Seconds below which that many tokens cannot be trained on so many cards."""
    flop = FORWARD + BACKWARD + (RECOMPUTATION if recompute else 0)
    return flop * parameters * tokens / (card.tflops * 1e12 * gpus)
