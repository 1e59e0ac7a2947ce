"""How fast a step can be at best: arithmetic alone, against a card's dense rate.

QLoRA needs 4 FLOP per parameter and token: forward 2, gradients of the inputs 2; frozen weights need no gradient of
their own. Layers that keep only their input need up to 2 more, less down_proj, whose output no gradient needs. Nothing
runs at a card's full rate, so every time here is an "at least"; seconds.py says about how long it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recipe.errors import UserError
from recipe.plan.shapes import ModelShape

FORWARD = BACKWARD = RECOMPUTATION = 2  # FLOP per parameter and token
COPY_GB_PER_SECOND = 12  # PCIe 4.0 x8, as a second card often has


@dataclass(frozen=True)
class Card:
    """Dense 16-bit rate with fp32 accumulation, memory, and what it draws at most (the vendor's figures, or measured).

    fp16_factor: how much faster products are whose sums are fp16. link_gb_per_second: to the host and to other cards.
    """

    name: str
    tflops: float
    memory_gib: int
    memory_gb_per_second: float
    watts: int
    fp16_factor: float = 1.0
    link_gb_per_second: float = COPY_GB_PER_SECOND
    source: Literal["vendor", "measured", "calibrated"] = "vendor"  # calibrated: this very card, in its slot

    def product_rate(self, accumulate: str) -> float:
        """FLOP/s of matrix products under `compute.accumulate`."""
        return self.tflops * 1e12 * (self.fp16_factor if accumulate == "fp16" else 1)


CARDS = [
    # GeForce cards do half as much with fp32 sums as with fp16 ones; the others are as fast with either.
    Card("RTX 3060", 25.6, 12, 360, 170, fp16_factor=2),
    Card("RTX 3080", 59.5, 10, 760, 320, fp16_factor=2),
    Card("RTX 3090", 71, 24, 936, 350, fp16_factor=2),
    Card("RTX 3090 Ti", 80, 24, 1008, 450, fp16_factor=2),
    Card("RTX 4060 Ti", 44, 16, 288, 165, fp16_factor=2),
    Card("RTX 4080", 97.5, 16, 717, 320, fp16_factor=2),
    Card("RTX 4090", 165, 24, 1008, 450, fp16_factor=2),
    Card("RTX 5080", 112.5, 16, 960, 360, fp16_factor=2),
    Card("RTX 5090", 209, 32, 1792, 575, fp16_factor=2),
    Card("RTX A5000", 111, 24, 768, 230),
    Card("RTX A6000", 155, 48, 768, 300),
    Card("A100", 312, 80, 2039, 400),
    # Measured on 8192³ bf16; of the link: 47 GB came from the host in 825 ms (docs/benchmarks.md).
    Card("H100", 790, 80, 3350, 700, link_gb_per_second=56, source="measured"),
    Card("H200", 745, 141, 4800, 700, link_gb_per_second=56, source="measured"),
]


def card_in(name: str) -> Card | None:
    """The card that nvidia-smi calls so ("NVIDIA GeForce RTX 3090"); None where its rate is not known here."""
    # "NVIDIA RTX A6000" and "NVIDIA A100-SXM4-80GB" contain their card's name; "RTX 6000 Ada" is another.
    found = [card for card in CARDS if card.name in name]
    return max(found, key=lambda card: len(card.name), default=None)


def slowest_card(names: list[str]) -> Card | None:
    """The slowest of the cards that nvidia-smi calls so; None where the rate of one is not known here."""
    return slowest([card_in(name) for name in names])


def slowest(cards: Sequence[Card | None]) -> Card | None:
    """The one that the others wait for; None where one is not known."""
    known = [card for card in cards if card]
    return min(known, key=lambda card: card.tflops) if known and len(known) == len(cards) else None


def card_called(name: str) -> Card:
    """Raises UserError where no rate of it is known here."""
    wanted = name.strip().lower()
    found = next((card for card in CARDS if wanted in (card.name.lower(), card.name.lower()[4:])), None)
    if found is None:
        raise UserError(
            f"--gpu is `{name.strip()}`, expected one of {', '.join(card.name for card in CARDS)}"
        )
    return found


def card_with(vram_gib: float) -> Card | None:
    """The slowest known card of that much memory that is used for this: for a machine that only exists on paper."""
    near = [card for card in CARDS if abs(card.memory_gib - vram_gib) <= 1]
    return min(near, key=lambda card: card.tflops, default=None)


def product_flop(shape: ModelShape, tokens: int, keep_layers: int) -> float:
    """FLOP of the matrix products of a forward and backward; the other layers compute theirs again.

    On several ranks it is the same for each: the head has a slice of the vocabulary there, but the tokens of all.
    """
    down = shape.linears["down_proj"][0] * shape.linears["down_proj"][1]
    again = (shape.layers - keep_layers) * (shape.layer_linear_parameters - down)
    used = shape.layers * shape.layer_linear_parameters + shape.embedding_parameters  # the head's products
    return tokens * ((FORWARD + BACKWARD) * used + RECOMPUTATION * again)


def floor_seconds(
    shape: ModelShape, tokens: int, card: Card, gpus: int, keep_layers: int = 0, accumulate: str = "fp32"
) -> float:
    """Seconds below which that many tokens cannot be trained on so many cards."""
    return product_flop(shape, tokens, keep_layers) / (card.product_rate(accumulate) * gpus)
