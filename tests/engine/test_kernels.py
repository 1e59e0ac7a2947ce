"""The layer's operations in plain torch equal autograd of transformers' own formulas; CPUs run them, kernels copy them."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from recipe.engine import kernels
from recipe.engine.kernels import Dropout, Nested

T, H, R = 37, 64, 12
DROPOUT = Dropout(0.1, (0x9E3779B9, 0x7F4A7C15))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-6 of the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("residual", [None, normal(T, H, seed=3)])
def test_rms_norm(residual):
    norm = LlamaRMSNorm(H, 1e-5)
    norm.weight = nn.Parameter(normal(H, seed=1))
    x, dy = normal(T, H).requires_grad_(), normal(T, H, seed=2)
    y = norm(x)
    (expected,) = torch.autograd.grad(y, x, dy)
    assert_same(kernels.rms_norm(x.detach(), norm.weight.detach(), 1e-5), y)
    actual = kernels.rms_norm_backward(dy, x.detach(), norm.weight.detach(), 1e-5, residual)
    assert actual is dy
    assert_same(actual, expected if residual is None else expected + residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_transformers(dtype):
    norm = LlamaRMSNorm(H, 1e-5).to(dtype)
    norm.weight = nn.Parameter(normal(H, seed=1, dtype=dtype))
    x = normal(T, H, dtype=dtype)
    assert torch.equal(kernels.rms_norm(x, norm.weight.detach(), 1e-5), norm(x))


def test_rope():
    x, dy = normal(1, 4, T, 16).requires_grad_(), normal(1, 4, T, 16, seed=1)
    angles = torch.arange(T)[:, None] * 0.5 ** torch.arange(8)
    cos, sin = (torch.cat([f(angles), f(angles)], -1) for f in (torch.cos, torch.sin))
    y = apply_rotary_pos_emb(x, x, cos[None], sin[None])[0]
    (expected,) = torch.autograd.grad(y, x, dy)
    rotated = x.detach().clone()
    assert kernels.rope_(rotated[0].transpose(0, 1), cos, sin).data_ptr() == rotated.data_ptr()
    assert_same(rotated, y)
    kernels.rope_(dy[0].transpose(0, 1), cos, sin, inverse=True)
    assert_same(dy, expected)


@pytest.mark.parametrize("dropout", [None, DROPOUT])
def test_lora(dropout):
    x, a, b = normal(T, H).requires_grad_(), normal(R, H, seed=1).requires_grad_(), normal(T, R, seed=2)
    dropped = x
    if dropout is not None:
        dropped = x * kernels.dropout_mask(T, H, dropout, 5, "cpu") / (1 - dropout.probability)
    xa = dropped @ a.T
    dx, da = torch.autograd.grad(xa, (x, a), b)
    x, a = x.detach(), a.detach()
    assert_same(kernels.lora_down(x, a, dropout, 5), xa)
    assert_same(kernels.lora_down_grad(b, x, dropout, 5), da)
    other = normal(T, H, seed=3)
    assert_same(kernels.lora_down_input_grad_(other.clone(), b, a, dropout, 5), other + dx)


@pytest.mark.parametrize("lora", [False, True])
def test_swiglu(lora):
    gate, up, dh = (normal(T, H, seed=seed) for seed in range(3))
    loras = [(normal(T, R, seed=seed), normal(H, R, seed=seed + 1)) if lora else None for seed in (3, 5)]
    g, u = (
        (m + pair[0] @ pair[1].T if pair else m).requires_grad_()
        for m, pair in zip((gate, up), loras, strict=True)
    )
    h = ACT2FN["silu"](g) * u
    d_gate, d_up = torch.autograd.grad(h, (g, u), dh)
    gate, up = gate.detach(), up.detach()
    assert_same(kernels.swiglu(gate, up, *loras), h)
    for out in (0, 1):
        inputs = [gate.clone(), up.clone()]
        assert_same(kernels.swiglu(*inputs, *loras, out=inputs[out]), h)
        assert_same(inputs[out], h)
    inputs = [dh.clone(), gate.clone(), up.clone()]
    actual = kernels.swiglu_backward_(*inputs, *loras)
    assert [id(t) for t in actual] == [id(inputs[1]), id(inputs[2]), id(inputs[0])]
    for result, expected in zip(actual, (d_gate, d_up, h), strict=True):
        assert_same(result, expected)


def test_half_precision_is_rounded_once():
    """In bf16 each result is that of fp32, rounded."""
    x, a, b = (
        normal(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(T, H), (R, H), (T, R)])
    )
    wide = x.float(), a.float(), b.float()
    assert torch.equal(kernels.lora_down(x, a, DROPOUT), kernels.lora_down(*wide[:2], DROPOUT).bfloat16())
    assert torch.equal(
        kernels.lora_down_grad(b, x, DROPOUT), kernels.lora_down_grad(wide[2], wide[0], DROPOUT)
    )
    assert torch.equal(kernels.swiglu(x, x, out=x.clone()), kernels.swiglu(wide[0], wide[0]).bfloat16())
    for narrow, result in zip(
        kernels.swiglu_backward_(x.clone(), x.clone(), x.clone()),
        kernels.swiglu_backward_(wide[0].clone(), wide[0].clone(), wide[0].clone()),
        strict=True,
    ):
        assert torch.equal(narrow, result.bfloat16())


# ---- dropout


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("row0", [0, 2**26 - 2])
def test_mask_is_the_documented_hash(row0):
    """Recomputed with Python's integers, across the wrap of the element's number at 2**32."""
    rows, cols, key = 4, 64, DROPOUT.key
    expected = [
        lowbias32((lowbias32((((row0 + row) * cols + col) % 2**32) ^ key[0]) + key[1]) % 2**32)
        >= round(0.1 * 2**32)
        for row in range(rows)
        for col in range(cols)
    ]
    assert kernels.dropout_mask(rows, cols, DROPOUT, row0, "cpu").flatten().tolist() == expected


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.9])
def test_mask_rate(probability):
    """As often as asked, in every row and column, and under each key differently: within 5 standard deviations."""
    masks = [
        kernels.dropout_mask(1024, 1024, Dropout(probability, key), 0, "cpu").float()
        for key in [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**31)]
    ]
    variance = probability * (1 - probability)
    for mask in masks:
        assert (mask.mean() - (1 - probability)).abs() <= 5 * (variance / 2**20) ** 0.5
        for dim in (0, 1):
            assert (mask.mean(dim) - (1 - probability)).abs().max() <= 5 * (variance / 2**10) ** 0.5
    for one, other in [(0, 1), (0, 2), (1, 3)]:
        both = (masks[one] * masks[other]).mean()
        assert (both - (1 - probability) ** 2).abs() <= 5 * (variance / 2**20) ** 0.5


def test_chunks_of_tokens_drop_the_same_elements():
    x, a, dxa = normal(T, H), normal(R, H, seed=1), normal(T, R, seed=2)
    whole = kernels.dropout_mask(T, H, DROPOUT, 1000, "cpu")
    chunks = [(0, 10), (10, 11), (11, T)]
    parts = [kernels.dropout_mask(end - start, H, DROPOUT, 1000 + start, "cpu") for start, end in chunks]
    assert torch.equal(torch.cat(parts), whole)

    down = torch.cat([kernels.lora_down(x[s:e], a, DROPOUT, 1000 + s) for s, e in chunks])
    assert_same(down, kernels.lora_down(x, a, DROPOUT, 1000))
    grad = sum(kernels.lora_down_grad(dxa[s:e], x[s:e], DROPOUT, 1000 + s) for s, e in chunks)
    assert_same(grad, kernels.lora_down_grad(dxa, x, DROPOUT, 1000))
    dx = torch.zeros(T, H)
    for s, e in chunks:
        kernels.lora_down_input_grad_(dx[s:e], dxa[s:e], a, DROPOUT, 1000 + s)
    assert_same(dx, kernels.lora_down_input_grad_(torch.zeros(T, H), dxa, a, DROPOUT, 1000))


# ---- NF4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_equals_bitsandbytes(nested, dtype):
    """For every byte of the weights, and for every byte of the absmax."""
    packed, state = quantize_4bit(
        normal(512, 2 * 64, dtype=dtype), quant_type="nf4", compress_statistics=nested
    )
    packed.copy_(torch.arange(packed.numel()).view_as(packed) % 256)
    constants = None
    if nested:
        state.absmax.copy_(torch.arange(state.absmax.numel()) % 256)
        constants = Nested(state.state2.absmax, state.state2.code, state.offset.item())
    out = torch.empty(512, 2 * 64, dtype=dtype)
    assert kernels.dequantize_nf4(packed.view(-1), state.absmax, constants, out) is out
    assert torch.equal(out, dequantize_4bit(packed, state))
