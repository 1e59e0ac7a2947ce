"""Tokens per second over lengths and numbers of cards: what a longer row or one more card would bring."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from recipe.plan.budget import plan_for
from recipe.plan.target import Target
from recipe.settings import Settings
from recipe.svg import GREY, ground, text

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CARDS = (1, 2, 3, 4, 8)
COLORS = ("#a7d3b9", "#6fb58c", "#1a7f4b", "#115c36", "#0a3b22")


@dataclass(frozen=True)
class Sweep:
    """rates[length][number of cards]: tokens per second, None where it does not fit."""

    model: str
    card: str
    vram_gib: float
    ram_gib: float | None
    rates: dict[int, dict[int, float | None]]


def sweep(settings: Settings, target: Target, prepared: Path | None = None) -> Sweep:
    """For the target's first card; every row as long as `data.max_length` allows, micro-batches as the plan chooses."""
    card = target.cards[0]
    assert card is not None
    rates: dict[int, dict[int, float | None]] = {}
    for length in LENGTHS:
        rates[length] = {}
        for count in CARDS:
            plan = plan_for(_with_length(settings, length, count), target.alike(count), prepared)
            fits = plan.fits and plan.duration
            rates[length][count] = plan.duration.tokens_per_second if fits and plan.duration else None
    return Sweep(settings.model.id or "", card.name, target.vram_gib[0], target.ram_gib, rates)


def _with_length(settings: Settings, length: int, ranks: int) -> Settings:
    """Rows of that length, and a step of at least one of them on each rank."""
    longer = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, max_length=length),
        train=dataclasses.replace(settings.train, micro_batch_tokens="auto"),
        compute=dataclasses.replace(settings.compute, processes="auto"),
    )
    batch = longer.nearest_global_batch(ranks)
    return dataclasses.replace(longer, train=dataclasses.replace(longer.train, global_batch_tokens=batch))


def render(found: Sweep) -> str:
    heads = [f"{count} GPU{'' if count == 1 else 's'}" for count in CARDS]
    lines = [f"Tokens per second: {_what(found)}", ""]
    lines.append(f"{'tokens a row':<14}" + "".join(f"{head:>10}" for head in heads))
    for length, row in found.rates.items():
        cells = (f"{row[count]:,.0f}" if row[count] is not None else "–" for count in CARDS)
        lines.append(f"{length:<14,}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join([*lines, "", "–: does not fit"]) + "\n"


def figure(found: Sweep) -> str:
    """A group of bars for each length, a bar for each number of cards."""
    left, top, high, bar = 64, 84, 240, 14
    group = bar * len(CARDS) + 22
    width, height = left + group * len(LENGTHS) + 16, top + high + 56
    most = max((rate for row in found.rates.values() for rate in row.values() if rate), default=1.0)
    parts = ground(width, height, "Tokens per second, more is better", _what(found))
    for share in (0.25, 0.5, 0.75, 1.0):
        y = top + high * (1 - share)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 16}" stroke="#e5e7eb"/>')
        parts.append(text(left - 8, y + 4, f"{most * share:,.0f}", GREY, "end", 11))
    for i, (length, row) in enumerate(found.rates.items()):
        x = left + 11 + i * group
        for j, count in enumerate(CARDS):
            rate = row[count] or 0.0
            size = high * rate / most
            parts.append(
                f'<rect x="{x + j * bar}" y="{top + high - size:.1f}" width="{bar - 2}" height="{size:.1f}" '
                f'fill="{COLORS[j]}"/>'
            )
        parts.append(text(x + (group - 22) / 2, top + high + 18, f"{length:,}", anchor="middle", size=12))
    for j, count in enumerate(CARDS):
        x = left + 11 + j * 84
        parts.append(f'<rect x="{x}" y="58" width="10" height="10" fill="{COLORS[j]}"/>')
        parts.append(text(x + 15, 67, f"{count} GPU{'' if count == 1 else 's'}", GREY, size=11))
    parts += [text(left + 11, height - 12, "tokens a row; no bar: does not fit", GREY, size=11), "</svg>"]
    return "\n".join(parts) + "\n"


def _what(found: Sweep) -> str:
    ram = "any RAM" if found.ram_gib is None else f"{found.ram_gib:.0f} GiB of RAM"
    return f"{found.model}, {found.card} with {found.vram_gib:.0f} GiB, {ram}"
