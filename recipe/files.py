"""Files that are either whole or not there: written aside, fsynced, renamed; with hashes and a look at free space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipe.errors import UserError

GIB = 2**30


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected JSON") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); the file is damaged, fetch or make it again"
        ) from None


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder that gets its name only when the block has ended well; what stood there before is replaced."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    publish(aside, folder)


def publish(aside: Path, folder: Path) -> None:
    """fsync what stands in `aside` and rename it to `folder`."""
    for path in [p for p in aside.rglob("*") if p.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(aside)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def require_space(
    folder: Path,
    needed_bytes: float,
    what: str,
    remedy: str = "choose another disk with --set paths.models= / paths.runs=",
) -> None:
    """Raises UserError where the disk that will hold `folder` has too little room for `what`."""
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / GIB:.1f} GiB free, expected {needed_bytes / GIB:.1f} GiB for {what}; "
            f"free some space or {remedy}"
        )
