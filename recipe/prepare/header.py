"""The header of a safetensors file: which tensors it holds, and at which bytes.

Read here and not by safetensors' own reader for two reasons: the header of a file that is still on the hub can be read
from its first bytes, and tensors can be read by offset into buffers of ours, so that memory stays bounded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipe.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFIX_BYTES = 8
LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `bytes` of row-major values that begin `start` bytes into the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


FETCH_AGAIN = "fetch it again"


def read_header(file: Path, remedy: str = FETCH_AGAIN) -> list[Stored]:
    """The tensors of a local file, in the order of their bytes. Raises UserError where it is cut short or damaged."""
    try:
        with open(file, "rb") as content:
            size = content.seek(0, 2)
            content.seek(0)
            raw = content.read(PREFIX_BYTES)
            raw += content.read(min(header_bytes(raw), LARGEST_HEADER))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; {remedy}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); make it readable") from None
    return parse_header(raw, size, str(file), remedy)


def header_bytes(prefix: bytes) -> int:
    """Length of the JSON that follows the first eight bytes."""
    return int.from_bytes(prefix[:PREFIX_BYTES], "little")


def parse_header(raw: bytes, file_bytes: int, where: str, remedy: str = FETCH_AGAIN) -> list[Stored]:
    """The tensors that the first bytes of a file describe; `file_bytes` is the size that the whole file has.

    Raises UserError, opened by `where`, unless the tensors fill the file from the header to its end without a hole.
    """
    try:
        if len(raw) < PREFIX_BYTES:
            raise ValueError(f"{len(raw)} bytes")
        data = PREFIX_BYTES + header_bytes(raw)
        if not 2 <= data - PREFIX_BYTES <= LARGEST_HEADER or len(raw) < data:
            raise ValueError("its header is incomplete")
        header: dict[str, Any] = json.loads(raw[PREFIX_BYTES:data])
        header.pop("__metadata__", None)
        stored = []
        for name, tensor in header.items():
            first, end = tensor["data_offsets"]
            if tensor["dtype"] not in DTYPES:
                raise UserError(
                    f"{where}: {name} is of type {tensor['dtype']}, expected one that torch knows"
                )
            dtype = DTYPES[tensor["dtype"]]
            shape = tuple(tensor["shape"])
            if end - first != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"{name} has {end - first} bytes")
            stored.append(Stored(name, dtype, shape, data + first, end - first))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: is cut short or damaged ({reason}); {remedy}") from None
    stored.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    end = data
    for tensor in stored:
        if tensor.start != end:
            raise UserError(f"{where}: is damaged (a hole before {tensor.name}); {remedy}")
        end += tensor.bytes
    if end != file_bytes:
        raise UserError(
            f"{where}: is cut short or damaged ({file_bytes:,} bytes, its header speaks of {end:,}); {remedy}"
        )
    return stored
