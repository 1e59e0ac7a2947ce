"""`recipe preflight`: is this machine able to do this run? Every check says what to do.

A check is a function with a name, a measurement, a threshold and a remedy; each file here is one group of
them. No check changes anything, and none needs the model or the network.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from recipe.hardware import Machine
from recipe.plan import Plan
from recipe.preflight import gpu, host, inputs, link, software
from recipe.preflight.check import REPOSITORY, Check, Context
from recipe.settings import Settings

__all__ = ["Check", "failed", "render", "run_checks", "to_dict"]

WIDTH = 100
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "skip"}


def run_checks(
    settings: Settings,
    machine: Machine,
    plan: Plan,
    prepared: Path | None = None,
    lock_folder: Path = REPOSITORY,
) -> list[Check]:
    """All checks, in the order in which they are worth reading; about 5 s, nearly all to import torch."""
    context = Context(settings, machine, plan, prepared, lock_folder)
    # Without GPUs, `present` has said all that there is to say.
    gpus = gpu.WITH_GPUS if machine.gpus and context.on_gpu else []
    checks = [
        check(context) for check in [*host.CHECKS, *gpu.ALWAYS, *gpus, *software.CHECKS, *inputs.CHECKS]
    ]
    # With a GPU missing, or one that torch cannot use, an all-reduce would only fail too.
    if host.needs_nccl(plan) and machine.gpus and not failed(checks):
        checks += [check(context) for check in link.WITH_NCCL]
    return checks


def failed(checks: list[Check]) -> bool:
    """True where the machine cannot do the run (exit code 1). Warnings do not count."""
    return any(check.status == "fail" for check in checks)


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """For --json."""
    return {"ok": not failed(checks), "checks": [dataclasses.asdict(check) for check in checks]}


def render(checks: list[Check]) -> str:
    """A line per check; where something is wrong, also what was expected and what to do; 100 columns."""
    lines = []
    for check in checks:
        head = f"{MARKS[check.status]}  {check.name:<18}  "
        lines.append(_wrap(check.found, head))
        if check.status in ("warn", "fail"):
            lines.append(_wrap(check.expected, " " * 6 + f"{'expected':<18}  "))
            lines.append(_wrap(check.remedy, " " * 6 + f"{'what to do':<18}  "))
    number = {status: sum(check.status == status for check in checks) for status in MARKS}
    verdict = "not ready" if number["fail"] else "ready"
    lines += ["", f"{verdict}: {number['ok']} ok, {number['warn']} warnings, {number['fail']} failed, "
              f"{number['skip']} skipped"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _wrap(text: str, head: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    ).rstrip()
