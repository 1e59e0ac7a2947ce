"""Which type each tensor of a GGUF file has, and its bytes in that type.

The mix of Q4_K_M is llama.cpp's: more bits where they help most. The quantising itself is done by its own code, out of the
packaged library, straight from the checkpoint's precision: no second file of 16 bits is needed on the way.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from recipe.errors import UserError
from recipe.plan.shapes import ModelShape

# By kind: the type of most matrices, and what the file calls itself. Norms, biases and other vectors are always F32.
KINDS = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
}
# Where a row is no multiple of a type's block of 256, llama.cpp takes the next better one with a block of 32.
SMALLER_BLOCK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
CHUNK_VALUES = 2**22  # converted at a time by each thread: 16 MiB in fp32
_LAYER = re.compile(r"^blk\.\d+\.")
LAYERS_OF_70B = 80  # llama.cpp knows the size by it, and gives the small attn_v of such models more bits


@dataclass(frozen=True)
class Fallback:
    """A tensor that has another type than the kind gives it, since its rows are no multiple of that type's block."""

    tensor: str
    wanted: str
    got: str
    columns: int


def summary(fallbacks: Sequence[Fallback]) -> list[str]:
    """One line for each kind of them."""
    kinds = Counter((f.got, f.wanted, f.columns, _LAYER.sub("", f.tensor)) for f in fallbacks)
    groups: dict[tuple[str, str, int], list[str]] = {}
    for (got, wanted, columns, name), count in kinds.items():
        groups.setdefault((got, wanted, columns), []).append(f"{count} {name}")
    return [
        f"{got} instead of {wanted} (rows of {columns}, no multiple of {gguf.GGML_QUANT_SIZES[Type[wanted]][0]}): "
        + ", ".join(names)
        for (got, wanted, columns), names in groups.items()
    ]


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: where it comes from (None: computed, not read), what it becomes and what it should have."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    type: Type
    wanted: Type

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    @property
    def fallback(self) -> Fallback | None:
        if self.type == self.wanted:
            return None
        return Fallback(self.name, self.wanted.name, self.type.name, self.shape[-1])


def planned(name: str, source: str | None, size: tuple[int, ...], kind: str, shape: ModelShape) -> Planned:
    """`name`: in the file. `shape`: of the model."""
    if len(size) < 2:
        return Planned(name, source, size, Type.F32, Type.F32)
    wanted = found = _mixed(name, shape) if kind == "q4_k_m" else KINDS[kind][0]
    for _ in range(2):
        if size[-1] % gguf.GGML_QUANT_SIZES[found][0]:
            found = SMALLER_BLOCK.get(found, Type.F16)
    return Planned(name, source, size, found, wanted)


def _mixed(name: str, shape: ModelShape) -> Type:
    """Q4_K_M: 6 bits for the head, and for the values and the way down in the first and last eighth and every third layer."""
    if name == "output.weight" or (name == "token_embd.weight" and shape.tied):
        return Type.Q6_K
    values = name.endswith("attn_v.weight")
    if values or name.endswith("ffn_down.weight"):
        layer, eighth = int(name.split(".")[1]), shape.layers // 8
        if layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2:
            return Type.Q6_K
        grouped = shape.family == "qwen2" or (shape.family != "qwen3" and shape.heads > shape.kv_heads)
        if values and grouped and shape.layers == LAYERS_OF_70B:
            return Type.Q5_K
    return Type.Q4_K


def converted(tensor: torch.Tensor, plan: Planned) -> np.ndarray[Any, Any]:
    """As bytes, some rows at a time in several threads: a whole fp32 copy would be the largest thing in memory.

    Raises UserError where a value is not finite, or does not fit into the type.
    """
    out: np.ndarray[Any, Any] = np.empty(plan.bytes, dtype=np.uint8)
    rows = tensor.reshape(-1, tensor.shape[-1])
    row_bytes, step = plan.bytes // rows.shape[0], max(CHUNK_VALUES // rows.shape[1], 1)

    def convert(start: int) -> None:
        part = rows[start : start + step]
        end = start + part.shape[0]
        if not part.isfinite().all():
            raise UserError(f"{plan.source}: has values that are not finite, expected finite weights")
        if plan.type in PLAIN:
            out[start * row_bytes : end * row_bytes] = _cast(part, plan)
        else:
            _quantise(part, plan.type, out[start * row_bytes : end * row_bytes])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(convert, range(0, rows.shape[0], step)))
    return out


def _cast(part: torch.Tensor, plan: Planned) -> np.ndarray[Any, Any]:
    values = part.to(PLAIN[plan.type]).contiguous()
    if plan.type == Type.F16 and not values.isfinite().all():
        raise UserError(
            f"{plan.source}: its largest value is {part.abs().max().item():.4g}, expected at most 65504, which is all that "
            "F16 holds; use bf16"
        )
    return values.view(torch.uint8).numpy().reshape(-1)


def _quantise(part: torch.Tensor, kind: Type, out: np.ndarray[Any, Any]) -> None:
    from recipe.export.llamacpp import library

    lib, ffi = library()
    values = part.float().contiguous().numpy()
    done = lib.ggml_quantize_chunk(
        int(kind),
        ffi.cast("float *", values.ctypes.data),
        ffi.cast("void *", out.ctypes.data),
        0,
        values.shape[0],
        values.shape[1],
        ffi.NULL,
    )
    assert done == out.nbytes
