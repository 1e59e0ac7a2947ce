"""The curves: bokeh figures without data, which the page fills from its own JSON, at first and whenever there is more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BasicTickFormatter,
    ColumnDataSource,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from recipe.report.numbers import Series

HEIGHT, TALL = 220, 320
EDGE = 0.01  # of the span of steps
CROWDED = 150  # points, from which on lines are thinner


@dataclass(frozen=True)
class Line:
    """`color` is a number of the page's palette, which has other values in the dark."""

    column: str
    label: str
    color: int = 1
    source: str = "steps"
    x: str = "step"
    dash: str = "solid"
    width: float = 2.0
    alpha: float = 1.0
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    form: str = "0.000"  # of a value under the pointer
    wide: bool = False


def charts(series: Series) -> list[Chart]:
    """Those that have something to show."""
    steps = series["steps"]
    smooth = "loss_smooth" in steps
    thin = 1.2 if len(steps.get("step", ())) > CROWDED else 2.0
    # Between the first and the last alone a line would say what nobody has measured.
    joined = 1.0 if len(series["evaluations"]["step"]) > 2 else 0.0
    held_out = Line("loss", "held out", 2, "evaluations", dash="dotted", alpha=joined, markers=True)
    loss = [
        Line(
            "loss",
            "each step" if smooth else "training",
            1,
            width=1 if smooth else 2,
            alpha=0.4 if smooth else 1,
        ),
        Line("loss_smooth", "smoothed", 1),
    ]

    def gpus(name: str) -> list[Line]:
        columns = [column for column in steps if column.startswith(f"{name}_")]
        return [
            Line(column, f"GPU {column.rpartition('_')[2]}", i % 6 + 1, width=thin)
            for i, column in enumerate(columns)
        ]

    def plan(name: str) -> Line:
        return Line(f"plan_{name}", "plan", 6, dash="dashed", width=1.5)

    wanted = [
        Chart("loss", "Loss", "", (*loss, held_out), "0.0000", wide=True),
        Chart(
            "rate",
            "Throughput",
            "tokens/s",
            (Line("tokens_per_second", "measured", width=thin), plan("tokens_per_second")),
            "0,0",
        ),
        Chart("learning_rate", "Learning rate", "", (Line("learning_rate", "of AdamW", 4),), "0.00e+0"),
        Chart(
            "grad_norm",
            "Gradient norm",
            "before clipping",
            (Line("grad_norm", "over all ranks", 3, width=thin),),
        ),
        Chart(
            "vram",
            "GPU memory",
            "GiB, rank 0",
            (
                Line("vram_reserved_gib", "reserved"),
                Line("vram_allocated_gib", "allocated", 2),
                plan("vram_reserved_gib"),
            ),
            "0.00",
        ),
        Chart(
            "ram",
            "Host RAM",
            "GiB, all ranks",
            (Line("host_ram_gib", "in use", 5), plan("host_ram_gib")),
            "0.00",
        ),
        Chart("temperature", "Temperature", "°C", tuple(gpus("temperature_celsius")), "0"),
        Chart("power", "Power", "W", tuple(gpus("power_watts")), "0"),
    ]
    found = []
    for chart in wanted:
        there = tuple(line for line in chart.lines if _has(series, line))
        if any(not line.column.startswith("plan_") for line in there):
            found.append(Chart(chart.name, chart.title, chart.unit, there, chart.form, chart.wide))
    return found


def _has(series: Series, line: Line) -> bool:
    return any(value is not None for value in series.get(line.source, {}).get(line.column, ()))


def embedded(charts: list[Chart], series: Series) -> dict[str, Any]:
    """What BokehJS draws: a document and, for each chart, the element that it goes into."""
    sources = {
        name: ColumnDataSource({column: [] for column in columns}, name=name)
        for name, columns in series.items()
    }
    first, last = _span(series)
    # One for all: to zoom into one is to zoom into all.
    span = Range1d(start=first, end=last, name="span", reset_start=first, reset_end=last)
    figures = [_figure(chart, sources, span) for chart in charts]
    if not figures:
        return {"documents": {}, "items": []}
    document = Document(title="")
    for plot in figures:
        document.add_root(plot)
    places = {plot.id: f"chart-{chart.name}" for plot, chart in zip(figures, charts, strict=True)}
    item = {"docid": "report", "roots": places, "root_ids": list(places)}
    return {"documents": {"report": document.to_json(deferred=False)}, "items": [item]}


def _span(series: Series) -> tuple[float, float]:
    """Of the steps, with room for a mark at either end."""
    steps = [step for columns in series.values() for step in columns.get("step", ())]
    if not steps:
        return 0, 1
    first, last = min(steps), max(max(steps), min(steps) + 1)
    return first - EDGE * (last - first), last + EDGE * (last - first)


def _figure(chart: Chart, sources: dict[str, ColumnDataSource], span: Range1d) -> Any:
    plot = figure(
        height=TALL if chart.wide else HEIGHT,
        sizing_mode="stretch_width",
        x_range=span,
        tools="xbox_zoom,reset,save",
        active_drag=None,  # a finger scrolls the page
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=12,
        min_border_left=46,
    )
    plot.toolbar.autohide = True
    plot.toolbar.logo = None
    plot.yaxis.formatter = BasicTickFormatter(power_limit_high=6, power_limit_low=-4)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.xgrid.visible = False
    hovered = []
    for line in chart.lines:
        data = sources[line.source]
        tags: dict[str, Any] = {"tags": [f"color-{line.color}"]}
        style: dict[str, Any] = {"line_dash": line.dash, "line_width": line.width, "line_alpha": line.alpha}
        drawn = plot.line(line.x, line.column, source=data, **style, **tags)
        if line.markers:
            marks: dict[str, Any] = {"size": 7}
            plot.scatter(line.x, line.column, source=data, **tags, **marks)
        hovered.append((line, drawn))
    for source in dict.fromkeys(line.source for line in chart.lines):
        of_source = [(line, drawn) for line, drawn in hovered if line.source == source]
        plot.add_tools(
            HoverTool(
                mode="vline",
                renderers=[of_source[0][1]],
                tooltips=_tooltip(chart, [line for line, _ in of_source]),
                point_policy="snap_to_data",
            )
        )
    return plot


def _tooltip(chart: Chart, lines: list[Line]) -> str:
    """HTML of our own words; colours are the page's, which reach into bokeh's shadow DOM."""
    rows = "".join(
        f'<div><span style="color:var(--color-{line.color})">●</span> {line.label} '
        f"<b>@{{{line.column}}}{{{chart.form}}}</b></div>"
        for line in lines
    )
    style = "font:12px/1.5 system-ui,sans-serif;color:var(--ink);font-variant-numeric:tabular-nums"
    return f'<div style="{style}"><div style="color:var(--faint)">step @{{step}}{{0,0}}</div>{rows}</div>'
