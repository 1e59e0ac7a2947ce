"""What a run was made of, so that it can be told apart and repeated: commit, lock, model, data, machine, versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from recipe.data.sources import held_out_path
from recipe.files import sha256_of
from recipe.hardware import Machine
from recipe.prepare import Prepared
from recipe.settings import Settings
from recipe.train.start import described, find

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets", "safetensors")
REPOSITORY = Path(__file__).parent.parent.parent


def manifest(
    settings: Settings,
    prepared: Prepared,
    machine: Machine,
    world_size: int,
    form: dict[str, Any],
    hashes: dict[str, list[str]],
) -> dict[str, Any]:
    """`form` and `hashes` are those of recipe.data.prepare: how the training rows put a question; sha256 of each source."""
    first, *others = hashes["train"]
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(),
        "sources_sha256": _sources_hash(),
        "lock_sha256": {
            path.name: sha256_of(path) for path in sorted(REPOSITORY.glob("requirements-*.lock"))
        },
        "image_digest": os.environ.get("RECIPE_IMAGE_DIGEST") or None,
        "model": {
            "name": prepared.name,
            "revision": prepared.revision,
            "folder": str(prepared.folder),
            "sha256": prepared.hashes,
        },
        "data": {
            "path": settings.data.path,
            # Of several sources one over all their hashes.
            "sha256": first if not others else hashlib.sha256("".join(hashes["train"]).encode()).hexdigest(),
            "sources": [
                {"path": source.path, "weight": source.weight, "sha256": digest}
                for source, digest in zip(settings.data.sources, hashes["train"], strict=False)
            ],
            **form,
            "eval_path": held_out_path(settings.data),
            "eval_sha256": next(iter(hashes["held_out"]), None),
        },
        "start": described(find(settings)),
        "world_size": world_size,
        "gpus": [gpu.name for gpu in machine.gpus],
        "driver": machine.gpus[0].driver_version if machine.gpus else None,
        "cpu": machine.cpu_model,
        "threads": threads_per_rank(world_size),
        "kernel": machine.kernel,
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seed": settings.train.seed,
    }


def threads_per_rank(world_size: int) -> int:
    """How many the ranks compute with on CPUs, unless the environment says otherwise: their sums depend on it."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // world_size))


def _sources_hash() -> str:
    """Of the package's Python files as they are: a checkout may have changes that no commit names."""
    package = Path(__file__).parent.parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)} {sha256_of(path)}\n".encode())
    return found.hexdigest()


def _git_commit() -> str | None:
    """The checkout's commit; in the image, which has neither a checkout nor git, the one that it was built from."""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return os.environ.get("RECIPE_COMMIT") or None
