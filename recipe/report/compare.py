"""`recipe compare RUN RUN…`: what differs between runs, in what they were made of and in what came out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recipe.report import page
from recipe.report.curves import Chart, Line
from recipe.report.make import write_page
from recipe.report.numbers import Series, series, sums
from recipe.report.read import Record
from recipe.settings import Settings

OUTCOMES = {
    "steps": ("steps", 0),
    "first_loss": ("training loss, first", 4),
    "last_loss": ("training loss, last", 4),
    "held_out_first": ("held-out loss, first", 4),
    "held_out_last": ("held-out loss, last", 4),
    "held_out_best": ("held-out loss, best", 4),
    "perplexity": ("perplexity (recipe eval)", 3),
    "right_answers": ("right answers", 0),
    "tokens_per_second": ("tokens per second, median", 0),
    "step_seconds": ("seconds a step, median", 3),
    "roofline_share": ("share of the roofline", 3),
    "seconds": ("seconds of all steps", 0),
    "vram_reserved_gib": ("GPU memory, GiB", 2),
    "host_ram_gib": ("host RAM, GiB", 2),
    "kwh": ("energy of the GPUs, kWh", 3),
}
BETTER_LOW = ("last_loss", "held_out_last", "held_out_best", "perplexity")
NOT_COMPARED = ("created",)  # differs always
COLORS = 6


def compare(records: list[Record]) -> dict[str, Any]:
    """As --json prints it: each run's outcome, and what differs of settings and manifests, a value for each run."""
    defaults = Settings().to_dict()
    settings = [dict(page.flattened(_with_defaults(record.settings, defaults))) for record in records]
    manifests = [dict(page.flattened(record.manifest)) for record in records]
    return {
        "runs": [outcome(record) for record in records],
        "settings": _differing(settings),
        "manifest": [row for row in _differing(manifests) if row["key"] not in NOT_COMPARED],
    }


def outcome(record: Record) -> dict[str, Any]:
    tuned = record.evaluation.get("tuned") or {}
    return {
        "run": record.name,
        "state": record.state,
        **dataclasses.asdict(sums(record)),
        "perplexity": tuned.get("perplexity"),
        "right_answers": tuned.get("exact_matches") if tuned.get("prompts") else None,
        "right_answers_of": tuned.get("prompts") or None,
    }


def _with_defaults(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A run of an earlier version has the defaults of settings that it did not know."""
    return {
        name: {**(defaults.get(name) or {}), **(values if isinstance(values, dict) else {})}
        for name, values in {**defaults, **settings}.items()
    }


def _differing(each: list[dict[str, str]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for values in each for key in values)
    rows = [{"key": key, "values": [values.get(key) for values in each]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def outcomes(found: dict[str, Any]) -> list[tuple[str, list[str], int | None]]:
    """(what, a text for each run, which is best) of what is known of some run."""
    rows = []
    for name, (label, digits) in OUTCOMES.items():
        values = [run[name] for run in found["runs"]]
        if all(value is None for value in values):
            continue
        known = [value for value in values if value is not None]
        best = values.index(min(known)) if name in BETTER_LOW and len(set(known)) > 1 else None
        rows.append((label, [page.number(value, digits) for value in values], best))
    return rows


def render(found: dict[str, Any]) -> str:
    """For a terminal: a column for each run."""
    names = [run["run"] for run in found["runs"]]
    blocks = [
        _table(
            ["", *names],
            [["state", *(run["state"] for run in found["runs"])]]
            + [[label, *texts] for label, texts, _ in outcomes(found)],
        )
    ]
    for title, part in (("Settings", "settings"), ("Manifests", "manifest")):
        rows = [[row["key"], *(_short(value) for value in row["values"])] for row in found[part]]
        blocks.append(_table([f"{title} that differ", *names], rows) if rows else f"{title}: no difference")
    return "\n\n".join(blocks)


def _short(value: str | None, width: int = 28) -> str:
    text = "–" if value is None else " ".join(value.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )


# -- the page ---------------------------------------------------------------------------------------------------------


def write_html(records: list[Record], found: dict[str, Any], output: str) -> None:
    drawn = together(records)
    text = page.page(
        "compare.html.jinja",
        charts(records, drawn),
        drawn,
        records=records,
        found=found,
        outcomes=outcomes(found),
        colors=[_color(i) for i in range(len(records))],
        live=False,
    )
    write_page(Path(output), text)


def together(records: list[Record]) -> Series:
    """The series of each run, `steps-0`, `evaluations-0`, `steps-1` and so on."""
    return {
        f"{name}-{i}": columns for i, record in enumerate(records) for name, columns in series(record).items()
    }


def charts(records: list[Record], drawn: Series) -> list[Chart]:
    def lines(source: str, column: str, markers: bool = False) -> tuple[Line, ...]:
        return tuple(
            Line(column, record.name, _color(i), f"{source}-{i}", markers=markers, width=1.5)
            for i, record in enumerate(records)
            if any(value is not None for value in drawn[f"{source}-{i}"].get(column, ()))
        )

    wanted = [
        Chart("loss", "Training loss", "", lines("steps", "loss"), "0.0000", wide=True),
        Chart("held_out", "Held-out loss", "", lines("evaluations", "loss", markers=True), "0.0000"),
        Chart("rate", "Throughput", "tokens/s", lines("steps", "tokens_per_second"), "0,0"),
        Chart("learning_rate", "Learning rate", "", lines("steps", "learning_rate"), "0.00e+0"),
        Chart("grad_norm", "Gradient norm", "before clipping", lines("steps", "grad_norm")),
        Chart("vram", "GPU memory reserved", "GiB, rank 0", lines("steps", "vram_reserved_gib"), "0.00"),
        Chart("ram", "Host RAM", "GiB, all ranks", lines("steps", "host_ram_gib"), "0.00"),
    ]
    return [chart for chart in wanted if chart.lines]


def _color(i: int) -> int:
    return i % COLORS + 1
