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

from recipe.files import sha256_of
from recipe.hardware import Machine
from recipe.prepare import Prepared
from recipe.settings import Settings
from recipe.train.rows import DEMO, held_out_path

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets", "safetensors")
REPOSITORY = Path(__file__).parent.parent.parent


def manifest(
    settings: Settings, prepared: Prepared, machine: Machine, world_size: int, form: dict[str, Any]
) -> dict[str, Any]:
    """`form` is TokenData.form, how the training rows put a question."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(),
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
            "sha256": _data_hash(settings.data.path, DEMO / "train.jsonl"),
            **form,
            "eval_path": held_out_path(settings.data),
            "eval_sha256": _data_hash(held_out_path(settings.data), DEMO / "heldout.jsonl"),
        },
        "world_size": world_size,
        "gpus": [gpu.name for gpu in machine.gpus],
        "driver": machine.gpus[0].driver_version if machine.gpus else None,
        "cpu": machine.cpu_model,
        "kernel": machine.kernel,
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seed": settings.train.seed,
    }


def _data_hash(path: str | None, demo_file: Path) -> str | None:
    """sha256 of the file; of the name where the data comes from the hub (its revision is in the config)."""
    if path is None:
        return None
    file = demo_file if path == "demo" else Path(path)
    return sha256_of(file) if file.is_file() else hashlib.sha256(path.encode()).hexdigest()


def _git_commit() -> str | None:
    """The checkout's commit; in the image, which has neither a checkout nor git, the one that it was built from."""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return os.environ.get("RECIPE_COMMIT") or None
