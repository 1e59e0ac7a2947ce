"""A budget is a list of parts, in GiB."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One entry of a budget."""

    name: str
    gib: float
    note: str = ""


def total_gib(parts: list[Part]) -> float:
    return sum(part.gib for part in parts)
