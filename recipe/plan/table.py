"""A plan as text for a terminal: at most 100 columns, plain characters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from recipe.plan.budget import GPU_SPARE_GIB, HOST_SPARE_GIB, Plan
from recipe.plan.duration import Duration
from recipe.plan.parts import Part, total_gib
from recipe.plan.placement import Placement
from recipe.plan.ways import Way

WIDTH = 100


def render(plan: Plan, ways: Sequence[Way] = (), kwh_price: float | None = None) -> str:
    """The whole plan, verdict last: that is what stays on the screen. `ways`: what would make it fit."""
    blocks = [_head(plan), _device(plan), _host(plan), _disk(plan), _time(plan, kwh_price)]
    blocks.append(["Not modelled:", *(_wrap(f"- {text}") for text in plan.not_modelled)])
    if plan.fits:
        sizes = {"host RAM": plan.ram_gib, "disk": plan.disk_gib}
        unknown = [name for name, size in sizes.items() if size is None]
        blocks.append(
            [f"It fits (not compared, since not given: {', '.join(unknown)})." if unknown else "It fits."]
        )
    else:
        blocks.append(["It does not fit:", *(_wrap(f"- {reason}") for reason in plan.reasons)])
        if ways:
            blocks.append(["What would fit, the cheapest first:", *map(_way, ways)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _head(plan: Plan) -> list[str]:
    where = _count(plan.world_size, "CPU rank")
    if plan.vram_gib:
        sizes = " and ".join(f"{size:.1f}" for size in plan.vram_each_gib)
        alike = len(set(plan.vram_each_gib)) == 1
        where = f"{_count(plan.world_size, 'GPU')} of {plan.vram_gib if alike else sizes:{'.1f' if alike else ''}} GiB"
    steps = f"{plan.steps:,} steps of " if plan.steps else "steps of "
    return [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.trainable_parameters:,} trainable; on {where}",
        f"{steps}{plan.tokens_per_step:,} tokens, each {_count(plan.world_size, 'rank')} × "
        f"{_count(plan.accumulation, 'micro-batch', 'es')} × {plan.micro_batch_tokens:,} tokens",
        _placed(plan.placement),
    ]


def _placed(placement: Placement) -> str:
    layers, offloaded, kept = placement.layers, placement.offload_layers, placement.keep_layers
    weights = f"{offloaded} of {layers} layers offloaded to host RAM" if offloaded else "no layer offloaded"
    if kept == layers:
        return f"{weights}; all keep their activations"
    return f"{weights}; {kept} keep their activations, {layers - kept} compute them again"


def _device(plan: Plan) -> list[str]:
    if plan.device == "cpu":
        return _table("Host RAM of each rank", plan.device_parts, plan.device_gib)
    spare = Part("to spare", GPU_SPARE_GIB, "for what this plan does not know")
    return _table(
        "Memory of each GPU",
        [*plan.device_parts, *plan.outside_parts, spare],
        plan.vram_needed_gib,
        plan.vram_gib,
    )


def _host(plan: Plan) -> list[str]:
    parts = plan.host_parts
    if plan.device == "cpu":  # the parts of a rank stand above already
        ranks = plan.world_size * plan.device_gib
        others = parts[: len(parts) - len(plan.device_parts)]
        parts = [*others, Part("ranks", ranks, f"{plan.world_size} × the memory above")]
    lines = _table(
        "Host RAM",
        [*parts, Part("to spare", HOST_SPARE_GIB, "for the system")],
        total_gib(plan.host_parts) + HOST_SPARE_GIB,
        plan.ram_gib,
    )
    if plan.prepare_gib:
        lines.append(_row("prepare, before", plan.prepare_gib, "quantises a piece at a time"))
    cached = ", ".join(f"{part.name} {part.gib:.2f}" for part in plan.cache_parts)
    lines.append(_row("cached where there is room", total_gib(plan.cache_parts), f"files: {cached}"))
    return lines


def _disk(plan: Plan) -> list[str]:
    parts = list(plan.run_disk_parts)
    if plan.on_disk_gib:
        lines = [_row("model", plan.on_disk_gib, "prepared already")]
    else:
        parts, lines = plan.model_disk_parts + parts, []
    return _table("Disk", parts, plan.disk_needed_gib, plan.disk_gib) + lines


def _time(plan: Plan, kwh_price: float | None) -> list[str]:
    lasts = plan.duration
    if lasts is None:
        return [
            f"Time: unknown ({'no rate is known for a CPU' if plan.device == 'cpu' else 'the card has no known rate'})"
        ]
    names = " and ".join(dict.fromkeys(name for name in plan.cards if name))
    cards = f"if the cards are {names}" if plan.cards_assumed else names
    source = "" if lasts.measured else "; from the vendor's rates, not measured on this card"
    lines = [
        _wrap_from(
            f"Time: about {_clock(lasts.step_seconds)} a step, {lasts.tokens_per_second:,.0f} tokens/s ({cards}{source})"
        ),
        f"  at least {_clock(lasts.floor_step_seconds)} a step, for the matrix products at the card's full rate",
    ]
    if lasts.run_seconds is not None and lasts.floor_seconds is not None:
        lines.append(f"  the run of {lasts.steps:,} steps: about {_clock(lasts.run_seconds)}")
    if lasts.epoch_seconds is not None:
        lines.append(
            f"  all rows once: about {lasts.epoch_steps:,.0f} steps, {_clock(lasts.epoch_seconds)} (4 characters a token)"
        )
    parts = sorted(lasts.parts.items(), key=lambda part: -part[1])[:4]
    lines.append(_wrap("of a step: " + ", ".join(f"{name} {_clock(seconds)}" for name, seconds in parts)))
    lines.append(f"  limited by {lasts.limited_by}")
    return [*lines, *_energy(lasts, kwh_price)]


def _energy(lasts: Duration, kwh_price: float | None) -> list[str]:
    if lasts.run_kwh is None:
        return []
    price = "" if kwh_price is None else f", {lasts.run_kwh * kwh_price:,.2f} at {kwh_price:g} a kWh"
    return [f"  energy: {lasts.watts:,.0f} W at most, {lasts.run_kwh:,.1f} kWh{price}"]


def _way(way: Way) -> str:
    plan = way.plan
    facts = []
    if plan.vram_gib is not None:
        facts.append(f"{plan.vram_needed_gib:.1f} of {plan.vram_gib:.4g} GiB on each GPU")
    ram = "" if plan.ram_gib is None else f" of {plan.ram_gib:.4g}"
    facts.append(f"{plan.ram_needed_gib:.1f}{ram} GiB of RAM")
    if plan.duration:
        facts.append(f"{plan.duration.tokens_per_second:,.0f} tokens/s")
    return _wrap(f"- {way.change}: {', '.join(facts)}")


def _table(title: str, parts: list[Part], total: float, there: float | None = None) -> list[str]:
    found = "" if there is None else f"of {there:.2f} GiB there"
    rows = [_row(part.name, part.gib, part.note) for part in parts]
    return [f"{title:<26}{'GiB':>9}", *rows, _row("total", total, found)]


def _row(name: str, gib: float, note: str) -> str:
    size = f"{gib:.2f}" if gib >= 0.005 else "< 0.01"
    return f"  {name:<24}{size:>9}  {note}".rstrip()


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _wrap_from(text: str) -> str:
    """With its first line at the margin."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _clock(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
