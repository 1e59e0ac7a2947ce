"""`recipe demo`: the whole job on a small real model, stage by stage, each in a process of its own.

Every stage is the command that a user would type; here they run one after the other, with their time and the peak RAM
of their process tree beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from recipe.errors import Refused
from recipe.files import GIB, read_json, write_json
from recipe.train.run import Run

CONFIG = Path(__file__).parent / "configs" / "smollm2-135m.yaml"
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the same two ranks on every machine, whatever GPUs it has
SAMPLE_SECONDS = 0.1
NEW_HEIGHT = 1.01  # a rise of less than 1 % is not looked at


@dataclass(frozen=True)
class Stage:
    """One command of the demo. `expected_seconds` is what it took on 2 cores (docs/benchmarks.md)."""

    name: str
    what: str
    command: tuple[str, ...]
    expected_seconds: int


@dataclass(frozen=True)
class Measured:
    stage: str
    seconds: float
    peak_ram_gib: float


def stages(run: str, runs: str) -> list[Stage]:
    config = ("--config", str(CONFIG), "--set", f"paths.runs={runs}")
    of_run = ("--run", run, "--set", f"paths.runs={runs}")
    return [
        Stage("plan", "does it fit on this machine?", ("plan", *config), 2),
        Stage("prepare", "fetch SmolLM2-135M-Instruct and quantise it to NF4", ("prepare", *config), 30),
        Stage("preflight", "is this machine able to do it?", ("preflight", *config, "--quick"), 1),
        Stage(
            "train",
            "two processes, each with half of every layer, train LoRA adapters",
            ("train", *config, "--run", run),
            160,
        ),
        Stage(
            "export",
            "gather the adapters and verify them with plain PEFT",
            ("export", *of_run, "--replace"),
            30,
        ),
        Stage(
            "eval",
            "count right answers on held-out prompts, without and with the adapters",
            ("eval", *of_run),
            35,
        ),
    ]


def demo(runs: str, name: str | None, as_json: bool) -> int:
    """Run all stages, or those that an interrupted demo has left. Raises Refused where one of them fails."""
    run = name or time.strftime("demo-%Y%m%d-%H%M%S")
    folder = Path(runs) / run
    steps = stages(run, runs)
    measured: list[Measured] = []
    say(
        f"the whole job on a small real model, about {sum(s.expected_seconds for s in steps) / 60:.0f} minutes on 2 cores"
    )
    for number, stage in enumerate(steps, 1):
        say(f"\n[{number}/{len(steps)}] {stage.name}: {stage.what} (about {stage.expected_seconds} s)")
        if stage.name == "train" and Run(folder).finished:
            say("      done already")
            continue
        measured.append(_measure(stage, run, as_json))
        say(f"      {measured[-1].seconds:.1f} s, peak RAM {measured[-1].peak_ram_gib:.1f} GiB")
    report = read_json(folder / "eval.json")
    result = {
        "run": run,
        "stages": [asdict(m) for m in measured],
        "base": report["base"],
        "tuned": report["tuned"],
    }
    write_json(folder / "demo.json", result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print("\n" + render(result, folder))
    return 0


def render(result: dict[str, Any], folder: Path) -> str:
    base, tuned = result["base"], result["tuned"]
    lines = [f"{'stage':<12}{'seconds':>9}{'peak RAM, GiB':>16}"]
    lines += [f"{m['stage']:<12}{m['seconds']:>9.1f}{m['peak_ram_gib']:>16.1f}" for m in result["stages"]]
    lines += [
        f"{'all':<12}{sum(m['seconds'] for m in result['stages']):>9.1f}"
        f"{max(m['peak_ram_gib'] for m in result['stages']):>16.1f}",
        "",
        f"right answers on held-out prompts: before {base['exact_matches']} of {base['prompts']}, "
        f"after {tuned['exact_matches']} of {tuned['prompts']}",
        f"held-out loss: before {base['loss']:.3f}, after {tuned['loss']:.3f}",
        f"verified adapters: {folder / 'adapters'}",
        f"talk to it: make chat RUN={result['run']}",
    ]
    return "\n".join(lines)


def _measure(stage: Stage, run: str, quiet: bool) -> Measured:
    """Run one stage and sample the memory of its process tree."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "recipe", *stage.command],
        stdout=subprocess.DEVNULL if quiet else None,
        env=os.environ | ON_THE_CPU,
    )
    peak = PeakMemory(process.pid)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the stage got the signal too, and saves
        say(f"demo: stopped; go on with RUN={run}")
        raise
    finally:
        peak.stop()
    if code:
        raise Refused(
            f"demo: `recipe {stage.command[0]}` ended with exit code {code}; the line above says why"
        )
    return Measured(stage.name, round(time.perf_counter() - started, 1), round(peak.gib, 2))


class PeakMemory(threading.Thread):
    """The largest memory of a process tree: proportional set size, so that shared pages count once.

    Reading that size walks every page of a process (18 ms for 1.5 GB, in which the process waits), so it is read only
    where the private memory, which costs nothing to read, has reached a new height.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.gib, self._ended = pid, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        highest = 0
        while not self._ended.wait(SAMPLE_SECONDS if highest else 0):
            private = tree_bytes(self.pid, lambda p: (m := p.memory_info()).rss - m.shared)
            if private > highest * NEW_HEIGHT:
                highest = private
                self.gib = max(self.gib, tree_bytes(self.pid, lambda p: p.memory_full_info().pss) / GIB)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def tree_bytes(pid: int, size: Callable[[psutil.Process], int]) -> int:
    """Sum of `size` over a process and all below it; those that end meanwhile count as nothing."""
    try:
        family = [(parent := psutil.Process(pid)), *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in family:
        with contextlib.suppress(psutil.Error):
            total += size(process)
    return total


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
