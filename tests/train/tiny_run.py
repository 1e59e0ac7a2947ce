"""A tiny model, easy data and a config: a real training of two ranks in some seconds."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from recipe.cli import main
from recipe.train.launch import ranks_of
from tests.models import tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 90
PLAIN_STEPS = 12  # less than an epoch
NO_DROPOUT = ("--set", "lora.dropout=0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the ranks: with a model this small, threads only wait


def make_place(root: Path, steps: int, **train: Any) -> Path:
    """A config in `root` with its model and 240 rows that all teach the same answer."""
    tiny_checkpoint(root / "tiny")
    rows = [
        [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": "the answer is yes"}]
        for n in range(240)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    values = {
        "model": {"id": str(root / "tiny")},
        "data": {"path": str(root / "data.jsonl"), "max_length": 64},
        "lora": {"rank": 4, "alpha": 8},
        "train": {
            "steps": steps,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "global_batch_tokens": 512,
            "micro_batch_tokens": 128,
            "save_every": 1,
            "keep_checkpoints": 100,
            "log_every": 5,
            **train,
        },
        "eval": {"samples": 2, "exact_match": 4, "max_new_tokens": 12},
        "paths": {"models": str(root / "models"), "runs": str(root / "runs")},
    }
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def start_training(config: Path, run: str, *more: str, environment: dict[str, str] | None = None):
    """`environment`: what it has besides this process's own."""
    return subprocess.Popen(
        [sys.executable, "-m", "recipe", "train", "--config", str(config), "--run", run, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def train(config: Path, run: str, *more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a training that nobody disturbs.

    Its parent is this process, which has imported already what it needs; the ranks are processes as always.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "--config", str(config), "--run", run, *more])
    return code, out.getvalue(), err.getvalue()


@functools.cache
def plain_run() -> Path:
    """The folder of a finished run of two ranks without dropout, for all tests of a session. Read only."""
    root = Path(tempfile.mkdtemp(prefix="plain-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    code, _, err = train(
        make_place(root, PLAIN_STEPS, save_every=8, keep_checkpoints=1), "plain", *NO_DROPOUT
    )
    assert code == 0, err
    return root / "runs" / "plain"


WHOLE_STEPS = 30


@functools.cache
def whole_run() -> tuple[Path, tuple[int, str, str]]:
    """A config, and how the run `whole` of it has ended that nobody disturbed: two ranks, dropout, a checkpoint a step."""
    root = Path(tempfile.mkdtemp(prefix="whole-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = make_place(root, WHOLE_STEPS)
    ended = train(config, "whole")
    assert ended[0] == 0, ended[2]
    return config, ended


TENSOR_FILES = ("adapters.safetensors", "optimizer.safetensors", "rng.safetensors")


def differing(left: Path, right: Path) -> list[str]:
    """Files of two checkpoints that are not the same bytes."""
    return [name for name in TENSOR_FILES if (left / name).read_bytes() != (right / name).read_bytes()]


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and standard error of a training that ends now."""
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, err


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what: Callable[[], Any], process: subprocess.Popen) -> Any:
    """What `what` gives when it gives something; fails where the process ends before."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)
    return found


def wait_for_step(runs_folder: Path, step: int, process: subprocess.Popen) -> None:
    # The last line may be half written.
    wait_for(lambda: (runs_folder / "metrics.jsonl").exists() and _lines(runs_folder) >= step, process)


def _lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A training's process and all below it."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def words_below(process: subprocess.Popen) -> set[str]:
    """Of the command lines of all that run below a training; some may just have ended."""
    words: set[str] = set()
    for child in family(process)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            words.update(child.cmdline())
    return words


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks, in their order."""
    found = {rank: pid for pid, rank in ranks_of(process)}
    return [psutil.Process(found[rank]) for rank in sorted(found)]


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def wait_gone(processes: list[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=10)
    assert running(processes) == []
