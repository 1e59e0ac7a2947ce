"""A safetensors file written piece by piece, in any order, while its tensors are still being made.

Every size but one is known in advance: double quantisation writes its offset as a decimal number into the JSON that
stands beside a weight. So room for the longest header is left at the front (the format lets a header end in spaces), the
JSON goes to the end, and the header is written last. That is also why the file is hashed when it is whole, out of the
page cache, and not while it is written: a sha256 begins with the header.

Order of the data: fp32 constants, the streamed tensors by falling size of their type, 8-bit constants, JSON. So every
tensor begins at a multiple of its type's size, which torch needs to view the mapped file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from recipe.prepare.entries import Entry
from recipe.prepare.header import NAMES, PREFIX_BYTES
from recipe.prepare.nf4 import constants_of, json_suffix, longest_json
from recipe.settings import Quantization

ALIGN = 64


class ShardFile:
    """One output file; `write` may come from one thread while `start_of` is asked by others."""

    def __init__(self, path: Path, entries: list[Entry], quantization: Quantization):
        self.path = path
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}  # name: dtype, shape, bytes
        self.json_names: list[str] = []
        self._lay_out(entries, quantization)
        longest = {
            f"{e.name}.{json_suffix(quantization)}": longest_json(e.shape, quantization)
            for e in entries
            if e.quantised
        }
        room = len(self._header(longest))
        self.data = PREFIX_BYTES + room + -(PREFIX_BYTES + room) % ALIGN
        self.starts: dict[str, int] = {}
        end = self.data
        for name, (_, _, size) in self.tensors.items():
            self.starts[name] = end
            end += size
        self.end = end
        path.unlink(missing_ok=True)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def _lay_out(self, entries: list[Entry], quantization: Quantization) -> None:
        small: list[tuple[str, str, tuple[int, ...], int]] = []
        for entry in entries:
            if entry.quantised:
                for constant in constants_of(entry.numel, quantization):
                    small.append(
                        (f"{entry.name}.{constant.suffix}", constant.dtype, constant.shape, constant.bytes)
                    )
                self.json_names.append(f"{entry.name}.{json_suffix(quantization)}")
        streamed: list[tuple[str, str, tuple[int, ...], int]] = [
            (e.name, "U8", (e.numel // 2, 1), e.numel // 2)
            if e.quantised
            else (e.name, NAMES[e.dtype], e.shape, e.source_bytes)
            for e in sorted(entries, key=lambda e: 1 if e.quantised else -e.dtype.itemsize)
        ]
        order = [t for t in small if t[1] == "F32"], streamed, [t for t in small if t[1] != "F32"]
        for name, dtype, shape, size in (tensor for group in order for tensor in group):
            self.tensors[name] = dtype, shape, size

    def _header(self, json_bytes: dict[str, int]) -> bytes:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        jsons = {name: ("U8", (json_bytes[name],), json_bytes[name]) for name in self.json_names}
        for name, (dtype, shape, size) in (self.tensors | jsons).items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

    def start_of(self, name: str) -> int:
        """Where the tensor begins, in bytes from the start of the file."""
        return self.starts[name]

    def write(self, start: int, values: torch.Tensor) -> None:
        """Contiguous `values` on the CPU at `start`."""
        self._write(start, memoryview(values.reshape(-1).view(torch.uint8).numpy()))

    def close(self, jsons: dict[str, bytes]) -> int:
        """Write what had to wait, the JSON and the header; the size of the file in bytes. It is not fsynced yet."""
        end = self.end
        for name in self.json_names:
            self._write(end, memoryview(jsons[name]))
            end += len(jsons[name])
        header = self._header({name: len(jsons[name]) for name in self.json_names})
        header = header.ljust(self.data - PREFIX_BYTES)
        self._write(0, memoryview(len(header).to_bytes(PREFIX_BYTES, "little") + header))
        self.abandon()
        return end

    def abandon(self) -> None:
        """Close the file as it is."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def names(self) -> Iterable[str]:
        """All tensors of the file."""
        return [*self.tensors, *self.json_names]

    def _write(self, start: int, content: memoryview) -> None:
        while content:
            done = os.pwrite(self.descriptor, content, start)
            content, start = content[done:], start + done
