"""A run's folder, `runs/NAME`: what lies where, and whether it is new, unfinished or finished."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.settings import Settings, load


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.folder / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What else happened (evaluations, checkpoints, warnings, errors), one JSON object per line."""
        return self.folder / "events.jsonl"

    @property
    def log(self) -> Path:
        """Everything that the ranks and their launcher print."""
        return self.folder / "train.log"

    @property
    def summary(self) -> Path:
        """Written when training has ended well: its presence means that the run is finished."""
        return self.folder / "summary.json"

    @property
    def plan(self) -> Path:
        """What was foreseen when the training last began, as `recipe plan --json` says it."""
        return self.folder / "plan.json"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def finished(self) -> bool:
        return self.summary.exists()

    def settings(self) -> Settings:
        return load(self.config)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def event(self, kind: str, message: str, **values: Any) -> None:
        append_json(self.events, {"time": round(time.time(), 3), "kind": kind, "message": message, **values})

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Held while a process trains in this folder; gives the lock's file descriptor, which children may share.

        Raises UserError where another process holds it.
        """
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder}: another process trains this run now; wait for it or stop it"
                ) from None
            yield file.fileno()


_held_back: dict[Path, bytes] = {}
_appending = threading.Lock()
BALLAST_BYTES = 2**16  # some hundred lines


def keep_room(run: Run) -> None:
    """A file that is given up where the disk is full, so that a run can still say so."""
    with contextlib.suppress(OSError):
        _ballast(run.events).write_bytes(os.urandom(BALLAST_BYTES))


def _ballast(path: Path) -> Path:
    return path.with_name(".ballast")


def append_json(path: Path, value: dict[str, Any]) -> None:
    """One more line. Where the disk is full it is held back until there is room: a training goes on meanwhile."""
    with _appending:
        lines = _held_back.pop(path, b"") + json.dumps(value, ensure_ascii=False).encode() + b"\n"
        if _append(path, lines):
            return
        _ballast(path).unlink(missing_ok=True)
        if not _append(path, lines):
            _held_back[path] = lines


def _append(path: Path, lines: bytes) -> bool:
    """Whole or not at all; False where the disk is full."""
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            if file.write(lines) == len(lines):
                return True
            file.truncate(before)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    return False


def new_name(settings: Settings) -> str:
    model = (settings.model.id or "run").rstrip("/").split("/")[-1].lower()
    return re.sub(r"[^a-z0-9._-]", "-", f"{model}-{time.strftime('%Y%m%d-%H%M%S')}")


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"RUN={name}: expected a name of letters, digits, `.`, `_` and `-`")


def find_run(runs: str | Path, name: str | None) -> Run:
    """An existing run. Raises UserError naming those that exist."""
    folder = Path(runs)
    found = sorted((p.parent for p in folder.glob("*/config.yaml")), key=lambda p: p.stat().st_mtime)
    known = ", ".join(p.name for p in reversed(found[-5:])) or "none yet: `make train` makes one"
    if name is None:
        raise UserError(f"RUN= is not set, expected the name of a run in {folder} ({known})")
    check_name(name)
    if not (folder / name / "config.yaml").exists():
        raise UserError(f"RUN={name}: no such run in {folder}, expected one of: {known}")
    return Run(folder / name)


def begin_or_continue(settings: Settings, name: str | None) -> tuple[Run, bool]:
    """The run's folder, not yet made, and whether an unfinished run of that name goes on.

    Raises UserError where the name stands for a finished run or one with other settings.
    """
    if name is not None:
        check_name(name)
    run = Run(Path(settings.paths.runs) / (name or new_name(settings)))
    if run.finished:
        raise UserError(
            f"RUN={run.name}: is finished already ({run.folder}), expected a new name or an unfinished run"
        )
    if not run.config.exists():
        if run.folder.exists() and any(run.folder.iterdir()):
            raise UserError(
                f"{run.folder}: exists and is no run (it has no config.yaml), expected a new name"
            )
        return run, False
    difference = first_difference(run.settings().to_dict(), settings.to_dict())
    if difference:
        raise UserError(
            f"RUN={run.name}: was begun with other settings ({difference}), expected the same; use another RUN= or "
            f"CONFIG={run.config}"
        )
    return run, True


# Where a layer lies and what is computed twice changes no result, nor does a rehearsal, what is kept, what is done when
# something breaks, who is told, or what `eval` will ask; another number of ranks changes its rounding. An unfinished run may go on
# otherwise.
WITHOUT_EFFECT = (
    "compute.offload_layers",
    "compute.keep_layers",
    "compute.processes",
    "train.rehearsal",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.on_save_error",
    "train.on_nan",
    "train.restarts",
    "eval.prompts",
    "eval.tasks",
    "eval.task_rows",
    "track.tensorboard",
    "track.wandb",
    "track.mlflow",
    "track.prometheus",
)


# What a plan has decided for a run stays so, whatever it would decide today.
DECIDED_ONCE = ("train.micro_batch_tokens",)


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for section, values in new.items():
        for key, value in values.items():
            before = old.get(section, {}).get(key)
            if f"{section}.{key}" in DECIDED_ONCE and value == "auto":
                continue
            if before != value and f"{section}.{key}" not in WITHOUT_EFFECT:
                return f"{section}.{key} was {before}, is {value}"
    return None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of ours; a last line that was cut by a crash is left out."""
    return Tail(path).read()


class Tail:
    """What was added to a JSONL file of ours since the last look, without reading the rest again."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Objects of the new whole lines; a line that is being written waits for the next look."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            # What is done again after a restart was taken out.
            self.position = min(self.position, os.fstat(file.fileno()).st_size)
            file.seek(self.position)
            lines, newline, _ = file.read().rpartition(b"\n")
        self.position += len(lines) + len(newline)
        return [json.loads(line) for line in lines.split(b"\n") if line]
