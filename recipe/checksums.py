"""A checksum for each block of a weight file, in a small file beside it, so that a slice can be checked when it is read.

One hash over a whole file cannot be checked by a rank that reads a part of it, and reading 40 GB twice to be sure
costs half a minute. `model.safetensors.crc32` holds the CRC-32 of every 256 KiB block, 4 bytes each, little-endian.
"""

from __future__ import annotations

import array
import sys
import zlib
from pathlib import Path

BLOCK_BYTES = 256 * 1024
SUFFIX = ".crc32"


class BlockChecksums:
    """Collects the checksums of a file that is written from its first byte to its last."""

    def __init__(self) -> None:
        self._values = array.array("I")
        self._current, self._filled = 0, 0

    def update(self, data) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: BLOCK_BYTES - self._filled]
            self._current = zlib.crc32(piece, self._current)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == BLOCK_BYTES:
                self._close_block()

    def to_bytes(self) -> bytes:
        """What stands in the file beside the weights; call it once, at the end."""
        if self._filled:
            self._close_block()
        return _little_endian(self._values).tobytes()

    def _close_block(self) -> None:
        self._values.append(self._current)
        self._current, self._filled = 0, 0


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def block_checksums(path: Path) -> array.array | None:
    """The recorded checksums of `path`, or None where there are none (a checkpoint quantised elsewhere)."""
    beside = sidecar(path)
    if not beside.exists():
        return None
    values = array.array("I")
    raw = beside.read_bytes()
    values.frombytes(raw[: len(raw) // 4 * 4])
    return _little_endian(values)


def _little_endian(values: array.array) -> array.array:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values
