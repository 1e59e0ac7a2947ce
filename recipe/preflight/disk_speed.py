"""How fast a folder's disk writes and reads in a row, past the page cache, and what kind of disk it is; prints JSON.

    python -m recipe.preflight.disk_speed models 256

How to read it: NVMe 1 to 7 GiB/s, a SATA SSD 0.5, a turning disk 0.1 to 0.2. A 70B model's 37 GiB are read at each start.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

from recipe.preflight.disks import existing
from recipe.preflight.program import say

CHUNK = 8 * 2**20


def measure(folder: Path, mib: int) -> dict[str, float]:
    """GiB/s of writing and of reading a scratch file, which is removed."""
    chunk = mmap.mmap(-1, CHUNK)  # page-aligned, as O_DIRECT wants it
    chunk.write(os.urandom(2**20) * (CHUNK // 2**20))  # a disk that compresses shall not gain by it
    turns = mib * 2**20 // CHUNK
    descriptor, name = tempfile.mkstemp(prefix=".preflight-", dir=folder)
    os.close(descriptor)
    try:
        descriptor = _open(name, os.O_WRONLY)
        started = time.perf_counter()
        for _ in range(turns):
            _whole(os.write(descriptor, chunk))
        os.fsync(descriptor)
        written = time.perf_counter() - started
        os.close(descriptor)
        descriptor = _open(name, os.O_RDONLY)
        # Where O_DIRECT is refused the pages are dropped instead; they are clean after the fsync.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        for _ in range(turns):
            _whole(os.readv(descriptor, [chunk]))
        read = time.perf_counter() - started
        os.close(descriptor)
    finally:
        os.unlink(name)
    return {"write_gib_per_second": mib / 1024 / written, "read_gib_per_second": mib / 1024 / read}


def _open(name: str, flags: int) -> int:
    try:
        return os.open(name, flags | os.O_DIRECT)
    except OSError:  # tmpfs, some network disks
        return os.open(name, flags)


def _whole(count: int) -> None:
    if count != CHUNK:
        raise OSError(f"{count} bytes at once, expected {CHUNK}")


if __name__ == "__main__":
    place = existing(Path(sys.argv[1]))
    if not os.access(place, os.W_OK):
        say(skipped=f"{place} may not be written")
    else:
        try:
            say(**measure(place, int(sys.argv[2])))
        except OSError as error:
            say(error=f"{place}: {(error.strerror or str(error)).lower()}")
