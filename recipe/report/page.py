"""A report as text: what the templates say of a record, with bokeh's JavaScript and our own inlined."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recipe.report import curves, numbers
from recipe.report.read import Record, is_number

STATE_COLORS = {
    "finished": "good",
    "running": "live",
    "failed": "bad",
    "broken off": "bad",
    "stopped": "warn",
}
MOST_EVENTS = 400  # the newest; a run that warns at every step makes no larger page
MOST_SAMPLES = 60
LONGEST_TEXT = 4000  # characters of a sample's answer or an event's message


def render(record: Record, kwh_price: float | None = None, live: bool = False) -> str:
    """The whole page. `live`: it asks its server for what is new."""
    series = numbers.series(record)
    charts = curves.charts(series)
    found = numbers.sums(record)
    shown_tiles = tiles(record, found, kwh_price)
    return page(
        "report.html.jinja",
        charts,
        series,
        record=record,
        sums=found,
        tiles=shown_tiles,
        columns=min((4, 5, 6), key=lambda n: -len(shown_tiles) % n),  # the fewest gaps
        foreseen=numbers.plan_against(record, found),
        roofline=numbers.roofline(record),
        histogram=histogram(record.statistics),
        facts=facts(record),
        events=record.events[-MOST_EVENTS:][::-1],
        samples=record.samples[-MOST_SAMPLES:],
        manifest=list(flattened(record.manifest)),
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        live=live,
    )


def page(template: str, charts: list[curves.Chart], series: numbers.Series, **values: Any) -> str:
    """A template with curves: scripts that the page's policy names by their hashes, so that no other one can run."""
    scripts = (
        {"bokeh_js": bokeh_js(), "page_js": Markup(source("page.js.jinja"))}
        if charts or values["live"]
        else {}
    )
    policy = " ".join(f"'sha256-{_hash(text)}'" for text in scripts.values())
    return (
        _environment()
        .get_template(template)
        .render(
            charts=charts,
            series=in_script(series),
            drawing=in_script(curves.embedded(charts, series)),
            bokeh_js=scripts.get("bokeh_js"),
            page_js=scripts.get("page_js"),
            style=Markup(source("style.css.jinja")),
            script_policy=policy or "'none'",
            state_color=STATE_COLORS,
            most_points=numbers.MOST_POINTS,
            **values,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "clock": clock,
        "moment": lambda seconds: time.strftime("%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "",
        "short": lambda text: _short(str(text)),
        "value": shown,
        "percent": lambda share: f"{100 * share:+.1f} %",
    }
    return environment


def source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@functools.cache
def bokeh_js() -> Markup:
    """BokehJS without its widgets, tables and WebGL: 1.2 MB."""
    from bokeh.resources import Resources

    return Markup(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw[0])


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def in_script(value: Any) -> Markup:
    """JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


# -- how values are written -------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 2) -> str:
    return f"{value:,.{digits}f}" if is_number(value) else "–"


def clock(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shown(value: Any) -> str:
    """As a config would have it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def flattened(value: Mapping[str, Any], prefix: str = "") -> Any:
    """(dotted name, text) of all that a nested object holds."""
    for name, inner in value.items():
        key = f"{prefix}{name}"
        if isinstance(inner, Mapping):
            yield from flattened(inner, f"{key}.")
        elif isinstance(inner, list):
            yield key, ", ".join(shown(item) for item in inner) or "none"
        else:
            yield key, shown(inner)


# -- parts of the page ------------------------------------------------------------------------------------------------


def tiles(record: Record, found: numbers.Sums, kwh_price: float | None) -> list[tuple[str, str, str]]:
    """(what, how much, a word on it) of what sums the run up; what is not known is left out."""
    total = record.total_steps
    rows = [("steps", f"{found.steps:,}", f"of {total:,}" if total else "")]
    if found.held_out_last is not None:
        rows.append(
            ("held-out loss", number(found.held_out_last, 4), f"from {number(found.held_out_first, 4)}")
        )
    elif found.last_loss is not None:
        rows.append(("training loss", number(found.last_loss, 4), f"from {number(found.first_loss, 4)}"))
    if (right := _right_answers(record)) is not None:
        rows.append(right)
    if found.tokens_per_second is not None:
        share = f"{found.roofline_share:.0%} of the roofline" if found.roofline_share else "median"
        rows.append(("tokens per second", number(found.tokens_per_second, 0), share))
    if found.seconds:
        rows.append(("time of all steps", clock(found.seconds), f"{number(found.tokens, 0)} tokens"))
    if found.vram_reserved_gib is not None:
        rows.append(("GPU memory", f"{number(found.vram_reserved_gib, 1)} GiB", "reserved at most"))
    if found.host_ram_gib is not None:
        rows.append(("host RAM", f"{number(found.host_ram_gib, 1)} GiB", "of all ranks, at most"))
    if found.temperature_celsius is not None:
        rows.append(("hottest", f"{number(found.temperature_celsius, 0)} °C", "of the GPUs"))
    if found.kwh is not None:
        price = f", {found.kwh * kwh_price:,.2f} at {kwh_price:g} a kWh" if kwh_price is not None else ""
        rows.append(("energy", f"{number(found.kwh, 3)} kWh", f"of the GPUs{price}"))
    if record.state == "running" and total and found.step_seconds:
        rows.append(("left", clock((total - found.steps) * found.step_seconds), "at this pace"))
    return rows


def _right_answers(record: Record) -> tuple[str, str, str] | None:
    base, tuned = (record.evaluation.get(name) or {} for name in ("base", "tuned"))
    if not tuned.get("prompts"):
        return None
    return (
        "right answers",
        f"{tuned.get('exact_matches')} of {tuned['prompts']}",
        f"{base.get('exact_matches')} before",
    )


def facts(record: Record) -> list[str]:
    """Of the machine, for the line below the title."""
    manifest = record.manifest
    gpus = [str(name) for name in manifest.get("gpus") or []]
    where = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)] or [
        str(manifest.get("cpu") or "")
    ]
    ranks = manifest.get("world_size")
    found = [
        *where,
        f"{ranks} ranks" if ranks else "",
        str(manifest.get("created") or "").replace("T", " ")[:16],
    ]
    return [fact for fact in found if fact]


def histogram(statistics: dict[str, Any]) -> list[tuple[str, int, float]]:
    """(range of lengths, rows, share of the longest bar)."""
    lengths = statistics.get("lengths")
    if not isinstance(lengths, dict):
        return []
    edges, counts = lengths.get("edges") or [], lengths.get("counts") or []
    if len(edges) != len(counts) + 1 or not all(map(is_number, [*edges, *counts])):
        return []
    most = max(counts, default=0) or 1
    return [
        (f"{int(low):,}–{int(high):,}", count, count / most)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
