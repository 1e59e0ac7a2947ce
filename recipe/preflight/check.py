"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from recipe.preflight.measured import Context
from recipe.preflight.program import REPOSITORY

__all__ = ["REPOSITORY", "Check", "Context", "Status", "judged", "not_measured", "told"]

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One answered question. `remedy` says what to do and is empty where nothing is to be done.

    `measured` is the number that was judged, in `unit`, where it is one. `group` is set by `run_checks`.
    """

    name: str
    status: Status
    found: str
    expected: str = ""
    remedy: str = ""
    measured: float | None = None
    unit: str = ""
    group: str = ""


def judged(
    name: str,
    good: bool,
    found: str,
    expected: str,
    remedy: str,
    otherwise: Status = "fail",
    measured: float | None = None,
    unit: str = "",
) -> Check:
    """ok, or `otherwise` with its remedy."""
    if good:
        return Check(name, "ok", found, expected, measured=measured, unit=unit)
    return Check(name, otherwise, found, expected, remedy, measured, unit)


def not_measured(name: str, measurement: dict[str, Any], expected: str, remedy: str = "") -> Check | None:
    """The check's answer where there is no measurement: skipped with the reason, or failed where it should have worked."""
    if why := measurement.get("skipped"):
        return Check(name, "skip", why, expected)
    if error := measurement.get("error"):
        return Check(name, "fail", error, expected, remedy or "look at the message, and at `dmesg`")
    return None


def told(context: Context, part: str) -> tuple[Any, str]:
    """A part of the host's probe, or None and why there is none."""
    if why := context.host.get("why"):
        return None, why
    found = context.host["parts"].get(part, {"found": None, "why": "an older probe"})
    return found["found"], found["why"] or ""
