"""The memory-bound operations of a decoder layer in plain torch: what CPUs run, and what the kernels must equal.

T is tokens, H hidden, I intermediate, R the rank of one adapter or of several stacked. Arithmetic is in fp32 and
rounded once, at the end. Nothing here is seen by autograd: the caller is an autograd function.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor

LowRank = tuple[Tensor, Tensor]  # (xa (T,R), b (I,R)): stands for xa @ b.T

NF4_BLOCK = 64  # values that share one absmax
NESTED_BLOCK = 256  # absmax that share one nested absmax


@dataclass(frozen=True)
class Dropout:
    """Drops each element with `probability`; `key`, two 32-bit numbers, says which."""

    probability: float
    key: tuple[int, int]

    @property
    def threshold(self) -> int:
        """An element stays if its hash, 32 bits, is not below this."""
        return round(self.probability * 2**32)


class Nested(NamedTuple):
    """What absmax bytes stand for: code[byte] * absmax[index // 256] + offset."""

    absmax: Tensor  # (ceil(n/64/256),) float32
    code: Tensor  # (256,) float32
    offset: float


@lru_cache(maxsize=2)  # a layer's backward asks for each of its masks three times in a row
def dropout_mask(rows: int, cols: int, dropout: Dropout, row0: int, device: torch.device | str) -> Tensor:
    """True where an element stays: (rows, cols) of the matrix whose row `row0` is the first one here. Read only."""
    hashes = _hashes(rows, cols, dropout.key, row0, device)
    # Both shifted by 2**31: signed numbers then compare as the unsigned ones that they stand for.
    return (hashes ^ -(2**31)) >= dropout.threshold - 2**31


def _hashes(rows: int, cols: int, key: tuple[int, int], row0: int, device: torch.device | str) -> Tensor:
    """32-bit hashes as int32, whose sums and products wrap as unsigned ones do."""
    x = torch.arange(rows * cols, dtype=torch.int32, device=device)
    x = _mix_(x.add_(_signed(row0 * cols)).bitwise_xor_(_signed(key[0])))
    return _mix_(x.add_(_signed(key[1]))).view(rows, cols)


def _mix_(x: Tensor) -> Tensor:
    """The hash `lowbias32`, in place. A shift of int32 carries the sign down, which the masks take away."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(value: int) -> int:
    """The int32 with the low 32 bits of `value`."""
    return (value & 0xFFFFFFFF ^ 2**31) - 2**31


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """transformers' LlamaRMSNorm: (T,H) -> (T,H), rounded to x.dtype before the weight as it does."""
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _into(out, (normalised.float() * weight.float()).to(x.dtype))


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """dy becomes the gradient of x, plus `residual`: all (T,H)."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normalised, scaled = wide * scale, dy.float() * weight.float()
    dx = scale * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    return dy.copy_(dx if residual is None else dx + residual.float())


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (T,heads,head_dim) in place by cos, sin (T,head_dim), or back: transformers' rotate_half."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    if inverse:
        s = -s
    return x.copy_(torch.cat([first * c - second * s, second * c + first * s], -1))


def lora_down(x: Tensor, a: Tensor, dropout: Dropout | None = None, row0: int = 0) -> Tensor:
    """drop(x) @ a.T: x (T,in), a (R,in) -> (T,R) in x.dtype."""
    if dropout is None:
        return x @ a.T
    return (_dropped(x, dropout, row0) @ a.float().T / (1 - dropout.probability)).to(x.dtype)


def lora_down_grad(dxa: Tensor, x: Tensor, dropout: Dropout | None = None, row0: int = 0) -> Tensor:
    """The gradient of a: dxa.T @ drop(x), dxa (T,R), x (T,in) -> (R,in) in fp32."""
    if dropout is None:
        return dxa.float().T @ x.float()
    return dxa.float().T @ _dropped(x, dropout, row0) / (1 - dropout.probability)


def lora_down_input_grad_(
    dx: Tensor, dxa: Tensor, a: Tensor, dropout: Dropout | None = None, row0: int = 0
) -> Tensor:
    """dx (T,in) += drop(dxa @ a): dxa (T,R), a (R,in)."""
    if dropout is None:
        return dx.addmm_(dxa, a)
    added = _dropped(dxa.float() @ a.float(), dropout, row0) / (1 - dropout.probability)
    return dx.copy_(dx.float() + added)


def _dropped(x: Tensor, dropout: Dropout, row0: int) -> Tensor:
    """x in fp32, zero where dropped; not yet divided by the share that stays."""
    rows, cols = x.shape
    return torch.where(dropout_mask(rows, cols, dropout, row0, x.device), x.float(), 0.0)


def swiglu(
    gate: Tensor,
    up: Tensor,
    gate_lora: LowRank | None = None,
    up_lora: LowRank | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up: (T,I) each. With a LoRA (xa, b), gate or up stands for itself + xa @ b.T. out may be either."""
    g, u = _plus(gate, gate_lora), _plus(up, up_lora)
    return _into(out, (g * torch.sigmoid(g) * u).to(gate.dtype))


def swiglu_backward_(
    dh: Tensor, gate: Tensor, up: Tensor, gate_lora: LowRank | None = None, up_lora: LowRank | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """In place, (T,I) each: gate becomes d_gate, up d_up and dh swiglu's own result h; returned in this order."""
    g, u, d = _plus(gate, gate_lora), _plus(up, up_lora), dh.float()
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    # All three before any is stored: in fp32, g, u and d may be the very matrices.
    d_gate, d_up, h = d * u * (sigmoid * (1 + g * (1 - sigmoid))), d * silu, silu * u
    return gate.copy_(d_gate), up.copy_(d_up), dh.copy_(h)


def _plus(matrix: Tensor, lora: LowRank | None) -> Tensor:
    wide = matrix.float()
    return wide if lora is None else wide + lora[0].float() @ lora[1].float().T


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def dequantize_nf4(packed: Tensor, absmax: Tensor, nested: Nested | None, out: Tensor) -> Tensor:
    """NF4 bytes (n/2,) with one absmax per 64 values -> out (rows,cols), contiguous; by bitsandbytes itself."""
    state = QuantState(absmax, out.shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=out.dtype)
    if nested is not None:
        state.nested, state.offset = True, torch.tensor(nested.offset, device=absmax.device)
        state.state2 = QuantState(
            nested.absmax, code=nested.code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    return out.copy_(dequantize_4bit(packed.view(-1, 1), state))


@cache
def nf4_table(device: torch.device) -> Tensor:
    """The 16 values of NF4, float32."""
    return get_4bit_type("nf4", device=device)
