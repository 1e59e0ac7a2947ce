"""An export as one .tar with checksums: the same bytes whenever and wherever it is made.

Not compressed: weights do not shrink. `sha256sum -c` passes for the archive (TARGET.sha256 beside it) and, unpacked, for
each file (SHA256SUMS inside).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from recipe.errors import UserError
from recipe.export.contents import Item, contents, damaged, progress, size_text
from recipe.files import fsync_folder, require_space, write_text

SUMS = "SHA256SUMS"
MTIME = 315_532_800  # 1980-01-01: GNU tar warns of times that are older, zip knows none
BUFFER_BYTES = 2**20
SPARE_BYTES = 2**20  # headers and the end of the archive


def archive(folder: Path, target: Path) -> dict[str, Any]:
    """Write the finished export to `target`, a .tar, under RUN-KIND/. Nothing is left where it fails.

    Raises UserError where the target exists or cannot be, or a file is not as it was verified.
    """
    items = contents(folder)
    _check_target(target)
    top = top_folder(folder)
    total = sum(item.size for item in items)
    require_space(
        target.parent, total + len(items) * 1024 + SPARE_BYTES, "the archive", "name a file on another disk"
    )
    aside = target.with_name(f".{target.name}.partial")
    try:
        with open(aside, "wb") as file, ThreadPoolExecutor(1) as thread:
            hashing = _Hashing(file, thread)
            _write(items, top, hashing, total)
            file.flush()
            os.fsync(file.fileno())
        write_text(target.with_name(f"{target.name}.sha256"), f"{hashing.hexdigest()}  {target.name}\n")
        os.replace(aside, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return {
        "archive": str(target),
        "bytes": target.stat().st_size,
        "sha256": hashing.hexdigest(),
        "files": len(items) + 1,
        "unpacks_to": top,
    }


def render(result: dict[str, Any]) -> str:
    target = Path(result["archive"])
    return (
        f"{target}: {result['files']} files, {size_text(result['bytes'])}, unpacks to {result['unpacks_to']}/\n"
        f"check it with `sha256sum -c {target.name}.sha256`, and what it unpacks to with `sha256sum -c {SUMS}` inside"
    )


def top_folder(folder: Path) -> str:
    """RUN-KIND of runs/RUN/adapters or runs/RUN/exports/KIND."""
    folder = folder.resolve()
    run = folder.parent.parent if folder.parent.name == "exports" else folder.parent
    return f"{run.name}-{folder.name}"


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already, expected a new name; remove it or name another file")
    if target.suffix != ".tar":
        raise UserError(
            f"{target}: expected a name that ends in .tar (weights do not shrink, so it is not compressed)"
        )
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder, expected one that is there; make it first")


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is written, so that it need not be read again: by a thread, as each file is too."""

    def __init__(self, file: IO[bytes], thread: ThreadPoolExecutor):
        self._file, self._thread, self._sha256 = file, thread, hashlib.sha256()
        self._last: Future[None] | None = None

    def write(self, content: Any) -> int:
        self._wait()  # so that one piece waits at most
        self._last = self._thread.submit(self._sha256.update, content)
        return self._file.write(content)

    def hexdigest(self) -> str:
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


class _Source:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes], bar: Any):
        self._file, self._bar, self.sha256 = file, bar, hashlib.sha256()

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.sha256.update(content)
        self._bar.update(len(content))
        return content


def _write(items: list[Item], top: str, file: Any, total_bytes: int) -> None:
    sums = "".join(f"{item.sha256}  {item.name}\n" for item in items).encode()
    opened: Any = tarfile.open  # its type knows no copybufsize
    with (
        opened(
            fileobj=file,
            mode="w|",
            format=tarfile.PAX_FORMAT,
            bufsize=BUFFER_BYTES,
            copybufsize=BUFFER_BYTES,
        ) as tar,
        progress("archive", total_bytes) as bar,
    ):
        tar.addfile(_entry(f"{top}/{SUMS}", len(sums)), io.BytesIO(sums))
        for item in items:
            with open(item.path, "rb") as content:
                source = _Source(content, bar)
                tar.addfile(_entry(f"{top}/{item.name}", item.size), source)
            if source.sha256.hexdigest() != item.sha256:
                raise damaged(item)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """Owner, time and mode are the same for all: what they were here says nothing there."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, MTIME, 0o644
    return entry
