"""What a check returns, and what it may look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from recipe.hardware import Machine
from recipe.plan import Plan
from recipe.settings import Settings

Status = Literal["ok", "warn", "fail", "skip"]
REPOSITORY = Path(__file__).resolve().parents[2]
STACK_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One answered question. `remedy` says what to do and is empty where nothing is to be done."""

    name: str
    status: Status
    found: str
    expected: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Context:
    """What the checks judge. `prepared` is where the NF4 checkpoint of the model lies or will lie."""

    settings: Settings
    machine: Machine
    plan: Plan
    prepared: Path | None = None
    lock_folder: Path = REPOSITORY

    @property
    def on_gpu(self) -> bool:
        return self.plan.device == "gpu"

    @cached_property
    def stack(self) -> dict[str, Any]:
        """What recipe/preflight/stack.py found: importing torch, CUDA, an NF4 round trip.

        In a process of its own: a broken library may abort the interpreter, and a CUDA context would take GPU
        memory from the training that follows.
        """
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "recipe.preflight.stack", self.plan.device]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=STACK_SECONDS,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return {"torch_error": f"importing torch took more than {STACK_SECONDS} s"}
        except (IndexError, json.JSONDecodeError):
            said = done.stderr.strip().splitlines()
            return {"torch_error": said[-1] if said else f"the test process ended with {done.returncode}"}


def judged(
    name: str, good: bool, found: str, expected: str, remedy: str, otherwise: Status = "fail"
) -> Check:
    """ok, or `otherwise` with its remedy."""
    return Check(name, "ok", found, expected) if good else Check(name, otherwise, found, expected, remedy)
