"""How the engine says what it begins, for whoever watches that it gets on (recipe.train.pulse); nobody by default."""

from __future__ import annotations

from typing import Protocol


class Mark(Protocol):
    def __call__(self, operation: str, layer: int = -1) -> None:
        """`operation` begins, of a layer where there is one. Cheap, and alike on all ranks."""


def unmarked(operation: str, layer: int = -1) -> None:
    """Nobody watches."""
