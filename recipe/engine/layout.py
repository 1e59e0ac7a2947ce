"""How the frozen bytes of one decoder layer lie in memory: one flat run of bytes, cut into equal slices for the ranks.

    | q packed | q absmax | q nested absmax | k packed | ... | down nested absmax | padding |
    |------------- rank 0 -------------|------------- rank 1 -------------|

The packed NF4 bytes and their absmax constants are sharded alike. Bytes are never cast, so no bit pattern is lost,
whatever dtype a checkpoint stores them in; and a gathered layer needs no copy: its tensors are views of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipe.engine.kernels import Nested
from recipe.plan.shapes import ModelShape

BLOCK = 64  # weights per absmax constant
NESTED_BLOCK = 256  # absmax constants per fp32 constant under double quantisation
ALIGNMENT = 256  # bytes
MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class Piece:
    """One stored tensor in the run; `key` is its name in the checkpoint behind `model.layers.N.`."""

    key: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Weight:
    """One NF4 matrix (out, in) as bitsandbytes stores it: views of a gathered layer, and its small constants."""

    shape: tuple[int, int]
    packed: torch.Tensor
    absmax: torch.Tensor
    nested: Nested | None


@dataclass(frozen=True)
class Layout:
    """The run of bytes of one decoder layer; `size` is a multiple of the number of ranks."""

    linears: dict[str, tuple[int, int]]
    pieces: dict[str, Piece]
    size: int
    world: int
    nested: bool

    @classmethod
    def of(cls, shape: ModelShape, world: int, nested: bool) -> Layout:
        """nested: whether the absmax constants are quantised themselves (uint8 instead of fp32)."""
        pieces: dict[str, Piece] = {}
        offset = 0

        def add(key: str, size: int) -> None:
            nonlocal offset
            pieces[key] = Piece(key, offset, size)
            offset += -(-size // ALIGNMENT) * ALIGNMENT

        for name, (outputs, inputs) in shape.linears.items():
            blocks = outputs * inputs // BLOCK
            add(f"{MODULES[name]}.weight", outputs * inputs // 2)
            add(f"{MODULES[name]}.weight.absmax", blocks if nested else blocks * 4)
            if nested:
                add(f"{MODULES[name]}.weight.nested_absmax", -(-blocks // NESTED_BLOCK) * 4)
        unit = ALIGNMENT * world
        return cls(dict(shape.linears), pieces, -(-offset // unit) * unit, world, nested)

    @property
    def slice_bytes(self) -> int:
        """Bytes that each rank holds of a layer."""
        return self.size // self.world

    def of_rank(self, rank: int) -> list[tuple[Piece, int, int, int]]:
        """(piece, first byte within it, last byte within it, place in the slice) of what this rank holds."""
        low, high = rank * self.slice_bytes, (rank + 1) * self.slice_bytes
        held = []
        for piece in self.pieces.values():
            start, end = max(piece.start, low), min(piece.end, high)
            if start < end:
                held.append((piece, start - piece.start, end - piece.start, start - low))
        return held

    def weight(self, run: torch.Tensor, name: str, constants: Constants) -> Weight:
        """The matrix `name` of a whole layer `run` (size,) uint8."""
        packed, absmax = (self._view(run, f"{MODULES[name]}.weight{key}") for key in ("", ".absmax"))
        if not self.nested:
            return Weight(self.linears[name], packed, absmax.view(torch.float32), None)
        nested_absmax = self._view(run, f"{MODULES[name]}.weight.nested_absmax").view(torch.float32)
        assert constants.code is not None
        return Weight(
            self.linears[name], packed, absmax, Nested(nested_absmax, constants.code, constants.offset)
        )

    def _view(self, run: torch.Tensor, key: str) -> torch.Tensor:
        piece = self.pieces[key]
        return run[piece.start : piece.end]


@dataclass(frozen=True)
class Constants:
    """The small constants of one matrix, whole on every rank: code (256,) fp32 on the device, offset of absmax."""

    code: torch.Tensor | None = None
    offset: float = 0.0
