"""Reads a run's folder or a log into a Case: what there is, how it ended, and where the rules' marks stand."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

from recipe.doctor.case import Case, Event, parsed
from recipe.doctor.scan import Line, Mark, scan_file, scan_lines, shell_says, shown
from recipe.errors import UserError
from recipe.probe import PROBE_FILE, Unknown, kernel_log, read_probe
from recipe.train.run import Run

INTERRUPTED = re.compile(r"failed \(exitcode: -2\)")  # SIGINT
TAIL_BYTES = 64 * 2**10
END_LINES = 300
TOGETHER_SECONDS = 60.0  # errors of one attempt come within
AROUND_SECONDS = 120.0  # what the kernel says so long before or after belongs to a failure

# The traces of a failure, which is one that nothing has caught where no step comes after it.
ENDS_BADLY = tuple(
    map(
        re.compile,
        (
            r"failed \(exitcode: -?\d+\)",
            r"ChildFailedError",
            r"Traceback \(most recent call last\)",
            r"^error: ",
            r"^make: \*\*\* ",
            shell_says("Killed|Bus error|Segmentation fault|Aborted|Terminated|Illegal instruction"),
            r"Fatal Python error",
            r"terminate called",
            r"\b(RendezvousTimeoutError|RendezvousConnectionError|SIGKILL|SIGSEGV|SIGBUS|SIGABRT)\b",
            r"exited with (non-zero|code -?[1-9])",
            r"oom-kill|OOMKilled",
            r"docker: Error response from daemon",
        ),
    )
)
EXCEPTION = re.compile(
    r"^(\[rank\d+\]:? ?)?(\w+\.)*\w*(Error|Exception|Interrupt|Timeout|Warning|Exit|NotFound)\b(:|$)"
)
WENT_ON = re.compile(r"^\s*(step \d|epoch \d|\{['\"]?(loss|train_)|saved step|finished)")
FINISHED = re.compile(r"train_runtime|^\s*finished")
UNCAUGHT = "<frozen runpy>"  # of `python -m`, which writes the traceback before what print has in its buffer
# Of tqdm, which draws it once more where the program fails.
BAR = re.compile(r"(?<!\d)(\d{1,9})/(\d{1,9}) \[[^\[\]]{,80}(?:it/s|s/it)")
REPORT_TIME = re.compile(r"^\s+time\s+: (\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d)")


def read_run(run: Run, marks: Iterable[Mark]) -> Case:
    """All that a run's folder holds."""
    marks = list(marks)
    case = Case(name=run.name, is_run=True, config=str(run.config), boot_time=psutil.boot_time())
    case.settings = _yaml(run.config)
    case.manifest = _json(run.manifest)
    events = [
        Event(values, Line(line.file, line.number, shown(str(values.get("message", "")), 0)))
        for values, line in parsed(_lines(run.events))
    ]
    case.metrics = parsed(_lines(run.metrics))
    start = last_attempt(run.log)
    _read_log(case, run.log, marks, start)
    report = _report_time(run.log)
    case.events = of_last_attempt(events)
    case.last_time = max([0.0, *(event.time for event in events), report, _changed(run.metrics)])
    case.state = state_of(run, events, report if _ends_badly(case.end) else 0.0)
    if case.state == "failed" and not case.of_kind("error") and _interrupted(case.end):
        case.state = "stopped"
    errors = [line for event in case.of_kind("error") for line in _texts(event)]
    scan_lines(errors, marks, case.hits)
    for path, count in ((run.events, len(events)), (run.metrics, len(case.metrics))):
        case.looked_at.append(f"{path} ({count} lines)" if path.exists() else f"{path} (not there)")
    case.looked_at += [str(path) for path in (run.config, run.manifest) if path.exists()]
    _read_kernel(case, marks)
    return case


def read_log(path: Path, marks: Iterable[Mark]) -> Case:
    """A log of any program. Raises UserError where it cannot be read."""
    if path.is_dir():
        raise UserError(f"--log {path}: is a folder, expected a file; for a run of ours use --run NAME")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(
            f"--log {path}: {(error.strerror or 'unreadable').lower()}, expected a readable log file"
        ) from None
    marks = list(marks)
    case = Case(name=path.name, last_time=path.stat().st_mtime)
    _read_log(case, path, marks, 0)
    case.state = "failed" if _ends_badly(case.end) else "open"
    if case.state == "failed" and _interrupted(case.end):
        case.state = "stopped"
    _read_kernel(case, marks)
    return case


def _read_log(case: Case, path: Path, marks: list[Mark], start: int) -> None:
    if not path.exists():
        case.looked_at.append(f"{path} (not there)")
        return
    count = scan_file(path, str(path), marks, case.hits, start)
    case.end = _end(path, start, count)
    case.looked_at.append(f"{path} ({count} lines)")


def _end(path: Path, start: int, count: int) -> list[Line]:
    """The last lines that are not empty, numbered; what was drawn over one another comes apart."""
    with open(path, "rb") as file:
        file.seek(max(start, os.path.getsize(path) - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = text.split("\n")
    lines = lines[:-1] if text.endswith("\n") else lines
    count += 0 if text.endswith("\n") or not text else 1
    return [
        Line(str(path), count - len(lines) + 1 + i, drawn)
        for i, line in enumerate(lines)
        for drawn in line.rstrip().split("\r")
        if drawn.strip()
    ]


def _ends_badly(end: list[Line]) -> bool:
    """Whether a log's last lines tell of a failure after which nothing went on."""
    texts = [line.text for line in end[-END_LINES:]]
    for position in range(len(texts) - 1, -1, -1):
        if any(expression.search(texts[position]) for expression in ENDS_BADLY):
            uncaught = any(UNCAUGHT in text for text in texts[position : position + 2])
            return not _went_on(texts[position + 1 :], uncaught)
    return False


def _went_on(after: list[str], uncaught: bool) -> bool:
    """Whether steps were done after a failure: their lines, or a progress bar that moves.

    After a traceback that ended the program, lines of steps are those that its buffer still held.
    """
    bars = {(bar[2], bar[1]) for text in after for bar in BAR.finditer(text)}
    moved = len(bars) > len({total for total, _ in bars})
    return moved or any((FINISHED if uncaught else WENT_ON).search(text) for text in after)


def _interrupted(end: list[Line]) -> bool:
    """Whether the first rank that failed was ended by Ctrl-C, before it could listen to it."""
    return any(INTERRUPTED.search(line.text) for line in end)


def last_attempt(log: Path) -> int:
    """The byte at which the log of a run's last attempt begins: after the report of a failure that others follow."""
    start = ended = 0
    bars = -1  # lines of ==== since the report's title; -1 outside of one
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        position = 0
        for line in file:
            position += len(line)
            if b"ChildFailedError" in line:
                bars = 0
            elif bars >= 0 and line.startswith(b"====="):
                bars += 1
                if bars == 2:
                    ended, bars = position, -1
            elif ended > start and bars < 0 and line.strip():
                start = ended
    return start


def of_last_attempt(events: list[Event]) -> list[Event]:
    """Events since the last model was loaded, or since the last failure before it could be."""
    start = 0
    for i, event in enumerate(events):
        begins = event.kind == "loaded"
        if i and events[i - 1].kind in ("error", "stopped"):
            later = event.time - events[i - 1].time > TOGETHER_SECONDS
            begins = (
                begins or later or events[i - 1].kind == "stopped" or event.kind not in ("error", "warning")
            )
        if begins:
            start = i
    return events[start:]


def state_of(run: Run, events: list[Event], report: float) -> str:
    """How the run's last attempt ended. `report`: the time of the launcher's report of a failure, 0 where there is none."""
    if run.finished:
        return "finished"
    if _locked(run):
        return "running"
    last = events[-1] if events else None
    if any(event.kind == "error" for event in of_last_attempt(events)):
        return "failed"
    if last and last.kind == "stopped":
        return "stopped"
    if report and (not last or report > last.time - 5):
        return "failed"
    return "broken off" if last else "open"


def _locked(run: Run) -> bool:
    """Whether a process trains this run now."""
    with contextlib.suppress(OSError), open(run.folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _report_time(log: Path) -> float:
    """When the launcher has reported a failure at the end of the log; the log's own time where it does not say."""
    if not log.exists():
        return 0.0
    times = [found[1] for line in _end(log, 0, 0) if (found := REPORT_TIME.match(line.text))]
    if not times:
        return log.stat().st_mtime
    return datetime.datetime.strptime(times[-1], "%Y-%m-%d_%H:%M:%S").timestamp()


def _texts(event: Event) -> list[Line]:
    text = f"{event.values.get('message', '')}\n{event.values.get('traceback', '')}"
    return [Line(event.line.file, event.line.number, line) for line in text.splitlines() if line.strip()]


def _read_kernel(case: Case, marks: list[Mark]) -> None:
    """What the kernel has said around the end of the run, where it may be read: only what can be of this run."""
    if case.state in ("finished", "stopped"):
        return
    said, why = _kernel_log()
    if why:
        case.looked_at.append(f"the kernel's log ({why}; look yourself with `sudo dmesg -T | tail`)")
        return
    booted = psutil.boot_time()
    lines = [
        Line("dmesg", 0, line["text"])
        for line in said
        if line["seconds"] is not None and abs(booted + line["seconds"] - case.last_time) <= AROUND_SECONDS
    ]
    scan_lines(lines, [mark for mark in marks if mark.kernel], case.hits)
    case.looked_at.append(f"dmesg ({len(lines)} lines about trouble at that time)")


def _kernel_log() -> tuple[list[dict[str, Any]], str | None]:
    """The kernel's lines about trouble since the boot, in a container those that its host has handed in; or why not."""
    if file := os.environ.get(PROBE_FILE):
        found = read_probe(Path(file))
        part = found["parts"]["kernel_log"] if "parts" in found else {"found": None, "why": found["why"]}
        return part["found"] or [], part["why"]
    try:
        return kernel_log(), None
    except Unknown as error:
        return [], str(error)


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [Line(str(path), number, text) for number, text in enumerate(texts, 1)]


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _yaml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
