"""What a check of filter_plugins/verdicts.py looks at, and what it answers with: a row of plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from judging.known import major

Row = dict[str, str]
Check = Callable[["Case"], "Row | list[Row] | None"]

OURS_TO_INSTALL = ("distribution", "nvidia")  # where this play takes a driver from


@dataclass(frozen=True)
class Case:
    """What the checks look at; missing keys read as unknown."""

    machine: dict
    choices: dict
    plan: dict
    settings: dict

    def chosen(self, what: str) -> dict:
        return self.choices.get(what) or {}

    @property
    def gpus(self) -> list[dict]:
        return self.machine.get("gpus") or []

    @property
    def usable_gpus(self) -> list[dict]:
        """Not those that are handed on to a virtual machine."""
        return [gpu for gpu in self.gpus if not str(gpu.get("driver") or "").startswith("vfio")]

    @property
    def gpus_wanted(self) -> int | None:
        return whole(self.settings.get("gpus_wanted"))

    @property
    def without_gpu(self) -> bool:
        return self.gpus_wanted == 0

    @property
    def branch(self) -> int:
        return whole(self.settings.get("driver_branch")) or 0

    @property
    def loaded_driver(self) -> str | None:
        """The version of the NVIDIA driver that runs."""
        found = self.machine.get("driver") or {}
        return found.get("loaded") or found.get("smi")

    @property
    def our_driver(self) -> bool:
        """Whether this play installs the driver, now or in an earlier run."""
        return self.chosen("driver").get("source") in OURS_TO_INSTALL

    @property
    def new_driver(self) -> bool:
        """Whether a driver is going to be installed that is not there yet. The module's package is named first."""
        there = self.machine.get("installed") or {}
        # `a|b`: the first that apt has
        packages = [name.split("|") for name in self.chosen("driver").get("packages") or []]
        found = [next((name for name in names if name in there), None) for names in packages]
        done = all(found) and bool(found) and _branch(found[0], there[found[0]]) >= self.branch
        return self.our_driver and not done

    @property
    def builds_modules(self) -> bool:
        """Whether that driver's kernel modules are built here (DKMS), unsigned by the distribution, and do not run yet."""
        choice = self.chosen("driver")
        runs = not self.new_driver and major(self.loaded_driver) >= self.branch
        return bool(self.our_driver and not runs and choice.get("dkms", True) and not choice.get("signed"))

    @property
    def ram_needed_gib(self) -> float | None:
        asked = self.settings.get("ram_needed_gib")
        return decimal(asked if asked not in (None, "") else self.plan.get("ram_needed_gib"))

    @property
    def reboot(self) -> str:
        """ask, yes or no"""
        return str(self.settings.get("reboot", "ask"))

    @property
    def release_id(self) -> str:
        return str((self.machine.get("release") or {}).get("id", ""))

    def source_name(self, source: object) -> str:
        """What people call the place that packages come from."""
        names = {"nvidia": "NVIDIA's repository", "docker": "Docker's repository"}
        return names.get(str(source)) or (self.machine.get("release") or {}).get("name") or "the distribution"

    def disk(self, folder: str) -> dict:
        return (self.machine.get("disks") or {}).get(folder) or {}

    def reason(self, beginning: str) -> str | None:
        """The plan's own words why something does not fit, and what would."""
        reasons = [r for r in self.plan.get("reasons") or [] if r.startswith(beginning)]
        ways = [way["change"] for way in self.plan.get("ways") or []]
        return (
            "; would fit: ".join([*reasons[:1], *([", or ".join(ways)] if ways else [])]) if reasons else None
        )


def row(check: str, status: str, found: str, expected: str = "", remedy: str = "") -> Row:
    return {"check": check, "status": status, "found": found, "expected": expected, "remedy": remedy}


def judged(check: str, good: bool, found: str, expected: str, remedy: str, otherwise: str = "fail") -> Row:
    """ok, or `otherwise` with its remedy."""
    return row(check, "ok", found, expected) if good else row(check, otherwise, found, expected, remedy)


def yes(value: object) -> bool:
    """Values of `-e name=value` are text."""
    return str(value).lower() in ("true", "yes", "1", "on")


def whole(value: object) -> int | None:
    return None if (found := decimal(value)) is None else int(found)


def decimal(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _branch(package: str, version: str) -> int:
    """Of a driver's package. The version of modules that Ubuntu built is the kernel's."""
    signed = re.match(r"linux-modules-nvidia-(\d+)-", package)
    return int(signed[1]) if signed else major(version)
