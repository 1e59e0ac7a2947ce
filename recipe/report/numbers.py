"""What the report says in numbers: series for the curves, and the few that sum a run up."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from recipe.report.read import Record, is_number

MOST_POINTS = 2000  # of a curve: more than a screen has, and a run of a million steps makes no larger page
WARM_UP = 1  # the first step compiles and fills caches
SMOOTH_FROM = 100  # steps from which on a smoothed loss says more than the loss
JOULES_PER_KWH = 3.6e6
PER_GPU = ("temperature_celsius", "power_watts")

Series = dict[str, dict[str, list[Any]]]


def series(record: Record) -> Series:
    """What is drawn: columns of metrics.jsonl as they stand there, held-out losses, and constants of the plan."""
    lines = thinned(record.steps)
    names = [name for name in _columns(record.steps) if name not in PER_GPU]
    steps: dict[str, list[Any]] = {name: [_known(line.get(name)) for line in lines] for name in names}
    for name in PER_GPU:
        for i in range(
            max((len(line[name]) for line in lines if isinstance(line.get(name), list)), default=0)
        ):
            steps[f"{name}_{i}"] = [_item(line.get(name), i) for line in lines]
    if len(record.steps) >= SMOOTH_FROM:
        smooth = smoothed(record.steps)
        steps["loss_smooth"] = [smooth[line["step"]] for line in lines]
    for name, value in planned(record).items():
        if lines:
            steps[f"plan_{name}"] = [value] * len(lines)
    evaluations = record.evaluations
    return {
        "steps": steps,
        "evaluations": {name: [line[name] for line in evaluations] for name in ("step", "loss")},
    }


def _columns(lines: list[dict[str, Any]]) -> list[str]:
    """Names that have a number in some line."""
    found: dict[str, bool] = {}
    for line in lines:
        for name, value in line.items():
            if is_number(value) or isinstance(value, list):
                found[name] = True
    return list(found)


def _known(value: Any) -> Any:
    return value if is_number(value) else None


def _item(values: Any, i: int) -> Any:
    return _known(values[i]) if isinstance(values, list) and i < len(values) else None


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS of them: of each stretch its first, and those with the extremes of loss and gradient."""
    if len(lines) <= MOST_POINTS:
        return lines
    size = -(-len(lines) * 4 // MOST_POINTS)
    kept = {len(lines) - 1}
    for start in range(0, len(lines), size):
        stretch = range(start, min(start + size, len(lines)))
        kept.add(start)
        for name, choose in (("loss", min), ("loss", max), ("grad_norm", max)):
            known = [i for i in stretch if is_number(lines[i].get(name))]
            if known:
                kept.add(choose(known, key=lambda i, name=name: lines[i][name]))  # type: ignore[misc]
    return [lines[i] for i in sorted(kept)]


def smoothed(lines: list[dict[str, Any]]) -> dict[int, float | None]:
    """The loss by step as a running mean over a fortieth of the run, exponentially weighted."""
    keep = 1 - 1 / max(len(lines) / 40, 2)
    mean, weight, found = 0.0, 0.0, {}
    for line in lines:
        if is_number(line.get("loss")):
            mean, weight = keep * mean + (1 - keep) * line["loss"], keep * weight + 1 - keep
        found[line["step"]] = round(mean / weight, 5) if weight else None
    return found


# -- a run in a few numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Of the steps that metrics.jsonl has; None where nothing is known."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    held_out_first: float | None
    held_out_last: float | None
    held_out_best: float | None
    tokens: float
    step_seconds: float | None  # the median after the first
    tokens_per_second: float | None  # the same
    roofline_share: float | None
    seconds: float  # of all steps
    vram_reserved_gib: float | None  # the most
    host_ram_gib: float | None
    temperature_celsius: float | None
    kwh: float | None  # of the GPUs


def sums(record: Record) -> Sums:
    lines, held_out = record.steps, [line["loss"] for line in record.evaluations]
    losses = _numbers(lines, "loss")
    speed = _median(_numbers(lines[WARM_UP:], "tokens_per_second"))
    limit = roofline(record)
    return Sums(
        steps=int(lines[-1]["step"]) if lines else 0,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        held_out_first=held_out[0] if held_out else None,
        held_out_last=held_out[-1] if held_out else None,
        held_out_best=min(held_out, default=None),
        tokens=sum(_numbers(lines, "tokens")),
        step_seconds=_median(_numbers(lines[WARM_UP:], "step_seconds")),
        tokens_per_second=speed,
        roofline_share=speed / limit if speed and limit else None,
        seconds=sum(_numbers(lines, "step_seconds")),
        vram_reserved_gib=max(_numbers(lines, "vram_reserved_gib"), default=None),
        host_ram_gib=max(_numbers(lines, "host_ram_gib"), default=None),
        temperature_celsius=max(
            (t for line in lines for t in line.get("temperature_celsius") or () if is_number(t)), default=None
        ),
        kwh=energy_kwh(lines),
    )


def _numbers(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if is_number(line.get(name))]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def energy_kwh(lines: list[dict[str, Any]]) -> float | None:
    """What the GPUs drew: each step's power, read at its end, for as long as the step took."""
    joules = [
        sum(power for power in line["power_watts"] if is_number(power)) * line["step_seconds"]
        for line in lines
        if isinstance(line.get("power_watts"), list) and is_number(line.get("step_seconds"))
    ]
    return sum(joules) / JOULES_PER_KWH if joules else None


# -- the plan -----------------------------------------------------------------------------------------------------------


def roofline(record: Record) -> float | None:
    """Tokens per second if the matrix products ran at the cards' full rate and nothing else took time; None on a CPU."""
    lasts, tokens = record.plan.get("duration"), record.plan.get("tokens_per_step")
    floor = lasts.get("floor_step_seconds") if isinstance(lasts, dict) else None
    return tokens / floor if is_number(tokens) and is_number(floor) and tokens and floor else None


def planned(record: Record) -> dict[str, float]:
    """What `recipe plan` foresaw, by the name that it is measured under."""
    plan, found = record.plan, {}
    if is_number(plan.get("device_gib")) and plan.get("device") == "gpu":
        found["vram_reserved_gib"] = plan["device_gib"]
    # The ranks alone: metrics.jsonl does not count what starts them.
    parts = [part for part in plan.get("host_parts") or [] if isinstance(part, dict)]
    ranks = [part["gib"] for part in parts if part.get("name") != "launcher" and is_number(part.get("gib"))]
    if ranks:
        found["host_ram_gib"] = sum(ranks)
    lasts = plan.get("duration")
    for name in ("tokens_per_second", "step_seconds", "run_seconds", "run_kwh"):
        if isinstance(lasts, dict) and is_number(lasts.get(name)):
            found[name] = lasts[name]
    return {name: round(value, 4) for name, value in found.items()}


@dataclass(frozen=True)
class Foreseen:
    what: str
    unit: str
    plan: float
    measured: float
    digits: int = 2

    @property
    def off(self) -> float:
        return self.measured / self.plan - 1 if self.plan else 0.0


def plan_against(record: Record, found: Sums) -> list[Foreseen]:
    """The plan's numbers beside what happened, where both are known."""
    plan = planned(record)
    total = record.total_steps
    rows = [
        ("GPU memory reserved, the most", "GiB", "vram_reserved_gib", found.vram_reserved_gib, 2),
        ("host RAM of the ranks, the most", "GiB", "host_ram_gib", found.host_ram_gib, 2),
        ("a step", "s", "step_seconds", found.step_seconds, 2),
        ("tokens per second", "", "tokens_per_second", found.tokens_per_second, 0),
    ]
    if total and found.steps == total:
        rows.append(("all steps", "s", "run_seconds", found.seconds, 0))
        rows.append(("energy", "kWh", "run_kwh", found.kwh, 3))
    return [
        Foreseen(what, unit, plan[name], measured, digits)
        for what, unit, name, measured, digits in rows
        if name in plan and measured is not None
    ]
