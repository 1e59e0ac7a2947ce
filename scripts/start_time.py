"""How long `make train` takes to its first lines, in the container and on the host, by turns.

    python3 scripts/start_time.py [TURNS]      # needs the image and .venv of this checkout, and the demo's model

Each turn begins a run of the demo's config, notes when lines appear, and stops it when it trains.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = "start-time"
LINES = {"data:": "first line of the log", "starting": "ranks started", "training to": "training"}


def turn(runtime: str) -> dict[str, float]:
    """Seconds from the call of make to each of LINES."""
    shutil.rmtree(ROOT / "runs" / RUN, ignore_errors=True)
    command = [
        "make",
        "train",
        "CONFIG=recipe/configs/smollm2-135m.yaml",
        f"RUN={RUN}",
        f"RUNTIME={runtime}",
        "FLAVOUR=cpu",
    ]
    started, found = time.monotonic(), {}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr or ():
        for begin, name in LINES.items():
            if line.startswith(begin):
                found[name] = time.monotonic() - started
        if len(found) == len(LINES):
            os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    shutil.rmtree(ROOT / "runs" / RUN, ignore_errors=True)
    return found


def main() -> int:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    measured: dict[str, list[dict[str, float]]] = {"docker": [], "host": []}
    for _ in range(turns):
        for runtime, results in measured.items():
            results.append(turn(runtime))
    for name in LINES.values():
        medians = {
            runtime: statistics.median(r[name] for r in results) for runtime, results in measured.items()
        }
        spread = ", ".join(
            f"{runtime} {medians[runtime]:.1f} s ({min(r[name] for r in results):.1f} to {max(r[name] for r in results):.1f})"
            for runtime, results in measured.items()
        )
        print(f"{name}: {spread}; container {medians['docker'] - medians['host']:+.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
