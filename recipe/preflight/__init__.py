"""`recipe preflight`: is this machine able to do this run? Every check says what to do.

A check is a function with a name, a measurement, a threshold and a remedy; each file here is one group of them or a part
of one. What is measured runs as a program of its own (stack, ranks, copies, load, disk_speed, reading), and what a
container cannot see comes from the host's probe (recipe/probe.py). No check changes anything, and none needs the model.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

from recipe.preflight import gpu, health, host, inputs, link, software, system
from recipe.preflight.check import Check, Context
from recipe.preflight.measured import wrong_copies

__all__ = [
    "CHECKS",
    "Check",
    "Context",
    "checks_of",
    "failed",
    "measured_copies",
    "render",
    "run_checks",
    "to_dict",
]

WIDTH = 100
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "skip"}


# All checks by group, in the order in which they are worth reading.
CHECKS: dict[str, list[Callable[[Context], Check]]] = {
    "host": [*host.CHECKS, *system.CHECKS],
    "gpu": [*gpu.ALWAYS, *gpu.WITH_GPUS, *health.WITH_GPUS],
    "link": [*link.WITH_GPUS, *link.ALWAYS],
    "software": [*software.CHECKS],
    "data": [*inputs.CHECKS],
}
WITH_GPUS = [*gpu.WITH_GPUS, *health.WITH_GPUS, *link.WITH_GPUS]


def checks_of(context: Context) -> dict[str, list[Callable[[Context], Check]]]:
    """The checks that this situation asks for."""
    if context.machine.gpus and context.on_gpu:
        return CHECKS
    # Without GPUs, `gpu.present` has said all that there is to say.
    return {group: [check for check in checks if check not in WITH_GPUS] for group, checks in CHECKS.items()}


def run_checks(context: Context) -> list[Check]:
    """All checks; with GPUs about 50 s, nearly all to measure. `context.quick` leaves that out."""
    return [
        dataclasses.replace(check(context), group=group)
        for group, checks in checks_of(context).items()
        for check in checks
    ]


def measured_copies(context: Context) -> tuple[str | None, bool]:
    """For hostenv.write: what is wrong with copies from GPU to GPU, and whether they were measured."""
    peers = context.__dict__.get("peers", {"skipped": "no check asked"})
    return wrong_copies(peers), "pairs" in peers or bool(peers.get("trying"))


def failed(checks: list[Check]) -> bool:
    """True where the machine cannot do the run (exit code 1). Warnings do not count."""
    return any(check.status == "fail" for check in checks)


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """For --json."""
    return {"ok": not failed(checks), "checks": [dataclasses.asdict(check) for check in checks]}


def render(checks: list[Check]) -> str:
    """A line per check, by group; where something is wrong, also what was expected and what to do; 100 columns."""
    lines: list[str] = []
    group = ""
    for check in checks:
        if check.group != group:
            lines += [*([""] if lines else []), check.group]
            group = check.group
        head = f"  {MARKS[check.status]}  {check.name:<18}  "
        if check.status in ("ok", "skip"):
            lines.append(_one_line(head, check.found))
            continue
        lines.append(_wrap(check.found, head))
        lines.append(_wrap(check.expected, f"        {'expected':<18}  "))
        lines.append(_wrap(check.remedy, f"        {'what to do':<18}  "))
    number = {status: sum(check.status == status for check in checks) for status in MARKS}
    verdict = "not ready" if number["fail"] else "ready"
    lines += ["", f"{verdict}: {number['ok']} ok, {number['warn']} warnings, {number['fail']} failed, "
              f"{number['skip']} skipped"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _one_line(head: str, text: str) -> str:
    """What is well needs no second line; --json has all of it."""
    room = WIDTH - len(head)
    text = " ".join(text.split())
    return (head + (text if len(text) <= room else text[: room - 1].rstrip() + "…")).rstrip()


def _wrap(text: str, head: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    ).rstrip()
