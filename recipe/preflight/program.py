"""Runs a measuring program in a process of its own: a broken library may abort or hang, and CUDA keeps GPU memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A program that measures while something else goes on. Whoever began it takes its result or ends it."""

    process: subprocess.Popen
    seconds: float
    begun: float

    def result(self) -> dict[str, Any]:
        """What it prints, its JSON lines merged, with its standard error as `log`.

        Where it fails or takes longer than its seconds, there is an `error` beside the lines that came before.
        """
        late = False
        try:
            # One that had ended long ago still has to be read.
            rest = max(1.0, self.begun + self.seconds - time.monotonic())
            said, log = self.process.communicate(timeout=rest)
        except subprocess.TimeoutExpired:
            late = True
            self.end()
            said, log = self.process.communicate()
        finally:
            self.end()
        found: dict[str, Any] = {}
        for line in said.splitlines():
            with contextlib.suppress(ValueError):
                found |= json.loads(line)
        if late:
            found["error"] = f"no answer within {self.seconds:.0f} s"
        elif self.process.returncode and "error" not in found:
            found["error"] = f"the test process ended with {self.process.returncode}"
        lines = [line for line in log.strip().splitlines() if line.strip() and not line.startswith(" ")]
        if "error" in found and lines:
            found["error"] += f": {lines[-1][:200]}"
        return found | {"log": log}

    def end(self) -> None:
        """It and its ranks, if they are still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def begin(
    module: str,
    *arguments: str,
    seconds: float,
    environment: dict[str, str] | None = None,
    given: str = "",
) -> Running:
    """Start recipe.preflight.MODULE with `given` as its standard input."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as request:
        request.write(given)
        request.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", f"recipe.preflight.{module}", *arguments],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # What the caller has set wins over what we found.
            env=(environment or {}) | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that its ranks end with it
        )
    return Running(process, seconds, time.monotonic())


def run(module: str, *arguments: str, **options: Any) -> dict[str, Any]:
    """Start recipe.preflight.MODULE, as `begin` does, and wait for its result."""
    return begin(module, *arguments, **options).result()


def say(**values: Any) -> None:
    """For the programs: one line of what was measured, at once, so that it counts even if the next part hangs."""
    print(json.dumps(values), flush=True)
