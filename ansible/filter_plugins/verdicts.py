"""Can this host become what is wanted? Each check looks at one thing and says what was found, expected, and what to do.

`verdicts(machine, choices, plan, settings)` returns rows {check, status, found, expected, remedy}: `fail` ends the play
before anything is changed, `warn` goes on. `verdict_table(rows)` is the text to show, `failed(rows)` the message to end
with. The checks: judging/host.py and judging/gpus.py; plain functions of plain data.

    machine   what library/machine.py found
    choices   what filter_plugins/choices.py decided, with `unreachable`: [{url, for, error}]
    plan      what `recipe plan --json` prints, or None where that is not known
    settings  driver_branch; gpus_wanted (0: a machine without GPUs); ram_needed_gib (instead of the plan's); reboot
              (ask|yes|no); allow_desktop; mok (somebody sits there to enrol a key); docker_replace
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

# Ansible loads this file by its path, so Python does not know the folder that judging/ lies in.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from judging import gpus, host
from judging.case import Case, Row

WIDTH = 100
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "skip"}
# What `uri` puts before the reason why something did not answer.
BEFORE_REASON = re.compile(r"Status code was \S+ and not \[[\d, ]*\]: |Request failed: |<urlopen error ")
CHECKS = [*host.SYSTEM, *gpus.GPUS, *gpus.DRIVER, *host.MEMORY, *host.SOFTWARE]


def verdicts(
    machine: dict, choices: dict | None = None, plan: dict | None = None, settings: dict | None = None
) -> list[Row]:
    """All checks' rows, in the order in which they are worth reading."""
    case = Case(machine, choices or {}, plan or {}, settings or {})
    rows: list[Row] = []
    for check in CHECKS:
        said = check(case)
        rows += said if isinstance(said, list) else [said] if said else []
    return rows


def excused(rows: list[Row], names: list[str]) -> list[Row]:
    """Failed checks that the user wants to pass (checks_ignore), as warnings that say so."""
    return [
        row | {"status": "warn", "remedy": f"ignored, as checks_ignore says; {row['remedy']}"}
        if row["status"] == "fail" and row["check"] in names
        else row
        for row in rows
    ]


def unreachable(results: list[dict]) -> list[dict]:
    """Of the answers of Ansible's `uri`, those that are none: [{url, for, error}]. 407 is a proxy that refuses."""
    return [
        result["item"] | {"error": BEFORE_REASON.sub("", result.get("msg", "no answer")).strip("<> ")}
        for result in results
        if result.get("status", -1) in (-1, 407)
    ]


def apt_proxy(settings: list[str], url: str) -> dict[str, str]:
    """The environment in which `uri` asks a mirror as apt does; {} where apt's settings (NAME=VALUE) have no HTTP proxy."""
    values = {name.lower(): value for name, _, value in (line.partition("=") for line in settings)}
    parts = urlsplit(url)
    general = f"acquire::{parts.scheme}::proxy"
    proxy = values.get(f"{general}::{parts.hostname}") or values.get(general, "")
    if not proxy.startswith("http"):  # DIRECT, or SOCKS, which Python does not speak
        return {}
    return {f"{parts.scheme}_proxy": proxy, "no_proxy": ""}


def verdict_table(rows: list[Row]) -> str:
    """A line per check, what was expected and what to do below it where something is wrong; at most 100 columns."""
    name_width = max([len(row["check"]) for row in rows], default=0)
    lines = []
    for row in rows:
        wrong = row["status"] in ("warn", "fail")
        lines.append(_wrapped(row["found"], f"{MARKS[row['status']]}  {row['check']:<{name_width}}  "))
        if wrong and row["expected"]:
            lines.append(_wrapped(row["expected"], " " * (name_width + 8) + "expected: "))
        if wrong and row["remedy"]:
            lines.append(_wrapped(row["remedy"], " " * (name_width + 8) + "-> "))
    count = {status: sum(row["status"] == status for row in rows) for status in MARKS}
    return "\n".join([*lines, f"{count['ok']} ok, {count['warn']} warnings, {count['fail']} failed"]) + "\n"


def failed(rows: list[Row]) -> str:
    """The message to end the play with, a line per failed check; "" where none failed."""
    wrong = [row for row in rows if row["status"] == "fail"]
    if not wrong:
        return ""
    lines = [f"{row['check']}: {row['found']}; expected {row['expected']}; {row['remedy']}" for row in wrong]
    count = "1 check failed" if len(wrong) == 1 else f"{len(wrong)} checks failed"
    return "\n".join([count, *lines])


def _wrapped(text: str, head: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
    )


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable]:
        return {
            "verdicts": verdicts,
            "excused": excused,
            "unreachable": unreachable,
            "apt_proxy": apt_proxy,
            "verdict_table": verdict_table,
            "failed": failed,
        }
