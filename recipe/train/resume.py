"""Where an unfinished run goes on: its newest sound checkpoint, and its records without what is done again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from recipe.train import checkpoint
from recipe.train.run import Run


def resume_point(run: Run) -> tuple[Path | None, list[str]]:
    """The checkpoint, if there is one, and a line for each that was passed over. What a crash has cut is cleared away."""
    for path in (run.folder / "checkpoints").glob(".step-*"):  # a save that was cut short
        shutil.rmtree(path, ignore_errors=True)
    resume, notes = checkpoint.newest_sound(run.folder)
    _forget_undone(run, checkpoint.read_state(resume)["step"] if resume else 0)
    return resume, notes


def _forget_undone(run: Run, step: int) -> None:
    """Steps after the checkpoint that training goes on from are done again: their lines go, and what a crash has cut.

    In place, since others may be reading.
    """
    for path in (run.metrics, run.events):
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            lines = whole.split(b"\n") if whole else []
            if path == run.metrics:
                lines = [line for line in lines if json.loads(line)["step"] <= step]
            os.truncate(path, sum(len(line) + 1 for line in lines))
