"""From what was found to a verdict: which rule explains the others, and in which order they are told."""

from __future__ import annotations

from dataclasses import dataclass

from recipe.doctor.case import Case
from recipe.doctor.rule import CERTAINTIES, KINDS, Rule
from recipe.doctor.rules import RULES
from recipe.doctor.scan import SHOWN_CHARACTERS, Line, Mark

SHOWN_DIAGNOSES = 3
SHOWN_LINES = 5
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Diagnosis:
    """A failure that was recognised, with the lines that show it."""

    rule: Rule
    evidence: list[Line]
    remedy: str


def all_marks() -> list[Mark]:
    """Everything that a reader has to look for, each once."""
    return list(dict.fromkeys(mark for rule in RULES for mark in rule.all_marks))


def diagnose(case: Case) -> list[Diagnosis]:
    """At most three, the verdict first; none where nothing is wrong.

    A cause goes before a symptom; what another one explains is left out, and so are consequences where there is a cause;
    then the more certain, then what stands first in the log.
    """
    found = {rule: lines for rule in RULES if (lines := rule.evidence(case))}
    explained = {name for rule in found for name in rule.over}
    left = {rule: lines for rule, lines in found.items() if rule.name not in explained} or found
    for kind, better in (("last", KINDS[:-1]), ("consequence", ("cause",))):
        if any(rule.kind in better for rule in left):
            left = {rule: lines for rule, lines in left.items() if rule.kind != kind}
    ordered = sorted(
        left, key=lambda rule: (KINDS.index(rule.kind), CERTAINTIES.index(rule.certainty), _first(left[rule]))
    )
    return [Diagnosis(rule, _shown(left[rule]), rule.advice(case)) for rule in ordered[:SHOWN_DIAGNOSES]]


def _first(lines: list[Line]) -> int:
    return min((line.number for line in lines if line.number), default=0)


def _shown(lines: list[Line]) -> list[Line]:
    """Each text once: ranks say the same, and an error stands in the events, whose words are the plainest, and in the log."""
    distinct: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: not line.file.endswith(EVENTS)):
        distinct.setdefault(line.text.partition("]: ")[2] or line.text, line)
    lines = list(distinct.values())[:SHOWN_LINES]
    return [Line(line.file, line.number, line.text[:SHOWN_CHARACTERS]) for line in lines]
