"""The Triton kernels do what recipe/engine/reference.py does, on the GPU.

pytest tests/engine/test_kernels_gpu.py            # every kernel, small and at a 70B model's sizes
python -m tests.engine.test_kernels_gpu            # milliseconds and GB/s beside other implementations
TRITON_INTERPRET=1 pytest tests/engine/test_kernels_gpu.py      # without a GPU: small sizes; numpy below 2.4
"""

import os
import sys
from types import SimpleNamespace

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
true_size = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the interpreter would take hours")


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
    if dtype == torch.float32 and rank > 48:
        pytest.skip("fp32 goes without tensor cores: this one takes the compiler long")
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
    hashes = reference._hashes(16, 16, DROPOUT.key, 0, DEVICE)
    for i in range(16):
        for more in (0, 1):
            dropout = Dropout((hashes[i, i].item() + more) / 2**32, DROPOUT.key)
            mask = kernels.lora_down(ones, eye, dropout) > 0
            assert torch.equal(mask, hashes >= dropout.threshold)
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


# ---- benchmark


def benchmark(tokens: int = 8192, dtype: torch.dtype = torch.bfloat16) -> None:
    """Median milliseconds, GB that must move at the least, and GB/s of those: ours, then others' on the same tensors."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T = {tokens}, {dtype}")
    print(f"{'operation':44} {'implementation':22} {'ms':>8} {'GB':>7} {'GB/s':>7}")
    for measure in (_bench_norm, _bench_rope, _bench_swiglu, _bench_lora, _bench_nf4):
        measure(tokens, dtype)
        torch.cuda.empty_cache()


def _report(operation: str, gigabytes: float, implementations: dict) -> None:
    from triton.testing import do_bench

    for name, call in implementations.items():
        try:
            milliseconds = do_bench(call, warmup=50, rep=200, return_mode="median")
        except Exception as error:  # one that cannot run here must not hide the others
            print(f"{operation:44} {name:22} {type(error).__name__}: {str(error).splitlines()[0][:60]}")
            continue
        print(
            f"{operation:44} {name:22} {milliseconds:8.3f} {gigabytes:7.3f} {gigabytes / milliseconds * 1000:7.0f}",
            flush=True,
        )


def _compiled(function):
    return torch.compile(function, dynamic=False)


def _liger():
    try:
        from liger_kernel.ops import rms_norm, rope, swiglu
    except ImportError:
        return None
    return SimpleNamespace(rms_norm=rms_norm, rope=rope, swiglu=swiglu)


def _bench_norm(tokens: int, dtype: torch.dtype, hidden: int = 8192) -> None:
    x, dy, residual = (normal(tokens, hidden, dtype=dtype, seed=seed) for seed in range(3))
    weight, unit, liger = normal(hidden, dtype=dtype), x.numel() * x.itemsize / 1e9, _liger()
    plain = _compiled(reference.rms_norm)
    runs = {
        "ours": lambda: kernels.rms_norm(x, weight, 1e-5),
        "torch.compile": lambda: plain(x, weight, 1e-5),
    }
    if liger:
        runs["liger"] = lambda: liger.rms_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
    _report(f"rms_norm {hidden}", 2 * unit, runs)
    plain_backward = _compiled(reference.rms_norm_backward)
    runs = {
        "ours": lambda: kernels.rms_norm_backward(dy, x, weight, 1e-5, residual),
        "torch.compile": lambda: plain_backward(dy, x, weight, 1e-5, residual),
    }
    if liger:
        _, _, rstd, block, warps, mode = liger.rms_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
        # Liger has the gradient of the weight too, and leaves the residual to an addition of its own.
        runs["liger + add"] = lambda: liger.rms_norm.rms_norm_backward(
            dy, x, weight, rstd, 0.0, mode, block, warps, True, None
        )[0].add_(residual)
    _report(f"rms_norm_backward {hidden} + residual", 4 * unit, runs)


def _bench_rope(
    tokens: int, dtype: torch.dtype, heads: int = 64, kv_heads: int = 8, head_dim: int = 128
) -> None:
    q, k = normal(tokens, heads, head_dim, dtype=dtype), normal(tokens, kv_heads, head_dim, dtype=dtype)
    cos, sin = normal(tokens, head_dim, dtype=dtype), normal(tokens, head_dim, dtype=dtype, seed=1)
    unit, liger, plain = (q.numel() + k.numel()) * q.itemsize / 1e9, _liger(), _compiled(reference.rope_)
    runs = {
        "ours": lambda: (kernels.rope_(q, cos, sin), kernels.rope_(k, cos, sin)),
        "torch.compile": lambda: (plain(q, cos, sin), plain(k, cos, sin)),
    }
    if liger:
        seen = q[None].transpose(1, 2), k[None].transpose(1, 2)  # (1, heads, T, head_dim), in place
        runs["liger"] = lambda: liger.rope.rope_forward(*seen, cos[None], sin[None])
    _report(f"rope_ of q and k, {heads} + {kv_heads} heads of {head_dim}", 2 * unit, runs)


def _bench_swiglu(tokens: int, dtype: torch.dtype, width: int = 28672) -> None:
    gate, up, dh = (normal(tokens, width, dtype=dtype, seed=seed) for seed in range(3))
    unit, liger = gate.numel() * gate.itemsize / 1e9, _liger()
    plain, plain_backward = _compiled(reference.swiglu), _compiled(reference.swiglu_backward_)
    runs = {
        "ours": lambda: kernels.swiglu(gate, up, out=up),
        "torch.compile": lambda: plain(gate, up, out=up),
    }
    backward = {
        "ours": lambda: kernels.swiglu_backward_(dh, gate, up),
        "torch.compile": lambda: plain_backward(dh, gate, up),
    }
    if liger:
        runs["liger"] = lambda: liger.swiglu.swiglu_forward(gate, up)
        backward["liger (without h)"] = lambda: liger.swiglu.swiglu_backward(gate, up, dh)
    _report(f"swiglu {width}", 3 * unit, runs)
    _report(f"swiglu_backward_ {width}", 6 * unit, backward)
    for rank in (16, 64):
        loras = [
            (normal(tokens, rank, dtype=dtype, seed=seed), normal(width, rank, dtype=dtype, scale=0.1))
            for seed in (1, 2)
        ]

        def unfused(loras=loras):
            for matrix, (xa, b) in zip((gate, up), loras, strict=True):
                matrix.addmm_(xa, b.T)
            kernels.swiglu(gate, up, out=up)

        runs = {
            "ours": lambda loras=loras: kernels.swiglu(gate, up, *loras, out=up),
            "addmm_ + ours": unfused,
        }
        _report(f"swiglu {width}, two LoRAs of rank {rank}", 3 * unit, runs)
        runs = {"ours": lambda loras=loras: kernels.swiglu_backward_(dh, gate, up, *loras)}
        _report(f"swiglu_backward_ {width}, two LoRAs of rank {rank}", 6 * unit, runs)


def _bench_lora(tokens: int, dtype: torch.dtype) -> None:
    for width, rank in [(8192, 16), (8192, 48), (28672, 16), (28672, 48), (28672, 192)]:
        x, a = normal(tokens, width, dtype=dtype), normal(rank, width, dtype=dtype, seed=1)
        dx, dxa = normal(tokens, width, dtype=dtype, seed=2), normal(tokens, rank, dtype=dtype, seed=3)
        unit, size = x.numel() * x.itemsize / 1e9, f"{width}, R = {rank}"

        def dropped(x=x, a=a):
            return torch.nn.functional.dropout(x, DROPOUT.probability) @ a.T

        def dropped_grad(x=x, dxa=dxa):
            return dxa.T @ torch.nn.functional.dropout(x, DROPOUT.probability)

        def dropped_input_grad(dx=dx, dxa=dxa, a=a):
            return dx.add_(torch.nn.functional.dropout(dxa @ a, DROPOUT.probability))

        for name, passes, ours, without, other in [
            (
                "lora_down",
                1,
                lambda drop, x=x, a=a: kernels.lora_down(x, a, drop),
                lambda x=x, a=a: x @ a.T,
                dropped,
            ),
            (
                "lora_down_grad",
                1,
                lambda drop, x=x, dxa=dxa: kernels.lora_down_grad(dxa, x, drop),
                lambda x=x, dxa=dxa: torch.mm(dxa.T, x, out_dtype=torch.float32),
                dropped_grad,
            ),
            (
                "lora_down_input_grad_",
                2,
                lambda drop, dx=dx, dxa=dxa, a=a: kernels.lora_down_input_grad_(dx, dxa, a, drop),
                lambda dx=dx, dxa=dxa, a=a: dx.addmm_(dxa, a),
                dropped_input_grad,
            ),
        ]:
            runs = {"ours": lambda ours=ours: ours(DROPOUT), "F.dropout, compiled": _compiled(other)}
            _report(f"{name} {size}, dropout", passes * unit, runs)
            _report(
                f"{name} {size}", passes * unit, {"ours": lambda ours=ours: ours(None), "cuBLAS": without}
            )


def _bench_nf4(tokens: int, dtype: torch.dtype) -> None:
    for rows, cols in [(28672, 8192), (8192, 8192), (1024, 8192)]:
        for nested in (True, False):
            packed, state = quantize_4bit(
                normal(rows, cols, dtype=dtype), quant_type="nf4", compress_statistics=nested
            )
            out = torch.empty(rows, cols, dtype=dtype, device=DEVICE)
            constants = (
                Nested(state.state2.absmax, state.state2.code, state.offset.item()) if nested else None
            )
            runs = {
                "ours": lambda p=packed, s=state, c=constants, out=out: kernels.dequantize_nf4(
                    p.view(-1), s.absmax, c, out
                ),
                "bitsandbytes": lambda p=packed, s=state, out=out: dequantize_4bit(p, s, out=out),
            }
            gigabytes = (out.nbytes + packed.nbytes + state.absmax.nbytes) / 1e9
            _report(f"dequantize_nf4 {rows} × {cols}{', nested' if nested else ''}", gigabytes, runs)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("The benchmark needs an NVIDIA GPU: torch.cuda.is_available() is False.")
    benchmark()
