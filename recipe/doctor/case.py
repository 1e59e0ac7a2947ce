"""All that can be read about one run or one log, in the form that the rules look at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from recipe.doctor.scan import Hits, Line, Mark


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    values: dict[str, Any]
    line: Line

    @property
    def kind(self) -> str:
        return str(self.values.get("kind", ""))

    @property
    def cause(self) -> str:
        return str(self.values.get("cause", ""))

    @property
    def time(self) -> float:
        return float(self.values.get("time") or 0)


@dataclass
class Case:
    """A run or a log.

    state: failed, finished, stopped (on request), running, broken off (no end was written), or open (a log without a
    failure's traces, which may be of a program that went well, goes on or hangs).
    """

    name: str
    state: str = "open"
    events: list[Event] = field(default_factory=list)  # of the last attempt
    metrics: list[tuple[dict[str, Any], Line]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    hits: dict[Mark, Hits] = field(default_factory=dict)
    looked_at: list[str] = field(default_factory=list)
    end: list[Line] = field(default_factory=list)  # the log's last lines
    is_run: bool = False
    config: str = ""  # the path of a run's own config.yaml
    boot_time: float = 0.0
    last_time: float = 0.0  # of the last sign of life, in seconds since 1970

    def found(self, mark: str | Mark) -> list[Line]:
        """Where the mark of some rule stands."""
        hits = self.hits.get(Mark(mark) if isinstance(mark, str) else mark)
        return hits.lines if hits else []

    def setting(self, key: str, default: Any = None) -> Any:
        """`section.key` of the run's settings."""
        section, _, name = key.partition(".")
        return (self.settings.get(section) or {}).get(name, default)

    def of_kind(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    @property
    def again(self) -> str:
        """The command with which an unfinished run goes on."""
        return f"make train RUN={self.name} CONFIG={self.config}" if self.is_run else "start it again"

    def numbers(self, key: str) -> list[tuple[float, Line]]:
        """One measured value by step, with the line that it stands in; values that are not numbers are left out."""
        return [
            (float(values[key]), line)
            for values, line in self.metrics
            if isinstance(values.get(key), (int, float))
        ]


def parsed(lines: Iterable[Line]) -> list[tuple[dict[str, Any], Line]]:
    """The objects of a JSONL file; lines that a crash has cut are left out."""
    found = []
    for line in lines:
        try:
            value = json.loads(line.text)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append((value, line))
    return found
