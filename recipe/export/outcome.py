"""What training came to, for the model card: the loss by step, before and after, and what `recipe eval` found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from recipe.report.read import Record, is_number
from recipe.settings import Settings

CURVE_POINTS = 8
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 60


def curve(record: Record) -> str:
    """The losses as a line of blocks, and some of them in numbers."""
    lines = [line for line in record.steps if is_number(line.get("loss"))]
    if not lines:
        return ""
    held_out = {line["step"]: line["loss"] for line in record.evaluations}
    count = min(CURVE_POINTS, len(lines))
    picked = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    losses = {line["step"]: line["loss"] for line in picked}
    rows = [
        (f"{step}", *(f"{found[step]:.4f}" if step in found else "" for found in (losses, held_out)))
        for step in sorted(losses | held_out)
    ]
    return f"### Loss by step\n\n```text\n{sparkline([line['loss'] for line in lines])}\n```\n\n" + table(
        ("step", "training loss", "held-out loss"), rows
    )


def sparkline(values: list[float], width: int = SPARKLINE_WIDTH) -> str:
    """Means of stretches, the highest of them the highest block."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1)) if span else 0] for mean in means)


def results(record: Record, settings: Settings) -> str:
    after = record.summary["held_out_loss"]
    evaluations = record.evaluations
    before = evaluations[0]["loss"] if evaluations and evaluations[0]["step"] == 0 else None
    label = "held-out loss" + (" of the chosen answers" if settings.train.method == "dpo" else "")
    rows = [
        (label, _number(before), _number(after) if after is not None else "not measured"),
        ("perplexity", *(_number(None if loss is None else _perplexity(loss)) for loss in (before, after))),
        ("training loss (mean)", "", _number(record.summary["train_loss"])),
    ]
    return "## Results\n\n" + table(("", "before", "after"), rows)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))  # what a float can hold


def _number(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def evaluation(record: Record) -> str:
    """Of `recipe eval`, where it was run: numbers alone, since its samples are somebody's data."""
    report = record.evaluation
    base, tuned = report.get("base"), report.get("tuned")
    if not isinstance(base, dict) or not isinstance(tuned, dict):
        return ""
    rows: list[tuple[str, ...]] = [
        (label, _number(base.get(key)), _number(tuned.get(key)))
        for key, label in (("loss", "loss"), ("perplexity", "perplexity"))
    ]
    if base.get("prompts"):
        rows.append(
            ("exact answers", *(f"{one['exact_matches']} of {one['prompts']}" for one in (base, tuned)))
        )
    for task, metrics in (base.get("tasks") or {}).items():
        after = (tuned.get("tasks") or {}).get(task, {})
        rows += [
            (f"{task}, {key}", _number(metrics[key]), _number(after.get(key)))
            for key in metrics
            if key != "rows"
        ]
    head = f"### Evaluation on {report.get('held_out_rows', '?')} held-out rows"
    return f"{head}\n\n{table(('', 'before', 'after'), rows)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
