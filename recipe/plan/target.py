"""The machine that is planned for: this one, or one that only exists on paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from recipe.errors import UserError
from recipe.hardware import Machine
from recipe.plan.cards import Card, card_called, card_in, card_with, slowest


@dataclass(frozen=True)
class Target:
    """GPUs (none: a CPU run), and sizes in GiB; None where it is not known, and then not judged."""

    vram_gib: tuple[float, ...]
    cards: tuple[Card | None, ...]
    ram_gib: float | None
    disk_gib: float | None
    here: bool  # what this machine has, rather than what was described
    cards_assumed: bool

    @property
    def gpus(self) -> int:
        return len(self.vram_gib)

    @property
    def smallest_gib(self) -> float | None:
        """Every rank holds as much: the smallest card decides."""
        return min(self.vram_gib, default=None)

    @property
    def card(self) -> Card | None:
        """The slowest: the others wait for it in every layer."""
        return slowest(self.cards)

    def first(self, ranks: int) -> Target:
        """Those that so many ranks use."""
        return dataclasses.replace(self, vram_gib=self.vram_gib[:ranks], cards=self.cards[:ranks])

    def with_gpus(self, count: int) -> Target:
        """More of the first card."""
        more = count - self.gpus
        return dataclasses.replace(
            self, vram_gib=self.vram_gib + self.vram_gib[:1] * more, cards=self.cards + self.cards[:1] * more
        )

    def alike(self, count: int) -> Target:
        """So many of the first card."""
        return dataclasses.replace(self, vram_gib=self.vram_gib[:1] * count, cards=self.cards[:1] * count)


def target_of(
    machine: Machine | None = None,
    gpus: int | None = None,
    vram_gib: float | Sequence[float] | None = None,
    card_names: str | Sequence[str] | None = None,
    ram_gib: float | None = None,
    disk_gib: float | None = None,
    measured: dict[str, Card] | None = None,
) -> Target:
    """What the arguments describe, and where they are silent, what `machine` has.

    Args:
        gpus: how many; 0 is a CPU run.
        vram_gib, card_names: of all of them, or one for each.
        measured: cards by the name that nvidia-smi gives them, as `--calibrate` measured them.

    Raises:
        UserError: an unknown card, a GPU without a size, or another number of cards than of sizes.
    """
    names = [card_names] if isinstance(card_names, str) else list(card_names or [])
    sizes = [vram_gib] if isinstance(vram_gib, (int, float)) else list(vram_gib or [])
    cards = [card_called(name) for name in names]
    count = _count(machine, gpus, sizes, cards)
    # Cards described by number and kind are another machine's, and so are the RAM and the disk beside them.
    here = machine if machine and not (gpus and (sizes or cards)) and not (len(cards) > 1) else None
    found = here.gpus if here else machine.gpus if machine and not (sizes or cards) else []
    if not sizes and cards:
        sizes = [float(card.memory_gib) for card in cards]
    elif not sizes and count:
        sizes = [min(gpu.memory_total_gib for gpu in found)] if len(found) < count else _sizes(found, count)
    for size in sizes:
        if size <= 0:
            raise UserError(f"--vram-gib is {size:g}, expected GiB above 0")
    known = _each(cards or _cards(found, sizes, count, measured or {}), count, "--gpu")
    return Target(
        vram_gib=tuple(_each(sizes, count, "--vram-gib")),
        cards=tuple(known),
        ram_gib=ram_gib if ram_gib is not None else here.usable_ram_gib if here else None,
        disk_gib=disk_gib if disk_gib is not None else here.disk_free_gib if here else None,
        here=here is not None,
        cards_assumed=not found or bool(cards),
    )


def _count(machine: Machine | None, gpus: int | None, sizes: list[float], cards: list[Card]) -> int:
    there = len(machine.gpus) if machine else 0
    if gpus is None:
        gpus = max(len(sizes), len(cards)) if max(len(sizes), len(cards)) > 1 else there
        if (sizes or cards) and not gpus:
            option = "--vram-gib" if sizes else "--gpu"
            raise UserError(f"{option} is given, but this machine has no GPU; expected --gpus as well")
    if gpus < 0:
        raise UserError(f"--gpus is {gpus}, expected a whole number of at least 0")
    if gpus and not there and not sizes and not cards:
        raise UserError(
            f"--gpus is {gpus}, but this machine has no GPU to take its size from; add --vram-gib, or --gpu with a card's name"
        )
    return gpus


def _sizes(found: Sequence, count: int) -> list[float]:
    return [gpu.memory_total_gib for gpu in found[:count]]


def _cards(found: Sequence, sizes: list[float], count: int, measured: dict[str, Card]) -> list[Card | None]:
    if found:
        cards = [measured.get(gpu.name) or card_in(gpu.name) for gpu in found[:count]]
        return cards if len(cards) == count else cards[:1]
    return [card_with(size) for size in sizes]


def _each(values: Sequence, count: int, option: str) -> list:
    """One for each GPU."""
    if len(values) == count:
        return list(values)
    if len(values) == 1 or not count:
        return list(values) * count if values else []
    raise UserError(f"{option} names {len(values)} values for {count} GPUs, expected one, or one for each")
