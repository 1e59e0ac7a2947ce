"""Results for the eye: a table of at most 100 columns, the kernels of a profile, and a bar chart as SVG."""

from __future__ import annotations

import textwrap
from typing import Any

from recipe.bench.spec import EMULATIONS, OURS
from recipe.svg import GREY, INK, ground, text

WIDTH = 100
LABELS = {
    "skipped": "skipped",
    "failed": "failed",
    "out_of_memory": "out of memory",
}
# (heading, its second line, width)
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("", "variant", -11),
    ("", "tokens", 7),
    ("", "tokens/s", 10),
    ("", "min–max", 13),
    ("seconds/", "mb", 10),
    ("allocated", "GiB", 11),
    ("reserved", "GiB", 10),
    ("", "retries", 9),
    ("RAM", "GiB", 7),
    ("GPU", "%", 5),
    ("roof", "%", 6),
)
COLORS = {OURS: "#1a7f4b", "article": "#8a8f98", "fsdp_qlora": "#6b7280", "trl": "#a3a8b0"}


def render(document: dict[str, Any]) -> str:
    """The whole answer as text."""
    rows = document["results"]
    lines = [*_heading(document), ""]
    lines += [_cells([column[0] for column in COLUMNS]), _cells([column[1] for column in COLUMNS])]
    for row in rows:
        lines += _row(row)
    if document["ratios"]:
        lines += ["", *(_ratio(ratio) for ratio in document["ratios"])]
    for row in rows:
        if row["variant"] == OURS and row.get("details"):
            chosen = ", ".join(f"{name} {value}" for name, value in row["details"].items())
            lines += textwrap.wrap(f"{row['name']} {row['tokens']}: {chosen}", WIDTH)
        if row.get("checkpoint"):
            rate = row["read_gib"] / row["build_seconds"]
            lines.append(
                f"{row['name']} {row['tokens']}: loaded {row['read_gib']:.1f} GiB ({row['checkpoint']}) in "
                f"{row['build_seconds']:.1f} s, {rate:.1f} GiB/s; first step {row['first_step_seconds']:.1f} s"
            )
    for row in rows:
        if row.get("profile"):
            lines += ["", *_profile(row)]
    return "\n".join(line.rstrip() for line in lines)


def verdict(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if row["status"] == "measured":
        return f"{_number(row['tokens_per_second'])} tokens/s"
    return LABELS[row["status"]] + (f": {row['note']}" if row["note"] else "")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours at its fastest length over each other way at its fastest; without P2P, which the others have not."""

    def best(variant: str) -> dict[str, Any] | None:
        done = [row for row in rows if row["name"] == variant and row["status"] == "measured"]
        return max(done, key=lambda row: row["tokens_per_second"], default=None)

    ours = best(OURS)
    if ours is None:
        return []
    return [
        {
            "ours_tokens": ours["tokens"],
            "against": other["variant"],
            "against_tokens": other["tokens"],
            "speed_ratio": ours["tokens_per_second"] / other["tokens_per_second"],
        }
        for other in filter(None, map(best, EMULATIONS))
    ]


def machine_line(document: dict[str, Any]) -> str:
    machine = document["machine"]
    names = machine["gpus"]
    return f"{len(names)} × {names[0]}" if names else f"CPU ({machine['cpu']})"


def model_line(document: dict[str, Any]) -> str:
    model = document["model"]
    billions = model["parameters"] / 1e9
    size = f"{billions:.1f} B" if billions >= 0.1 else f"{model['parameters'] / 1e6:.1f} M"
    return f"{model['name']}, {model['layers']} layer{'s' * (model['layers'] > 1)}, {size} parameters"


def _heading(document: dict[str, Any]) -> list[str]:
    versions, rows = document["versions"], document["results"]
    cap, documents, micro = (rows[0][name] for name in ("cap_gib", "document_tokens", "micro_batches"))
    facts = [
        f"{model_line(document)}, random NF4 weights",
        machine_line(document) + (f", allocator capped at {cap:g} GiB per GPU" if cap else ""),
        f"LoRA dropout {rows[0]['dropout']:g}; {'1 micro-batch' if micro == 1 else f'{micro} micro-batches'} of one row per step; "
        + (f"documents of {documents} tokens in a row" if documents else "one document a row"),
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "bitsandbytes", "peft", "transformers")),
    ]
    if rates := [row["matmul_tflops"] for row in rows if row["status"] == "measured"]:
        low, high = (_number(rate) for rate in (min(rates), max(rates)))
        flop = document["model"]["flop_per_token"]
        spread = low if low == high else f"{low}–{high}"
        facts.append(f"matmul {spread} TFLOP/s per device in this run; {flop / 1e9:,.3g} GFLOP per token")
    return [line for fact in facts for line in textwrap.wrap(fact, WIDTH)]


def _row(row: dict[str, Any]) -> list[str]:
    start = [row["name"], str(row["tokens"])]
    if row["status"] != "measured":
        cap = f" (cap {row['cap_gib']:g} GiB)" if row["status"] == "out_of_memory" and row["cap_gib"] else ""
        indent = " " * (sum(abs(column[2]) for column in COLUMNS[:2]) + 2)
        text = " ".join(f"{verdict(row)}{cap}".split())
        wrapped = textwrap.wrap(text, WIDTH - len(indent), max_lines=3, placeholder=" …")
        return [f"{_cells(start)}  {wrapped[0]}", *(indent + line for line in wrapped[1:])]
    utilisation, share = row["gpu_utilisation_percent"], row["share_of_roofline"]
    low, high = (_number(row[f"tokens_per_second_{end}"]) for end in ("min", "max"))
    return [
        _cells(
            [
                *start,
                _number(row["tokens_per_second"]),
                f"{low}–{high}",
                f"{row['seconds_per_micro_batch']:.3f}",
                _optional(row["peak_allocated_gib"], ".1f"),
                _optional(row["peak_reserved_gib"], ".1f"),
                _optional(row["allocator_retries"], "d"),
                _optional(row["host_ram_gib"], ".1f"),
                _optional(utilisation, ".0f"),
                f"{100 * share:.0f}",
            ]
        )
    ]


def _cells(texts: list[str]) -> str:
    return "".join(
        text.ljust(-width) if width < 0 else text.rjust(width)
        for text, (_, _, width) in zip(texts, COLUMNS, strict=False)
    )


def _number(value: float) -> str:
    """Three digits that count, and no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(ratio: dict[str, Any]) -> str:
    return (
        f"ours at {ratio['ours_tokens']} tokens = {ratio['speed_ratio']:.2f} × "
        f"{ratio['against']} at {ratio['against_tokens']} tokens"
    )


def _profile(row: dict[str, Any]) -> list[str]:
    profile = row["profile"]
    busy = profile["busy_ms"]
    lines = [
        f"{row['name']} {row['tokens']}: one step of {profile['step_ms']:.1f} ms under the profiler, kernels "
        f"{profile['kernels_ms']:.1f} ms" + (f", busy {busy:.1f} ms" if busy is not None else "")
    ]
    for entry in profile["classes"]:
        lonely = f"{entry['alone_ms']:>10.1f} ms alone" if entry["alone_ms"] is not None else ""
        lines.append(f"  {entry['class']:<20}{entry['ms']:>10.1f} ms{100 * entry['share']:>7.1f} %{lonely}")
    for entry in profile["top"]:
        start = f"  {entry['ms']:>10.1f} ms{100 * entry['share']:>6.1f} %{entry['calls']:>7} × "
        lines.append(start + entry["kernel"][: WIDTH - len(start)])
    return lines


def figure(document: dict[str, Any]) -> str:
    """tokens/s of each row as a bar, with its spread; a row without a number says why."""
    rows = document["results"]
    left, right, top, pitch = 150, 130, 64, 34
    width, height = 760, top + pitch * len(rows) + 44
    fastest = max((row.get("tokens_per_second_max", 0) for row in rows), default=0) or 1
    scale = (width - left - right) / fastest
    parts = _ground(width, height, "Tokens per second, more is better", document)
    for index, row in enumerate(rows):
        y = top + index * pitch
        middle = y + 12
        parts.append(text(left - 10, y + 17, f"{row['name']} {row['tokens']}", INK, "end"))
        if row["status"] != "measured":
            parts.append(text(left, y + 17, textwrap.shorten(verdict(row), 80), "#b45309"))
            continue
        length = row["tokens_per_second"] * scale
        ends = [left + row[f"tokens_per_second_{name}"] * scale for name in ("min", "max")]
        label = _number(row["tokens_per_second"])
        if row["peak_reserved_gib"] is not None:
            label += f"  ({row['peak_reserved_gib']:.1f} GiB)"
        parts += [
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="24" fill="{COLORS[row["variant"]]}"/>',
            f'<path d="M{ends[0]:.1f} {middle}H{ends[1]:.1f}M{ends[0]:.1f} {middle - 4}v8'
            f'M{ends[1]:.1f} {middle - 4}v8" stroke="#111827" fill="none"/>',
            text(max(left + length, ends[1]) + 8, y + 17, label),
        ]
    cap = rows[0]["cap_gib"]
    foot = "median of the timed steps, line: slowest to fastest"
    foot += f"; GiB reserved per GPU, capped at {cap:g}" if cap else ""
    parts += [text(16, height - 16, foot, GREY, size=11), "</svg>"]
    return "\n".join(parts) + "\n"


def time_figure(document: dict[str, Any]) -> str:
    """Where the time of one step goes, for each profiled row: a bar a class, dark where nothing else ran meanwhile."""
    rows = [row for row in document["results"] if row.get("profile")]
    shown = {row["name"]: [each for each in row["profile"]["classes"] if each["ms"]] for row in rows}
    left, right, top, pitch = 150, 190, 64, 22
    width = 760
    height = top + sum((len(classes) + 2) * pitch for classes in shown.values()) + 30
    longest = max((row["profile"]["step_ms"] for row in rows), default=1)
    scale = (width - left - right) / longest
    parts = [*_ground(width, height, "Where the time of a step goes", document)]
    y = top
    for row in rows:
        step = row["profile"]["step_ms"]
        parts.append(text(16, y + 16, f"{row['name']} {row['tokens']}: a step of {step:.0f} ms"))
        y += pitch
        for each in shown[row["name"]]:
            alone = each["alone_ms"]
            said = f"{each['ms']:.0f} ms" + ("" if alone is None else f", alone {alone:.0f}")
            parts += [
                text(left - 10, y + 15, each["class"], INK, "end", 12),
                *(
                    f'<rect x="{left}" y="{y + 3}" width="{ms * scale:.1f}" height="{pitch - 6}" fill="{color}"/>'
                    for ms, color in ((each["ms"], "#a7d3b9"), (alone or 0.0, COLORS[OURS]))
                ),
                text(left + each["ms"] * scale + 8, y + 15, said, size=12),
            ]
            y += pitch
        y += pitch
    foot = "kernels of one rank, one step under torch.profiler; dark: nothing else ran at that time"
    parts += [text(16, height - 12, foot, GREY, size=11), "</svg>"]
    return "\n".join(parts) + "\n"


def _ground(width: int, height: int, title: str, document: dict[str, Any]) -> list[str]:
    """The beginning of a figure: what it shows, of which model, on which machine."""
    return ground(width, height, title, f"{model_line(document)}; {machine_line(document)}")


def verdict_lines(verdicts: list[dict[str, Any]]) -> list[str]:
    """What was promised, what was found, and whether that will do."""
    marks = {True: "met", False: "MISSED", None: "rehearsal"}
    widths = [
        max((len(verdict[key]) for verdict in verdicts), default=0) for key in ("what", "must", "found")
    ]
    return [
        "  ".join(
            [
                *(
                    verdict[key].ljust(width)
                    for key, width in zip(("what", "must", "found"), widths, strict=True)
                ),
                marks[verdict["met"]],
            ]
        )
        for verdict in verdicts
    ]
