"""Finds marks in logs of any size: read block by block, so that a log of gigabytes needs no memory.

A mark is text that a failure leaves in a log, and where that text alone is too common, a pattern for its line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

BLOCK_BYTES = 2**20
LARGE_BYTES = 2**18  # of a block, from which on it pays to look first which pairs of letters it has
SHOWN_CHARACTERS = 240
KEPT_CHARACTERS = 1000  # of a line, for rules that look at it again
KEPT = 20  # hits of a mark at the beginning of a log, and as many at its end
# A row of data as `make train` shows it: whatever it speaks of has not happened here.
SHOWN_ROW = re.compile(r"^\s*row \d+ \(\d+ tokens\): ")


@dataclass(frozen=True)
class Mark:
    """`needle` must stand in the line; `pattern`, a regular expression, too where there is one.

    What stands on every line of a long log makes a slow needle. `kernel`: looked for in the kernel's log as well, where
    other programs' troubles stand too.
    """

    needle: str
    pattern: str = ""
    kernel: bool = field(default=False, compare=False)

    @cached_property
    def expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern or re.escape(self.needle))

    def search(self, text: str) -> re.Match[str] | None:
        return self.expression.search(text) if self.needle in text else None


# A step's loss in the log of any trainer, one form each: a log may hold several, of the training and of an evaluation.
LOSSES = tuple(
    Mark(start, r"(?<!\w)" + re.escape(start) + r"\s*['\"]?(\d+\.?\d*(e[+-]?\d+)?)")
    for start in ("'loss':", '"loss":', "loss:", "loss=")
)


@dataclass(frozen=True)
class Line:
    """A line of evidence: where it stands (number 0: the file has no lines that one could count) and its text."""

    file: str
    number: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}" if self.number else self.file


@dataclass
class Hits:
    """Lines that a mark was found in: the first ones and the last ones."""

    first: list[Line] = field(default_factory=list)
    last: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        if len(self.first) < KEPT:
            self.first.append(line)
            return
        self.last.append(line)
        del self.last[:-KEPT]

    @property
    def lines(self) -> list[Line]:
        return self.first + self.last


def scan_lines(lines: Iterable[Line], marks: Iterable[Mark], found: dict[Mark, Hits]) -> None:
    """Adds to `found` what stands in lines that are in memory already."""
    marks = list(marks)
    for line in lines:
        for mark in marks:
            if match := mark.search(line.text):
                found.setdefault(mark, Hits()).add(
                    Line(line.file, line.number, shown(line.text, match.start()))
                )


def scan_file(path: Path, name: str, marks: Iterable[Mark], found: dict[Mark, Hits], start: int = 0) -> int:
    """Adds to `found` what stands in a file from byte `start` on. Returns the number of the file's lines."""
    needles = [(mark, mark.needle.encode()) for mark in marks]
    with open(path, "rb") as file:
        left = path.stat().st_size - start
        before = sum(block.count(b"\n") for block in _blocks(file, start))
        for block in _blocks(file, None):
            left -= len(block)
            present = _pairs_in(block)
            for mark, needle in needles:
                # What is on every line was seen often enough; its last lines are near the end.
                enough = left > BLOCK_BYTES and mark in found and len(found[mark].first) >= KEPT
                if enough or not present(needle):
                    continue
                for line in _lines_with(block, needle, mark, name, before):
                    found.setdefault(mark, Hits()).add(line)
            before += block.count(b"\n")
    return before


def _pairs_in(block: bytes) -> Callable[[bytes], bool]:
    """Whether a large block may hold a needle: it has all of its pairs of letters. Ten times faster than to search."""
    if len(block) < LARGE_BYTES:
        return lambda needle: True
    import numpy

    letters = numpy.frombuffer(block, numpy.uint8)
    has: Any = numpy.zeros((256, 256), bool)
    has[letters[:-1], letters[1:]] = True
    return lambda needle: all(has[pair] for pair in itertools.pairwise(needle))


def _blocks(file, end: int | None) -> Iterator[bytes]:
    """Whole lines from where the file stands now, up to byte `end`, which is the begin of a line."""
    rest = b""
    while end is None or file.tell() < end:
        wanted = BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.tell())
        block = file.read(wanted)
        if not block:
            break
        lines, newline, tail = block.rpartition(b"\n")
        if not newline and len(rest) < BLOCK_BYTES:  # a line longer than that is cut
            rest += tail
            continue
        yield rest + lines + newline
        rest = tail
    if rest:
        yield rest


def _lines_with(block: bytes, needle: bytes, mark: Mark, name: str, before: int) -> Iterator[Line]:
    position, number, counted = block.find(needle), before + 1, 0
    while position >= 0:
        start = block.rfind(b"\n", 0, position) + 1
        end = block.find(b"\n", position)
        end = len(block) if end < 0 else end
        number += block.count(b"\n", counted, start)
        counted = start
        text = block[start:end].decode(errors="replace")
        if (match := mark.search(text)) and not SHOWN_ROW.search(text):
            yield Line(name, number, shown(text, match.start()))
        position = block.find(needle, end)


def shown(text: str, at: int) -> str:
    """A line from shortly before character `at` on, without what a progress bar has drawn over."""
    start = text.rfind("\r", 0, at) + 1
    text, at = text[start:], at - start
    cut = max(0, at - SHOWN_CHARACTERS // 2) if len(text) > SHOWN_CHARACTERS else 0
    text = "".join(c if c.isprintable() else " " for c in text[cut : cut + KEPT_CHARACTERS])
    return text.strip()


def shell_says(words: str) -> str:
    """A pattern for the line in which a shell or make tells that a signal has ended a program: `words`, joined by |."""
    before = r"\S+: line \d+: +\d+ +|\[\d+\][+-]? +(\d+ +)?|zsh: |make(\[\d+\])?: \*\*\* .*\] "
    return rf"(?i)^({before})?({words})\b( \(core dumped\))?(  .*)?$"
