"""Everything that a run's folder holds, for the report. What is missing or damaged is left out, with a note."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe.doctor.case import Event
from recipe.doctor.read import state_of
from recipe.doctor.scan import Line
from recipe.settings import Settings
from recipe.train.run import Run

STATES = {"open": "not begun"}


@dataclass
class Record:
    """A run as its files tell it; dictionaries are empty and lists too where a file is not there."""

    name: str
    folder: Path
    state: str  # finished, running, stopped, failed, broken off (killed without a word), not begun
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)  # eval.json
    samples: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)  # of the data
    notes: list[str] = field(default_factory=list)  # files that cannot be read

    def setting(self, section: str, key: str) -> Any:
        values = self.settings.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def model(self) -> str:
        found = self.manifest.get("model")
        return str(
            (found.get("name") if isinstance(found, dict) else None) or self.setting("model", "id") or "?"
        )

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out losses by step; where a step was done again, as it was the last time."""
        found = {
            event["step"]: {"step": event["step"], "loss": event["loss"]}
            for event in self.events
            if event.get("kind") == "evaluation"
            and is_number(event.get("step"))
            and is_number(event.get("loss"))
        }
        return [found[step] for step in sorted(found)]

    @property
    def total_steps(self) -> int | None:
        begun = [event.get("steps") for event in self.events if event.get("kind") == "begun"]
        total = begun[-1] if begun else self.setting("train", "steps")
        return int(total) if total is not None and is_number(total) else None

    @property
    def differing(self) -> list[tuple[str, Any, Any]]:
        """(section.key, value, default) of the settings that are not the defaults."""
        return [
            (key, here, default) for key, here, default in differences(self.settings, Settings().to_dict())
        ]


def read(run: Run) -> Record:
    record = Record(run.name, run.folder, "open")
    record.config = _text(run.config)
    record.settings = _settings(record)
    record.manifest = _object(record, run.manifest)
    record.steps = [line for line in _lines(record, run.metrics) if is_number(line.get("step"))]
    record.events = [line for line in _lines(record, run.events) if "kind" in line]
    record.summary = _object(record, run.summary)
    record.plan = _object(record, run.plan)
    record.evaluation = _object(record, run.folder / "eval.json")
    record.samples = _lines(record, run.folder / "samples.jsonl")
    record.statistics = _object(record, run.folder / "data" / "stats.json")
    events = [Event(event, Line(str(run.events), 0, "")) for event in record.events]
    state = state_of(run, events, 0.0)
    record.state = STATES.get(state, state)
    return record


def files(run: Run) -> list[Path]:
    """What a report is made of: where none of it has changed, neither has the report."""
    names = ("eval.json", "samples.jsonl", "data/stats.json")
    known = (run.config, run.manifest, run.metrics, run.events, run.summary, run.plan)
    return [*known, *(run.folder / name for name in names)]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(section.key, value in one, value in the other) where they differ; a key that is not there counts as None."""
    found = []
    for section in [*one, *(name for name in other if name not in one)]:
        here, there = (_section(values, section) for values in (one, other))
        for key in [*here, *(name for name in there if name not in here)]:
            if here.get(key) != there.get(key):
                found.append((f"{section}.{key}" if key else section, here.get(key), there.get(key)))
    return found


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    return section if isinstance(section, dict) else {"": section}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _settings(record: Record) -> dict[str, Any]:
    """As they stand, also those of another version of the recipe, which today's would refuse."""
    try:
        found = yaml.safe_load(record.config)
    except (yaml.YAMLError, ValueError):
        record.notes.append("config.yaml is no YAML")
        return {}
    return found if isinstance(found, dict) else {}


def _object(record: Record, path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        record.notes.append(f"{path.relative_to(record.folder)} is no JSON object")
        return {}
    return found


def _lines(record: Record, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line without its end is being written."""
    found, bad = [], 0
    for line in _text(path).rpartition("\n")[0].split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    if bad:
        record.notes.append(f"{path.relative_to(record.folder)}: {bad} lines are no JSON objects")
    return found
