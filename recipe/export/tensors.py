"""Where the weights of an export come from, one tensor at a time: a plain checkpoint, a prepared NF4 one, or either of
them with adapters merged in. Nothing here holds more than the tensors that are being read.

Files are read by `pread` and not mapped, so what was read does not stay in the process's memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from peft.tuners.lora import Linear
from torch import nn

from recipe.engine.checkpoint import INDEX, PREPARE_AGAIN, Checkpoint
from recipe.errors import UserError
from recipe.export.peftfolder import PeftFolder, Weighted
from recipe.files import read_json
from recipe.prepare.header import FETCH_AGAIN

BLOCK_VALUES = 2**20  # of a weight, merged at a time: its fp32 temporaries stay in the cache
BLOCK_ROWS = 64  # a multiple of this: any number of such rows is whole blocks of absmax
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
STATE = "quant_state.bitsandbytes__"

__all__ = ["Dequantised", "Merged", "Stored", "Tensors", "Weighted"]


class Tensors(Protocol):
    """The weights of a plain Hugging Face checkpoint by name."""

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer's files lie."""

    def names(self) -> list[str]:
        """In the order of the files. Of tied embeddings only the embedding."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, the caller's own; may be called from several threads."""

    def held_bytes(self, name: str) -> int:
        """RAM that `read` needs, its result included."""

    def identity(self) -> list[Any]:
        """JSON that changes when the weights do."""


class Base(Tensors, Protocol):
    """What adapters can be merged into: its weights can be had before any rounding, some rows at a time."""

    def fetch(self, name: str) -> Any:
        """What lies on the disk, as `exact` takes it."""

    def fetched_bytes(self, name: str) -> int:
        """RAM that what `fetch` gives takes."""

    def exact(self, fetched: Any, first: int, end: int) -> torch.Tensor:
        """Rows of a matrix: bf16 where it is stored so (then a view of what was fetched), else fp32."""


class Stored:
    """A plain safetensors checkpoint. Raises UserError where a file is missing, cut short, or is not what the index says."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if self.config.get("quantization_config"):
            raise UserError(
                f"{folder}: config.json says that it is quantised, expected an unquantised checkpoint"
            )
        self.checkpoint = Checkpoint(folder, FETCH_AGAIN)
        _check_index(folder, self.checkpoint)
        self._names = _untied(self.config, self.checkpoint.tensors)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.checkpoint.stored(name).dtype

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name)

    def held_bytes(self, name: str) -> int:
        return self.checkpoint.stored(name).nbytes

    def fetch(self, name: str) -> torch.Tensor:
        return self.read(name)

    def fetched_bytes(self, name: str) -> int:
        return self.held_bytes(name)

    def exact(self, fetched: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return _exact_rows(fetched, first, end)

    def identity(self) -> list[Any]:
        return _identity(self.checkpoint)


class Dequantised:
    """A prepared NF4 checkpoint (or FP4; the absmax quantised again or not), as bf16.

    What is read is what bitsandbytes dequantises, and so what a run on this checkpoint has computed with.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = Checkpoint(folder)
        _check_index(folder, self.checkpoint)
        tensors = self.checkpoint.tensors
        weights = {name.partition(f".{STATE}")[0] for name in tensors if f".{STATE}" in name}
        if not weights:
            raise UserError(f"{folder}: has no quantised weights, expected a checkpoint of `make prepare`")
        constants = {
            name for name in tensors if name.rpartition(".")[0] in weights or name.partition(f".{STATE}")[1]
        }
        self._names = _untied(
            read_json(folder / "config.json"), [name for name in tensors if name not in constants]
        )
        self._states = {name: self._read_state(name) for name in sorted(weights)}

    def names(self) -> list[str]:
        return list(self._names)

    def quantised(self, name: str) -> bool:
        return name in self._states

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._states[name].shape) if self.quantised(name) else self.checkpoint.stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> torch.Tensor:
        if not self.quantised(name):
            return self.checkpoint.read(name).to(torch.bfloat16)
        packed, state = self.fetch(name)
        return _dequantised(packed, state, state.shape, state.absmax, torch.bfloat16)

    def fetch(self, name: str) -> torch.Tensor | tuple[torch.Tensor, QuantState]:
        """The tensor, or packed bytes and constants, with the second level of the absmax undone."""
        packed = self.checkpoint.read(name)
        if not self.quantised(name):
            return packed
        return packed.flatten(), _with_absmax(self._states[name], self.absmax(name))

    def fetched_bytes(self, name: str) -> int:
        stored = self.checkpoint.stored(name).nbytes
        return stored + 8 * stored // self._states[name].blocksize if self.quantised(name) else stored

    def held_bytes(self, name: str) -> int:
        """What is fetched, and the bf16 values beside it."""
        values = torch.Size(self.shape(name)).numel() * torch.bfloat16.itemsize
        in_place = not self.quantised(name) and self.checkpoint.stored(name).dtype == torch.bfloat16
        return values + (0 if in_place else self.fetched_bytes(name))

    def absmax(self, name: str) -> torch.Tensor:
        """(blocks,) fp32: the largest value of each block of a weight."""
        state = self._states[name]
        absmax = self.checkpoint.read(f"{name}.absmax")
        if not state.nested:
            return absmax.float()
        second = _with_absmax(state.state2, self.checkpoint.read(f"{name}.nested_absmax"))
        return dequantize_blockwise(absmax, second).float() + state.offset

    def exact(self, fetched: Any, first: int, end: int) -> torch.Tensor:
        """In fp32: the value of the 4-bit code times its block's absmax, which bitsandbytes rounds when asked for bf16."""
        if isinstance(fetched, torch.Tensor):
            return _exact_rows(fetched, first, end)
        packed, state = fetched
        columns = state.shape[1]
        absmax = state.absmax[first * columns // state.blocksize : -(-end * columns // state.blocksize)]
        shape = torch.Size((end - first, columns))
        return _dequantised(
            packed[first * columns // 2 : end * columns // 2], state, shape, absmax, torch.float32
        )

    def state(self, name: str) -> QuantState:
        """What bitsandbytes notes of a weight, with an empty absmax."""
        return self._states[name]

    def _read_state(self, name: str) -> QuantState:
        """Raises UserError where it is damaged."""
        try:
            constants = self.checkpoint.constants(name)
            empty = {
                key: torch.empty(0)
                for key in ("absmax", "nested_absmax")
                if f"{name}.{key}" in self.checkpoint
            }
            state = QuantState.from_dict(constants | empty, torch.device("cpu"))
            shape, packed = state.shape, self.checkpoint.stored(name)
            if packed.nbytes * 2 != shape.numel() or shape.numel() % state.blocksize:
                raise ValueError(f"{packed.nbytes} bytes for the shape {list(shape)}")
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(
                f"{self.checkpoint.stored(name).file}: the constants of {name} are not readable ({error}), expected "
                f"bitsandbytes' of 4 bits; {PREPARE_AGAIN}"
            ) from None
        return state

    def identity(self) -> list[Any]:
        return _identity(self.checkpoint)


class Merged:
    """A base with the updates of one or several adapters added, in bf16.

    The arithmetic is PEFT's own layer (`lora.Linear.merge`), on some rows of a weight at a time, with adapters in fp32 as
    PEFT loads them. Into a stored bf16 base each adapter's update is added in fp32 and rounded to bf16, which is what
    `merge_and_unload` gives, to the bit. A dequantised base stays in fp32 until all are added and is rounded once.
    PEFT rounds that one twice, as its bf16 base is rounded already: on SmolLM2 its error against the sum in fp32 is 1.21
    times as large (root mean square), and a fifth of the values are others.
    """

    def __init__(self, base: Base, adapters: Sequence[Weighted]):
        if not adapters:
            raise UserError(f"{base.folder}: nothing to merge into it, expected adapters")
        self.base, self.folder = base, base.folder
        shapes = {name: base.shape(name) for name in base.names()}
        self.adapters = [PeftFolder(one, shapes, base.folder) for one in adapters]
        _refuse_overlapping_rows(self.adapters)
        keep_freed_memory()

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self.base.dtype(name)
        return torch.bfloat16 if dtype.is_floating_point else dtype

    def read(self, name: str) -> torch.Tensor:
        updates = [adapters for adapters in self.adapters if name in adapters.linears]
        weight = self._updated(name, updates) if updates else self.base.read(name).to(self.dtype(name))
        for adapters in self.adapters:
            if name in adapters.tokens:
                ids, rows = adapters.rows(name)
                weight.index_copy_(0, ids, rows.to(weight.dtype))
        return weight

    def _updated(self, name: str, adapters: list[PeftFolder]) -> torch.Tensor:
        fetched = self.base.fetch(name)
        rows, columns = self.shape(name)
        in_place = isinstance(fetched, torch.Tensor) and fetched.dtype == torch.bfloat16
        merged = fetched if in_place else torch.empty(rows, columns, dtype=torch.bfloat16)
        matrices = [one.matrices(name) for one in adapters]
        step = max(BLOCK_VALUES // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
        for first in range(0, rows, step):
            end = min(first + step, rows)
            values = self.base.exact(fetched, first, end)
            layer = _layer(values, adapters, [(a, b[first:end]) for a, b in matrices])
            layer.merge(adapter_names=list(layer.lora_A))
            if not in_place:
                merged[first:end] = values
        return merged

    def held_bytes(self, name: str) -> int:
        """What is fetched and the result beside it, which for a bf16 base are one; a bound."""
        fetched = self.base.fetched_bytes(name)
        values = torch.Size(self.shape(name)).numel() * torch.bfloat16.itemsize
        return fetched if fetched == values else fetched + values

    def identity(self) -> list[Any]:
        return [self.base.identity(), *(adapters.identity() for adapters in self.adapters)]


def _layer(
    weight: torch.Tensor, adapters: list[PeftFolder], matrices: list[tuple[torch.Tensor, torch.Tensor]]
) -> Linear:
    """PEFT's layer with these adapters on a linear layer of this weight (out, in), whose memory it shares."""
    with torch.device("meta"):  # nothing is drawn at random for what is put in below
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer = Linear(
            base, "0", adapters[0].config, r=adapters[0].config.r, lora_alpha=adapters[0].config.lora_alpha
        )
        for number, one in enumerate(adapters[1:], 1):
            layer.update_layer(str(number), one.config.r, lora_alpha=one.config.lora_alpha, config=one.config)
    base.weight = nn.Parameter(weight, requires_grad=False)
    for number, (one, (a, b)) in enumerate(zip(adapters, matrices, strict=True)):
        layer.lora_A[str(number)].weight = nn.Parameter(a, requires_grad=False)
        layer.lora_B[str(number)].weight = nn.Parameter(b, requires_grad=False)
        layer.set_scale(str(number), one.weight)
    return layer


@functools.cache
def keep_freed_memory() -> None:
    """Have malloc keep up to 128 MiB of what is freed for what comes next, for the rest of this process.

    By itself it gives each temporary of 4 MiB back to the kernel, which zeroes its pages again for the next one: 1.3 of the
    2.3 seconds of CPU that a 28672x8192 weight took (two slow cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


def _refuse_overlapping_rows(adapters: list[PeftFolder]) -> None:
    """As PEFT does: the rows are replaced, so of two only one could have its way."""
    owners: dict[tuple[str, int], Path] = {}
    for one in adapters:
        for weight, ids in one.tokens.items():
            for row in ids:
                if (weight, row) in owners:
                    raise UserError(
                        f"{one.folder}: has a row {row} of {weight}, and so has {owners[weight, row]}, expected different "
                        "new tokens; merge one of them only"
                    )
                owners[weight, row] = one.folder


def _exact_rows(fetched: torch.Tensor, first: int, end: int) -> torch.Tensor:
    rows = fetched[first:end]
    return rows if rows.dtype == torch.bfloat16 else rows.float()


def _dequantised(
    packed: torch.Tensor, state: QuantState, shape: torch.Size, absmax: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    common = {"blocksize": state.blocksize, "code": state.code, "quant_type": state.quant_type}
    return dequantize_4bit(packed, QuantState(absmax, shape=shape, dtype=dtype, **common))


def _with_absmax(state: QuantState, absmax: torch.Tensor) -> QuantState:
    """The same of one level, with this absmax."""
    return QuantState(
        absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


def values_of(checkpoint: Checkpoint, name: str, first: int, end: int) -> torch.Tensor:
    """Some of a tensor's values, (end - first,), as if it had one dimension."""
    dtype = checkpoint.stored(name).dtype
    raw = torch.empty((end - first) * dtype.itemsize, dtype=torch.uint8)
    checkpoint.read_bytes(name, first * dtype.itemsize, raw)
    return raw.view(dtype)


def _untied(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Without a head that is the embedding once more."""
    tied = bool(config.get("tie_word_embeddings"))
    return [name for name in names if not (tied and name == "lm_head.weight")]


def _check_index(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises UserError where the index names a tensor that is in no file, or in another one."""
    if not (folder / INDEX).exists():
        return
    for name, file in read_json(folder / INDEX)["weight_map"].items():
        found = checkpoint.tensors.get(name)
        if found is None or found.file.name != file:
            raise UserError(
                f"{folder / file}: has no {name}, expected it there by {INDEX}; {checkpoint.remedy}"
            )


def _identity(checkpoint: Checkpoint) -> list[Any]:
    """Names, and the files' sizes and times."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    return [
        list(checkpoint.tensors),
        [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    ]
