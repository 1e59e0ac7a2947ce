"""The Triton kernels do what recipe/engine/reference.py does, on the GPU.

make test ARGS="-m gpu tests/engine/test_kernels_gpu.py"      # every kernel, small and at a 70B model's sizes

Without a GPU, tests/engine/test_kernels_interpreted.py runs the small sizes through Triton's interpreter.
"""

import os

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from recipe.engine import kernels, reference
from recipe.engine.kernels import Dropout, Nested

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu

# The interpreter multiplies the bits of bf16 numbers, as if they were integers.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
TRUE_DTYPES = [torch.bfloat16, torch.float16]
DROPOUT = Dropout(0.05, (0x9E3779B9, 0x7F4A7C15))
true_size = pytest.mark.gpu  # the interpreter would take hours


@pytest.fixture(autouse=True)
def everything_through_triton(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, "use_triton", lambda x: True)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, pad: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Random numbers; with `pad`, a view whose rows are longer than it."""
    torch.manual_seed(seed)
    whole = torch.randn(*shape[:-1], shape[-1] + pad, device=DEVICE) * scale
    return whole.to(dtype)[..., : shape[-1]]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, roundings: int = 1, lost: float = 1e-5) -> None:
    """Equal but for the last bit, or, where terms cancel, for the part of a typical element that fp32 has lost."""
    last_bit = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-18}[
        expected.dtype
    ] * roundings
    typical = expected.float().pow(2).mean().sqrt().item()
    torch.testing.assert_close(actual, expected, rtol=last_bit, atol=lost * typical + 1e-7)


def assert_padding_untouched(view: torch.Tensor, before: torch.Tensor) -> None:
    """What lies between the rows of an in-place result is as it was."""
    base, was = view._base, before._base
    assert base is not None and was is not None
    torch.testing.assert_close(base[..., view.shape[-1] :], was[..., view.shape[-1] :], rtol=0, atol=0)


def copy(view: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return view._base.clone()[..., : view.shape[-1]] if view._base is not None else view.clone()


# ---- each kernel against the reference


def check_rms_norm(tokens: int, hidden: int, dtype: torch.dtype, pad: int) -> None:
    x, weight = normal(tokens, hidden, dtype=dtype, pad=pad), normal(hidden, dtype=dtype, seed=1)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_same(kernels.rms_norm(x, weight, 1e-5), expected, roundings=2)
    out = normal(tokens, hidden, dtype=dtype, pad=2 * pad)
    assert kernels.rms_norm(x, weight, 1e-5, out=out) is out
    assert_same(out, expected, roundings=2)
    for residual in (None, normal(tokens, hidden, dtype=dtype, seed=2, pad=3 * pad)):
        dy = normal(tokens, hidden, dtype=dtype, seed=3, pad=pad)
        before = copy(dy)
        expected = reference.rms_norm_backward(dy.clone(), x, weight, 1e-5, residual)
        assert kernels.rms_norm_backward(dy, x, weight, 1e-5, residual) is dy
        assert_same(dy, expected)
        if pad:
            assert_padding_untouched(dy, before)


def check_rope(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.arange(tokens, device=DEVICE)[:, None] * 0.7 ** torch.arange(head_dim // 2, device=DEVICE)
    cos, sin = (torch.cat([f(angles), f(angles)], -1).to(dtype) for f in (torch.cos, torch.sin))
    # As the projection leaves them (T,heads,head_dim), as attention holds them (heads,T,head_dim), and a slice.
    for whole, view in [
        (normal(tokens, heads, head_dim, dtype=dtype), lambda whole: whole),
        (normal(heads, tokens, head_dim, dtype=dtype), lambda whole: whole.transpose(0, 1)),
        (normal(tokens, heads + 2, head_dim, dtype=dtype), lambda whole: whole[:, 1:-1]),
    ]:
        for inverse in (False, True):
            expected, actual = whole.clone(), whole.clone()
            reference.rope_(view(expected), cos, sin, inverse)
            kernels.rope_(view(actual), cos, sin, inverse)
            assert_same(actual, expected)


def check_lora(
    tokens: int, width: int, rank: int, dtype: torch.dtype, dropout: Dropout | None, row0: int, pad: int
) -> None:
    x, a = normal(tokens, width, dtype=dtype, pad=pad), normal(rank, width, dtype=dtype, seed=1, pad=2 * pad)
    dxa = normal(tokens, rank, dtype=dtype, seed=2, pad=pad)
    # Tensor cores cut off the last bits of their sums. One element dropped wrongly is 30 times this.
    lost = 1e-4
    assert_same(kernels.lora_down(x, a, dropout, row0), reference.lora_down(x, a, dropout, row0), lost=lost)
    grad = kernels.lora_down_grad(dxa, x, dropout, row0)
    assert_same(grad, reference.lora_down_grad(dxa, x, dropout, row0), lost=lost)
    assert torch.equal(grad, kernels.lora_down_grad(dxa, x, dropout, row0)), "not deterministic"
    dx = normal(tokens, width, dtype=dtype, seed=3, pad=3 * pad)
    before = copy(dx)
    expected = reference.lora_down_input_grad_(dx.clone(), dxa, a, dropout, row0)
    assert kernels.lora_down_input_grad_(dx, dxa, a, dropout, row0) is dx
    assert_same(dx, expected)
    if pad:
        assert_padding_untouched(dx, before)


def check_swiglu(tokens: int, width: int, ranks: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    gate, up, dh = (normal(tokens, width, dtype=dtype, seed=seed, pad=pad) for seed in range(3))
    stacked = normal(
        tokens, sum(ranks), dtype=dtype, seed=3
    )  # as lora_down returns it: a view for each adapter
    gate_lora, up_lora = (
        (xa, normal(width, xa.shape[1], dtype=dtype, seed=4, pad=pad, scale=xa.shape[1] ** -0.5))
        if xa.shape[1]
        else None
        for xa in stacked.split(ranks, 1)
    )
    expected = reference.swiglu(gate, up, gate_lora, up_lora)
    assert_same(kernels.swiglu(gate, up, gate_lora, up_lora), expected)
    for out_is_gate in (True, False):
        inputs = copy(gate), copy(up)
        out = inputs[0] if out_is_gate else inputs[1]
        assert kernels.swiglu(*inputs, gate_lora, up_lora, out=out) is out
        assert_same(out, expected)
    expected = reference.swiglu_backward_(dh.clone(), gate.clone(), up.clone(), gate_lora, up_lora)
    inputs = copy(dh), copy(gate), copy(up)
    actual = kernels.swiglu_backward_(*inputs, gate_lora, up_lora)
    assert actual[0] is inputs[1] and actual[1] is inputs[2] and actual[2] is inputs[0]
    for result, want in zip(actual, expected, strict=True):
        assert_same(result, want)
    if pad:
        assert_padding_untouched(actual[0], gate)


def check_dequantize(rows: int, cols: int, dtype: torch.dtype, nested: bool) -> None:
    weight = normal(rows, cols, dtype=dtype, scale=0.02)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    constants = Nested(state.state2.absmax, state.state2.code, state.offset.item()) if nested else None
    out = torch.full((rows, cols), 7.0, dtype=dtype, device=DEVICE)
    assert kernels.dequantize_nf4(packed.view(-1), state.absmax, constants, out) is out
    assert torch.equal(out, dequantize_4bit(packed, state))


# ---- small and odd sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "pad"), [(37, 64, 0), (5, 100, 12), (1, 1, 0), (3, 2052, 4)])
def test_rms_norm(tokens, hidden, pad, dtype):
    check_rms_norm(tokens, hidden, dtype, pad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(37, 4, 16), (3, 18, 80), (1, 1, 2)])
def test_rope(tokens, heads, head_dim, dtype):
    check_rope(tokens, heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [None, DROPOUT, Dropout(0.5, (0, 2**32 - 1))])
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "row0", "pad"),
    [
        (37, 64, 4, 0, 0),
        (130, 100, 12, 5, 12),
        (1, 36, 16, 2**31 - 3, 0),
        (70, 2052, 48, 2**26, 4),
        (9, 72, 130, 1, 0),
    ],
)
def test_lora(tokens, width, rank, row0, pad, dropout, dtype):
    check_lora(tokens, width, rank, dtype, dropout, row0, pad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "ranks", "pad"),
    [
        (37, 64, (0, 0), 0),
        (37, 64, (4, 4), 0),
        (33, 140, (16, 24), 12),
        (33, 140, (8, 0), 12),
        (1, 3, (0, 5), 1),
    ],
)
def test_swiglu(tokens, width, ranks, pad, dtype):
    check_swiglu(tokens, width, ranks, dtype, pad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (3, 64), (130, 192), (65, 320)])
def test_dequantize_nf4(rows, cols, nested, dtype):
    check_dequantize(rows, cols, dtype, nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_every_byte(nested, dtype):
    """Every byte under absmax of every magnitude, and every byte of a nested absmax."""
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(64 * 8)
    absmax = torch.logspace(-12, 3, packed.numel() // 32, device=DEVICE)
    constants = None
    if nested:
        absmax = torch.arange(absmax.numel(), device=DEVICE).to(torch.uint8)
        code = quantize_4bit(torch.randn(64, 64, device=DEVICE), quant_type="nf4", compress_statistics=True)[
            1
        ]
        constants = Nested(
            torch.logspace(-3, 0, absmax.numel() // 256, device=DEVICE), code.state2.code, 0.0321
        )
    actual = torch.empty(256, packed.numel() // 128, dtype=dtype, device=DEVICE)
    kernels.dequantize_nf4(packed, absmax, constants, actual)
    assert torch.equal(actual, reference.dequantize_nf4(packed, absmax, constants, actual.clone()))


def test_mask_of_ones():
    """The kernels drop exactly what dropout_mask says: read off a product with the identity."""
    for row0, dropout in [(0, DROPOUT), (2**27 + 3, Dropout(0.3, (2**31, 12345))), (7, Dropout(0.0, (1, 2)))]:
        ones, eye = torch.ones(100, 48, device=DEVICE), torch.eye(48, device=DEVICE)
        mask = kernels.dropout_mask(100, 48, dropout, row0, DEVICE)
        assert torch.equal(kernels.lora_down(ones, eye, dropout, row0) > 0, mask)
        down = kernels.lora_down_input_grad_(torch.zeros_like(ones), ones, eye, dropout, row0)
        assert torch.equal(down > 0, mask)
        grad = kernels.lora_down_grad(torch.eye(100, device=DEVICE), ones, dropout, row0)
        assert torch.equal(grad > 0, mask)


def test_mask_at_its_threshold():
    """An element whose hash is the threshold stays, and goes at the next one: all 32 bits are compared."""
    ones, eye = torch.ones(16, 16, device=DEVICE), torch.eye(16, device=DEVICE)
    hashes = reference._hashes(16, 16, DROPOUT.key, 0, DEVICE).long() & 0xFFFFFFFF
    for i in range(16):
        for more in (0, 1):
            dropout = Dropout((hashes[i, i].item() + more) / 2**32, DROPOUT.key)
            mask = kernels.lora_down(ones, eye, dropout) > 0
            assert torch.equal(mask, hashes >= dropout.threshold)
            assert torch.equal(mask, kernels.dropout_mask(16, 16, dropout, 0, DEVICE))
            assert mask[i, i].item() == (more == 0)


def test_chunks():
    """A chunk of tokens gives the very rows of the whole."""
    x, a = normal(150, 256, dtype=torch.float16), normal(16, 256, dtype=torch.float16, seed=1)
    whole = kernels.lora_down(x, a, DROPOUT, 11)
    chunks = [kernels.lora_down(x[i : i + 50], a, DROPOUT, 11 + i) for i in range(0, 150, 50)]
    assert torch.equal(torch.cat(chunks), whole)


@true_size
def test_nothing_is_compiled_again(monkeypatch):
    """Other numbers of tokens, rows and keys run the kernels that are there."""
    from triton import knobs

    def run(tokens: int, row0: int, key: tuple[int, int], probability: float) -> None:
        x, a = normal(tokens, 96, dtype=torch.bfloat16), normal(16, 96, dtype=torch.bfloat16)
        dropout, thin = Dropout(probability, key), normal(tokens, 16, dtype=torch.bfloat16)
        heads, cos = normal(tokens, 2, 16, dtype=torch.bfloat16), normal(tokens, 16, dtype=torch.bfloat16)
        kernels.rms_norm_backward(kernels.rms_norm(x, x[0], 1e-5), x, x[0], 1e-5, x)
        kernels.rope_(heads, cos, cos)
        kernels.lora_down(x, a, dropout, row0)
        kernels.lora_down_grad(thin, x, dropout, row0)
        kernels.lora_down_input_grad_(x.clone(), thin, a, dropout, row0)
        kernels.swiglu_backward_(x.clone(), x.clone(), x.clone(), (thin, a.T.contiguous()))

    run(37, 3, (5, 7), 0.1)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"]) and None
    )
    for tokens in (1, 2, 16, 64, 1000, 1024):
        run(tokens, tokens, (2**32 - tokens, tokens), 0.6)
    assert not compiled


# ---- a 70B model's sizes


@true_size
@pytest.mark.parametrize("dtype", TRUE_DTYPES)
class TestTrueSize:
    def test_rms_norm(self, dtype):
        check_rms_norm(1000, 8192, dtype, pad=0)

    def test_rope(self, dtype):
        check_rope(1000, 64, 128, dtype)

    @pytest.mark.parametrize("dropout", [None, DROPOUT])
    @pytest.mark.parametrize("rank", [16, 32, 48, 192])
    @pytest.mark.parametrize("width", [8192, 28672])
    def test_lora(self, width, rank, dropout, dtype):
        check_lora(1000, width, rank, dtype, dropout, row0=3000, pad=0)

    @pytest.mark.parametrize("ranks", [(0, 0), (16, 16), (64, 64)])
    def test_swiglu(self, ranks, dtype):
        check_swiglu(1000, 28672, ranks, dtype, pad=0)

    @pytest.mark.parametrize("nested", [False, True])
    def test_dequantize(self, nested, dtype):
        check_dequantize(28672, 8192, dtype, nested)


@true_size
def test_beyond_32_bits():
    """More than 2**31 elements: the last rows are those that an overflow would spoil."""
    tokens, width = 75_000, 28_672
    x, a = (
        torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE),
        normal(16, width, dtype=torch.bfloat16),
    )
    x[-100:] = normal(100, width, dtype=torch.bfloat16, seed=1)
    tail = x[-100:].clone()
    first = tokens - 100
    assert torch.equal(kernels.lora_down(x, a, DROPOUT)[-100:], kernels.lora_down(tail, a, DROPOUT, first))
    thin = normal(tokens, 16, dtype=torch.bfloat16, seed=2)
    assert_same(
        kernels.lora_down_grad(thin, x, DROPOUT),
        reference.lora_down_grad(thin[-100:], tail, DROPOUT, first),
        lost=1e-4,
    )
    expected = kernels.lora_down_input_grad_(tail.clone(), thin[-100:], a, DROPOUT, first)
    assert torch.equal(kernels.lora_down_input_grad_(x, thin, a, DROPOUT)[-100:], expected)
    expected = kernels.swiglu(expected, expected)
    assert torch.equal(kernels.swiglu(x, x, out=x)[-100:], expected)
