"""Random access to a safetensors checkpoint: each rank reads the bytes it needs, and no others.

Plain `pread` at the offsets of the header: no page of another rank's slice is touched, as mapping the file would.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipe.checksums import BLOCK_BYTES, block_checksums
from recipe.errors import UserError
from recipe.prepare.header import read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VERIFY_BYTES = 8 * 2**20
PREPARE_AGAIN = "run `make prepare` again"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """The tensors of a folder by name. Raises UserError, naming the file, where one is missing, cut short or damaged.

    Where `recipe prepare` has left checksums beside a file, every block that is read is compared with them.
    """

    def __init__(self, folder: Path, remedy: str = PREPARE_AGAIN, single: str = SINGLE):
        """`remedy` ends the messages; `single` is what the file is called where there is no index."""
        self.folder, self.remedy = folder, remedy
        self.tensors: dict[str, Stored] = {}
        self._descriptors: dict[Path, int] = {}
        self._checksums: dict[Path, Any] = {}
        self._local = threading.local()
        index = folder / INDEX
        try:
            names = (
                sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if index.exists()
                else [single]
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: is damaged, expected a weight_map; {self.remedy}") from None
        for name in names:
            self._open(folder / name)
        self._constants: dict[str, list[str]] = {}
        for name in self.tensors:
            weight, dot, key = name.partition(".weight.")
            if dot:
                self._constants.setdefault(f"{weight}.weight", []).append(key)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, path: Path) -> None:
        for tensor in read_header(path, self.remedy):
            end = tensor.start + tensor.bytes
            self.tensors[tensor.name] = Stored(path, tensor.dtype, tensor.shape, tensor.start, end)
        self._descriptors[path] = os.open(path, os.O_RDONLY)
        checksums = block_checksums(path)
        if checksums is not None and len(checksums) != -(-self._size(path) // BLOCK_BYTES):
            raise UserError(f"{path}: its checksums are of another file; {self.remedy}")
        self._checksums[path] = checksums

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def stored(self, name: str, shape: tuple[int, ...] | None = None) -> Stored:
        """Where `name` lies; with `shape`, checked against it."""
        if name not in self.tensors:
            raise UserError(
                f"{self.folder}: has no tensor {name}, which its config.json asks for; {self.remedy}"
            )
        found = self.tensors[name]
        if shape is not None and found.shape != tuple(shape):
            raise UserError(
                f"{found.file}: {name} has shape {list(found.shape)}, expected {list(shape)} from config.json"
            )
        return found

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A whole tensor."""
        stored = self.stored(name, shape)
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        self.read_bytes(name, 0, raw)
        return raw.view(stored.dtype).view(stored.shape)

    def read_rows(self, name: str, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
        """Rows `start` to `end` of dimension 0 of a tensor of `shape`."""
        stored = self.stored(name, shape)
        row = stored.nbytes // max(shape[0], 1)
        raw = torch.empty((end - start) * row, dtype=torch.uint8)
        self.read_bytes(name, start * row, raw)
        return raw.view(stored.dtype).view(end - start, *shape[1:])

    def constants(self, name: str) -> dict[str, torch.Tensor]:
        """What bitsandbytes stores beside the packed weight `name`, without the large absmax tensors."""
        return {
            key: self.read(f"{name}.{key}")
            for key in self._constants.get(name, [])
            if key not in ("absmax", "nested_absmax")
        }

    def read_bytes(self, name: str, offset: int, out: torch.Tensor) -> None:
        """Bytes of `name` from `offset` into `out` (uint8, contiguous, on the CPU)."""
        stored = self.stored(name)
        start = stored.start + offset
        view = memoryview(out.numpy())
        if self._checksums[stored.file] is None:
            self._pread(stored.file, start, view)
            return
        end, size = start + len(view), self._size(stored.file)
        inner, last = -(-start // BLOCK_BYTES), end // BLOCK_BYTES
        if inner < last:  # whole blocks of the slice, at once
            low, high = inner * BLOCK_BYTES, last * BLOCK_BYTES
            self._pread(stored.file, low, view[low - start : high - start])
        for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            begin, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size)
            if inner <= block < last:
                self._check(stored.file, block, view[begin - start : stop - start], name)
            else:  # the slice begins or ends within this block, which must be read whole to be checked
                low, high = max(start, begin), min(end, stop)
                piece = self._whole_block(stored.file, block, stop - begin, name)
                view[low - start : high - start] = piece[low - begin : high - begin]

    def _whole_block(self, file: Path, block: int, size: int, name: str) -> memoryview:
        """A checked block; small tensors that lie in the same one read it once."""
        last = getattr(self._local, "last", None)
        if last is None or last[0] != (file, block):
            piece = memoryview(bytearray(size))
            self._pread(file, block * BLOCK_BYTES, piece)
            self._check(file, block, piece, name)
            last = self._local.last = ((file, block), piece)
        return last[1]

    def _check(self, file: Path, block: int, piece: memoryview, name: str) -> None:
        checksums = self._checksums[file]
        if checksums is not None and zlib.crc32(piece) != checksums[block]:
            begin = block * BLOCK_BYTES
            raise UserError(
                f"{file}: is damaged (bytes {begin} to {begin + len(piece)} are not those that were written; found "
                f"while reading {name}); {self.remedy}"
            )

    def verify(self, name: str, start: int, end: int) -> None:
        """Compare bytes `start` to `end` of a tensor that is mapped rather than read with what was written."""
        if self._checksums[self.stored(name).file] is None:
            return
        scratch = torch.empty(VERIFY_BYTES, dtype=torch.uint8)
        for first in range(start, end, VERIFY_BYTES):
            self.read_bytes(name, first, scratch[: min(VERIFY_BYTES, end - first)])

    def _size(self, file: Path) -> int:
        return os.fstat(self._descriptors[file]).st_size

    def _pread(self, file: Path, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[file], [view[done:]], start + done)
            if count == 0:
                raise UserError(f"{file}: ends at byte {start + done}; {self.remedy}")
            done += count
