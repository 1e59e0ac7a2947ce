"""What a rule is: how one failure is recognised, why it happens, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipe.doctor.scan import Line, Mark

if TYPE_CHECKING:
    from recipe.doctor.case import Case

CERTAINTIES = ("certain", "likely", "possible")
# A cause explains itself. A symptom says what happened, not why. A consequence is what others say of somebody's failure.
# What is told last is told where nothing else is.
KINDS = ("cause", "symptom", "consequence", "last")
STATES = {
    "failed": ("failed",),
    "unfinished": ("failed", "running", "open", "broken off"),
    "always": ("failed", "running", "open", "broken off", "stopped", "finished"),
}


@dataclass(frozen=True)
class Rule:
    """One failure.

    It is found where one of `marks` stands in the log, in an error's text or in the kernel's log, where an event has
    one of `causes`, or where `find` gives lines (it may look for `reads` too); and one of `needs`, where there are any, is
    found as well.
    `when` says in which states a case can have it; `over` names the rules that this one explains better.
    """

    name: str
    title: str
    cause: str
    remedy: str | Callable[[Case], str]
    marks: tuple[str | Mark, ...] = ()
    needs: tuple[str | Mark, ...] = ()
    causes: tuple[str, ...] = ()
    reads: tuple[str | Mark, ...] = ()
    find: Callable[[Case], list[Line]] | None = None
    certainty: str = "certain"
    kind: str = "cause"
    when: str = "failed"
    over: tuple[str, ...] = ()
    general_remedy: str = ""  # for the list of all rules, where `remedy` depends on the case

    @property
    def own_marks(self) -> tuple[Mark, ...]:
        return tuple(map(as_mark, self.marks))

    @property
    def needed_marks(self) -> tuple[Mark, ...]:
        return tuple(map(as_mark, self.needs))

    @property
    def all_marks(self) -> tuple[Mark, ...]:
        return (*self.own_marks, *self.needed_marks, *map(as_mark, self.reads))

    def evidence(self, case: Case) -> list[Line]:
        """The lines that speak for this failure; none where it is not this one."""
        if case.state not in STATES[self.when]:
            return []
        lines = [line for mark in self.own_marks for line in case.found(mark)]
        lines += [event.line for event in case.events if event.cause in self.causes]
        lines += self.find(case) if self.find else []
        if not lines or not self.needs:
            return lines
        needed = [line for mark in self.needed_marks for line in case.found(mark)]
        return [lines[0], *needed[:2], *lines[1:]] if needed else []

    def advice(self, case: Case) -> str:
        return self.remedy if isinstance(self.remedy, str) else self.remedy(case)


def as_mark(mark: str | Mark) -> Mark:
    return mark if isinstance(mark, Mark) else Mark(mark)
