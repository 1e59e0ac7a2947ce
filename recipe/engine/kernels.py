"""The memory-bound operations of a decoder layer with LoRA: Triton kernels for CUDA, plain torch for the rest.

Each function does what its namesake in recipe/engine/reference.py does and reads its large matrices once. T is tokens,
H hidden, I intermediate, R the rank of one adapter or of several stacked. Matrices may be views with long rows (last
stride 1); those of one call share a dtype. Nothing is compiled again when T changes; the same call gives the same bits.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from recipe.engine import reference
from recipe.engine.reference import Dropout, LowRank, Nested
from recipe.engine.reference import dropout_mask as dropout_mask  # for the callers of this file

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU build comes without
    triton = None
    tl = SimpleNamespace(constexpr=int)


def use_triton(x: Tensor) -> bool:
    """Whether x goes through a Triton kernel."""
    return x.is_cuda and triton is not None


def _jit(kernel):
    """triton.jit that compiles one variant whatever these arguments are: they change from call to call."""
    if triton is None:
        return kernel
    varying = ["tokens", "rows_per_part", "row0", "key0", "key1", "threshold"]
    return triton.jit(kernel, do_not_specialize=varying)


# ---- norm and rotary embedding


@_jit
def _rms_norm_kernel(x, weight, out, x_stride, out_stride, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    values = tl.load(x + row * x_stride + cols, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    normalised = (wide * scale).to(values.dtype).to(tl.float32)
    result = normalised * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + cols, result, mask=inside)


@_jit
def _rms_norm_backward_kernel(
    dy, x, weight, residual, dy_stride, x_stride, residual_stride, hidden, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    wide = tl.load(x + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(dy + row * dy_stride + cols, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    normalised = wide * scale
    dx = scale * (scaled - normalised * (tl.sum(scaled * normalised, 0) / hidden))
    if ADD:
        dx += tl.load(residual + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(dy + row * dy_stride + cols, dx, mask=inside)


@_jit
def _rope_kernel(
    x, cos, sin, token_stride, head_stride, cos_stride, sin_stride, heads, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (cols < half)[None, :]
    first_at = x + token * token_stride + head.to(tl.int64)[:, None] * head_stride + cols[None, :]
    first = tl.load(first_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(first_at + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * cos_stride + cols, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + cols, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    tl.store(first_at, first * c - second * s, mask=inside)
    tl.store(first_at + half, second * c + first * s, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """transformers' LlamaRMSNorm: x (T,H), weight (H,) -> (T,H)."""
    if not use_triton(x):
        return reference.rms_norm(x, weight, eps, out)
    out = torch.empty_like(x) if out is None else out
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(tokens,)](
        x, weight, out, x.stride(0), out.stride(0), hidden, eps, BLOCK=block, num_warps=_row_warps(block)
    )  # fmt: skip
    return out


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """dy becomes the gradient with respect to x, plus `residual`: all (T,H)."""
    if not use_triton(x):
        return reference.rms_norm_backward(dy, x, weight, eps, residual)
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    added = dy if residual is None else residual
    _rms_norm_backward_kernel[(tokens,)](
        dy, x, weight, added, dy.stride(0), x.stride(0), added.stride(0), hidden, eps,
        ADD=residual is not None, BLOCK=block, num_warps=_row_warps(block),
    )  # fmt: skip
    return dy


def _row_warps(block: int) -> int:
    return min(max(block // 1024, 1), 16)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x (T,heads,head_dim) in place by cos, sin (T,head_dim) of two equal halves; `inverse` rotates back."""
    if not use_triton(x):
        return reference.rope_(x, cos, sin, inverse)
    tokens, heads, head_dim = x.shape
    block = min(triton.next_power_of_2(heads), 16)
    _rope_kernel[(tokens, triton.cdiv(heads, block))](
        x, cos, sin, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), heads, head_dim // 2,
        INVERSE=inverse, HEADS=block, HALF=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return x


# ---- LoRA: the thin products, with dropout's mask made on the way


@_jit
def _keep(rows, start, width, row0, key0, key1, threshold, COLS: tl.constexpr, GROUP: tl.constexpr):
    """dropout_mask's tile of COLS columns from `start`, bit for bit, in fewer steps: arithmetic is what it costs."""
    key0, threshold = key0.to(tl.uint32), threshold.to(tl.uint32)
    cols = tl.arange(0, COLS)
    base = ((row0 + rows).to(tl.uint32) * width.to(tl.uint32))[:, None]
    # GROUP neighbours differ in their last bits only, so that the first step is done once for all of them.
    x = base + (start + cols // GROUP * GROUP).to(tl.uint32)[None, :]
    x = x ^ (x >> 16) ^ (key0 ^ (key0 >> 16)) ^ (cols % GROUP).to(tl.uint32)[None, :]
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    x += key1.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    # x ^ (x >> 16) >= threshold: the lower half counts only where the upper halves are equal, that is interchangeable.
    return (x ^ (threshold >> 16)) >= threshold


@_jit
def _lora_down_kernel(
    x, a, out, tokens, width, x_stride, a_stride, row0, key0, key1, threshold, scale, cols_per_part,
    RANK: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    a_rows = a + ranks.to(tl.int64)[:, None] * a_stride
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(part * cols_per_part, tl.minimum((part + 1) * cols_per_part, width), BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        inside = (cols < width)[None, :]
        values = tl.load(x_rows + cols[None, :], mask=(rows < tokens)[:, None] & inside, other=0.0)
        values = tl.where(_keep(rows, start, width, row0, key0, key1, threshold, BLOCK_C, GROUP), values, 0.0)
        weights = tl.load(a_rows + cols[None, :], mask=(ranks < RANK)[:, None] & inside, other=0.0)
        total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    at = (part.to(tl.int64) * tokens + rows)[:, None] * RANK + ranks[None, :]
    tl.store(out + at, total * scale, mask=(rows < tokens)[:, None] & (ranks < RANK)[None, :])


@_jit
def _lora_down_grad_kernel(
    dxa, x, out, tokens, width, dxa_stride, x_stride, row0, key0, key1, threshold, scale, rows_per_part,
    DROP: tl.constexpr,
    RANK: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_C
    cols = first + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, tokens), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        far, inside = rows.to(tl.int64)[:, None], (rows < tokens)[:, None]
        values = tl.load(x + far * x_stride + cols[None, :], mask=inside & (cols < width)[None, :], other=0.0)
        if DROP:
            values = tl.where(
                _keep(rows, first, width, row0, key0, key1, threshold, BLOCK_C, GROUP), values, 0.0
            )
        thin = tl.load(
            dxa + far * dxa_stride + ranks[None, :], mask=inside & (ranks < RANK)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(thin), values, total, input_precision="ieee")
    at = (part * RANK + ranks).to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out + at, total * scale, mask=(ranks < RANK)[:, None] & (cols < width)[None, :])


@_jit
def _lora_down_input_grad_kernel(
    dx, dxa, a, tokens, width, dx_stride, dxa_stride, a_stride, row0, key0, key1, threshold, scale,
    RANK: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * BLOCK_C
    cols = first + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    far, inside = rows.to(tl.int64)[:, None], (rows < tokens)[:, None]
    thin = tl.load(dxa + far * dxa_stride + ranks[None, :], mask=inside & (ranks < RANK)[None, :], other=0.0)
    weights = tl.load(
        a + ranks.to(tl.int64)[:, None] * a_stride + cols[None, :],
        mask=(ranks < RANK)[:, None] & (cols < width)[None, :],
        other=0.0,
    )
    added = tl.dot(thin, weights, input_precision="ieee") * scale
    added = tl.where(_keep(rows, first, width, row0, key0, key1, threshold, BLOCK_C, GROUP), added, 0.0)
    at, inside = dx + far * dx_stride + cols[None, :], inside & (cols < width)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


def lora_down(x: Tensor, a: Tensor, dropout: Dropout | None = None, row0: int = 0) -> Tensor:
    """drop(x) @ a.T: x (T,in), a (R,in) -> (T,R) in x.dtype; x's first row is row `row0` of dropout's mask."""
    if dropout is None or not use_triton(x):
        return reference.lora_down(x, a, dropout, row0)
    (tokens, width), rank = x.shape, a.shape[0]
    block_r = _rank_block(rank)
    block_t, block_c = 64, 64 if x.itemsize == 2 else 32
    # A row block alone does not fill the GPU: it is cut into parts, the same ones for every T.
    parts = min(triton.cdiv(width, 2048), 8)
    cols_per_part = triton.cdiv(triton.cdiv(width, parts), block_c) * block_c
    out = x.new_empty(parts, tokens, rank, dtype=x.dtype if parts == 1 else torch.float32)
    _lora_down_kernel[(triton.cdiv(tokens, block_t), parts)](
        x, a, out, tokens, width, x.stride(0), a.stride(0), *_drop_arguments(dropout, row0), cols_per_part,
        RANK=rank, GROUP=_group(width), BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=4 if block_r <= 64 else 8, num_stages=3 if block_r <= 64 else 2,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


def lora_down_grad(dxa: Tensor, x: Tensor, dropout: Dropout | None = None, row0: int = 0) -> Tensor:
    """The gradient of a: dxa.T @ drop(x), dxa (T,R), x (T,in) -> (R,in) in fp32."""
    if not use_triton(x):
        return reference.lora_down_grad(dxa, x, dropout, row0)
    (tokens, width), rank = x.shape, dxa.shape[1]
    block_r = _rank_block(rank)
    block_t, block_c = (64, 128 if block_r <= 64 else 64) if x.itemsize == 2 else (32, 32)
    parts = 8 if width < 16384 else 4
    rows_per_part = triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t
    out = x.new_empty(parts, rank, width, dtype=torch.float32)
    _lora_down_grad_kernel[(triton.cdiv(width, block_c), parts)](
        dxa, x, out, tokens, width, dxa.stride(0), x.stride(0), *_drop_arguments(dropout, row0), rows_per_part,
        DROP=dropout is not None, RANK=rank, GROUP=_group(width), BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=4 if block_r <= 64 else 8, num_stages=3 if block_r <= 64 else 2,
    )  # fmt: skip
    return out.sum(0)


def lora_down_input_grad_(
    dx: Tensor, dxa: Tensor, a: Tensor, dropout: Dropout | None = None, row0: int = 0
) -> Tensor:
    """dx (T,in) += drop(dxa @ a): dxa (T,R), a (R,in)."""
    if dropout is None or not use_triton(dx):
        return reference.lora_down_input_grad_(dx, dxa, a, dropout, row0)
    (tokens, width), rank = dx.shape, dxa.shape[1]
    block_r = _rank_block(rank)
    block_t, block_c = 64, (128 if block_r <= 64 else 64) if dx.itemsize == 2 else 32
    _lora_down_input_grad_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_c))](
        dx, dxa, a, tokens, width, dx.stride(0), dxa.stride(0), a.stride(0), *_drop_arguments(dropout, row0),
        RANK=rank, GROUP=_group(width), BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip
    return dx


def _rank_block(rank: int) -> int:
    return max(triton.next_power_of_2(rank), 16)  # tensor cores take no fewer


def _group(width: int) -> int:
    return 8 if width % 8 == 0 else 1


def _drop_arguments(dropout: Dropout | None, row0: int) -> tuple[int, int, int, int, float]:
    """row0, key0, key1, threshold, scale; as signed 32-bit numbers, so that Triton sees one type whatever they are."""
    if dropout is None:
        return row0, 0, 0, 0, 1.0
    words = (row0, *dropout.key, dropout.threshold)
    signed = [(word + 2**31) % 2**32 - 2**31 for word in words]
    return signed[0], signed[1], signed[2], signed[3], 1 / (1 - dropout.probability)


# ---- the MLP's product, with both LoRAs added on the way


@_jit
def _plus(
    matrix, xa, b, matrix_stride, xa_stride, b_stride, rows, cols, inside_rows, inside_cols,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The tile of matrix + xa @ b.T, in fp32; of the matrix alone if RANK is 0."""
    inside = inside_rows[:, None] & inside_cols[None, :]
    far = rows.to(tl.int64)[:, None]
    values = tl.load(matrix + far * matrix_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        inside = inside_rows[:, None] & (ranks < RANK)[None, :]
        left = tl.load(xa + far * xa_stride + ranks[None, :], mask=inside, other=0.0)
        inside = inside_cols[:, None] & (ranks < RANK)[None, :]
        right = tl.load(b + cols.to(tl.int64)[:, None] * b_stride + ranks[None, :], mask=inside, other=0.0)
        values += tl.dot(left, tl.trans(right), input_precision="ieee")
    return values


@_jit
def _swiglu_kernel(
    gate, up, gate_xa, gate_b, up_xa, up_b, out, tokens, width,
    gate_stride, up_stride, gate_xa_stride, gate_b_stride, up_xa_stride, up_b_stride, out_stride,
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: out = silu(gate) * up. Backward: `out` holds its gradient, and all three are overwritten."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_rows, inside_cols = rows < tokens, cols < width
    g = _plus(
        gate, gate_xa, gate_b, gate_stride, gate_xa_stride, gate_b_stride,
        rows, cols, inside_rows, inside_cols, GATE_RANK, BLOCK_R,
    )  # fmt: skip
    u = _plus(
        up, up_xa, up_b, up_stride, up_xa_stride, up_b_stride,
        rows, cols, inside_rows, inside_cols, UP_RANK, BLOCK_R,
    )  # fmt: skip
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    inside = inside_rows[:, None] & inside_cols[None, :]
    far = rows.to(tl.int64)[:, None]
    out_at = out + far * out_stride + cols[None, :]
    if BACKWARD:
        d = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        d_gate = d * u * (sigmoid * (1 + g * (1 - sigmoid)))
        tl.store(gate + far * gate_stride + cols[None, :], d_gate, mask=inside)
        tl.store(up + far * up_stride + cols[None, :], d * silu, mask=inside)
    tl.store(out_at, silu * u, mask=inside)


def swiglu(
    gate: Tensor,
    up: Tensor,
    gate_lora: LowRank | None = None,
    up_lora: LowRank | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up: (T,I) each. With a LoRA (xa (T,R), b (I,R)), gate or up means itself + xa @ b.T.

    `out` may be gate or up.
    """
    if not use_triton(gate):
        return reference.swiglu(gate, up, gate_lora, up_lora, out)
    out = torch.empty_like(gate) if out is None else out
    _launch_swiglu(gate, up, gate_lora, up_lora, out, backward=False)
    return out


def swiglu_backward_(
    dh: Tensor, gate: Tensor, up: Tensor, gate_lora: LowRank | None = None, up_lora: LowRank | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """In place, (T,I) each: gate becomes d_gate, up d_up and dh swiglu's own result h; returned in this order."""
    if not use_triton(gate):
        return reference.swiglu_backward_(dh, gate, up, gate_lora, up_lora)
    _launch_swiglu(gate, up, gate_lora, up_lora, dh, backward=True)
    return gate, up, dh


def _launch_swiglu(
    gate: Tensor, up: Tensor, gate_lora: LowRank | None, up_lora: LowRank | None, out: Tensor, backward: bool
) -> None:
    tokens, width = gate.shape
    gate_xa, gate_b = gate_lora or (gate, gate)  # unused if there is none
    up_xa, up_b = up_lora or (up, up)
    gate_rank, up_rank = gate_b.shape[1] if gate_lora else 0, up_b.shape[1] if up_lora else 0
    block_t, block_c = 32, 128 if gate.itemsize == 2 else 32
    _swiglu_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_c))](
        gate, up, gate_xa, gate_b, up_xa, up_b, out, tokens, width,
        gate.stride(0), up.stride(0), gate_xa.stride(0), gate_b.stride(0), up_xa.stride(0), up_b.stride(0),
        out.stride(0), GATE_RANK=gate_rank, UP_RANK=up_rank, BLOCK_R=_rank_block(max(gate_rank, up_rank)),
        BLOCK_T=block_t, BLOCK_C=block_c, BACKWARD=backward, num_warps=8 if backward else 4,
    )  # fmt: skip


# ---- NF4


@_jit
def _dequantize_nf4_kernel(
    packed, absmax, nested_absmax, nested_code, table, out, offset, blocks, pairs,
    NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(absmax + block, mask=block < blocks, other=0)
    if NESTED:
        coarse = tl.load(nested_absmax + block // 256, mask=block < blocks, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * coarse + offset
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + at, mask=at < pairs, other=0).to(tl.int32)
    high = tl.load(table + (pair >> 4)) * scale[:, None]
    low = tl.load(table + (pair & 15)) * scale[:, None]
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, tl.interleave(high, low), mask=at < 2 * pairs)


def dequantize_nf4(packed: Tensor, absmax: Tensor, nested: Nested | None, out: Tensor) -> Tensor:
    """NF4 bytes (n/2,) with one absmax per 64 values -> out (rows,cols), contiguous; bitsandbytes' very bits."""
    if not use_triton(packed):
        return reference.dequantize_nf4(packed, absmax, nested, out)
    blocks = triton.cdiv(out.numel(), reference.NF4_BLOCK)
    coarse, code, offset = nested or Nested(absmax, absmax, 0.0)  # unused if there is none
    blocks_per_program = 64
    _dequantize_nf4_kernel[(triton.cdiv(blocks, blocks_per_program),)](
        packed, absmax, coarse, code, reference.nf4_table(out.device), out, offset, blocks, out.numel() // 2,
        NESTED=nested is not None, BLOCKS=blocks_per_program, num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds between the product and the offset
    )  # fmt: skip
    return out
