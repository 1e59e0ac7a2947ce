"""What is said where no rule knows better: the run's own words, and that it ended without any."""

from __future__ import annotations

from recipe.doctor.case import Case
from recipe.doctor.read import EXCEPTION
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Line, Mark


def _requests(case: Case) -> list[Line]:
    ours = [
        event.line
        for event in case.of_kind("error")
        if event.cause == "request" or event.values.get("exit_code") == 2
    ]
    return ours + [line for line in case.end if line.text.startswith("error: ")][-1:]


def _last_words(case: Case) -> list[Line]:
    """The exceptions that nothing has caught, first the last one of the log."""
    errors = [event.line for event in case.of_kind("error")]
    told = [line for line in case.end if EXCEPTION.search(line.text) and "ChildFailedError" not in line.text]
    return errors[:1] + told[-1:] or ([] if case.end == [] else case.end[-1:])


def _no_end(case: Case) -> list[Line]:
    return [event.line for event in case.events[-1:]] if case.state == "broken off" else []


RULES = (
    Rule(
        "request",
        "The request could not be carried out",
        "The line says what was found, where, and what was expected.",
        "do what the line's end says",
        marks=(Mark("error: ", r"^error: "),),
        find=_requests,
        certainty="likely",
        kind="symptom",
    ),
    Rule(
        "no_end",
        "The run ended without a word",
        "All of its processes were ended at once: SIGKILL, a second Ctrl-C, a container or session that was closed.",
        lambda case: f"{case.again} goes on from the last checkpoint; keep it in tmux or a service",
        find=_no_end,
        certainty="possible",
        kind="symptom",
        when="unfinished",
        general_remedy="the same RUN= goes on from the last checkpoint; keep it in tmux or a service",
    ),
    Rule(
        "unexpected",
        "The program failed in a way that no rule here knows",
        "The last lines are the best that there is.",
        "search for the last line of the traceback; `recipe doctor --bundle FILE.tar.gz` makes an archive for an issue report",
        find=_last_words,
        certainty="possible",
        kind="last",
    ),
)
