"""The doctor's answer as text, JSON and, for docs/troubleshooting.md, Markdown."""

from __future__ import annotations

from typing import Any

from recipe.doctor.case import Case
from recipe.doctor.diagnose import Diagnosis
from recipe.doctor.rule import Rule
from recipe.doctor.rules import SUBJECTS

STATES = {
    "failed": "failed",
    "finished": "finished",
    "stopped": "was stopped on request",
    "running": "is running",
    "broken off": "ended without a word",
    "open": "shows no failure",
}
HEAD = """# Troubleshooting

`make doctor RUN=name`, or `recipe doctor --log FILE` for the log of any program under accelerate or torchrun, reads what a
run has left and names the cause, the lines that show it, how sure it is, and what to do. It knows {count} failures; this
list is made of its rules by `recipe doctor --list --markdown`. Nothing leaves the machine; `--bundle FILE.tar.gz` makes an
archive for an issue report, without data, tokens and the names of people and hosts.
"""


def render(case: Case, diagnoses: list[Diagnosis]) -> str:
    steps = f", {len(case.metrics)} steps measured" if case.metrics else ""
    lines = [f"{case.name}: {STATES[case.state]}{steps}"]
    for number, diagnosis in enumerate(diagnoses, 1):
        rule = diagnosis.rule
        lines += ["", f"{number}. {rule.title}  [{rule.certainty}; {rule.name}]", f"   why: {rule.cause}"]
        lines += [f"   seen: {line.where}: {line.text}" for line in diagnosis.evidence]
        lines.append(f"   do: {diagnosis.remedy}")
    if not diagnoses:
        lines += ["", "nothing found wrong"]
    return "\n".join([*lines, "", f"looked at: {'; '.join(case.looked_at)}"])


def to_dict(case: Case, diagnoses: list[Diagnosis]) -> dict[str, Any]:
    return {
        "name": case.name,
        "state": case.state,
        "steps": len(case.metrics),
        "diagnoses": [
            {
                "rule": diagnosis.rule.name,
                "title": diagnosis.rule.title,
                "cause": diagnosis.rule.cause,
                "certainty": diagnosis.rule.certainty,
                "evidence": [
                    {"file": line.file, "line": line.number, "text": line.text} for line in diagnosis.evidence
                ],
                "remedy": diagnosis.remedy,
            }
            for diagnosis in diagnoses
        ],
        "looked_at": case.looked_at,
    }


def list_rules() -> list[dict[str, str]]:
    return [
        {
            "rule": rule.name,
            "subject": subject,
            "title": rule.title,
            "cause": rule.cause,
            "remedy": remedy_of(rule),
        }
        for subject, rules in SUBJECTS.items()
        for rule in rules
    ]


def render_list() -> str:
    return "\n".join(f"{rule['rule']:28} {rule['title']}" for rule in list_rules())


def markdown() -> str:
    count = sum(map(len, SUBJECTS.values()))
    lines = [HEAD.format(count=count)]
    for subject, rules in SUBJECTS.items():
        lines += [f"## {subject}", "", "| what happened | why | what to do |", "| --- | --- | --- |"]
        lines += [
            f'| <a id="{rule.name}"></a>**{_cell(rule.title)}** (`{rule.name}`) | {_cell(rule.cause)} | '
            f"{_cell(remedy_of(rule))} |"
            for rule in rules
        ]
        lines.append("")
    return "\n".join(lines)


def remedy_of(rule: Rule) -> str:
    return rule.remedy if isinstance(rule.remedy, str) else rule.general_remedy


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
