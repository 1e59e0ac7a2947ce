"""How fast each Triton kernel is, beside other implementations of the same on the same tensors.

    python -m recipe.bench.kernels

Milliseconds are medians of triton.testing.do_bench. Liger takes part where it is installed.
"""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from recipe.engine import kernels, reference
from recipe.engine.kernels import Dropout, Nested

DEVICE = "cuda"
DROPOUT = Dropout(0.05, (0x9E3779B9, 0x7F4A7C15))


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)


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
            "ours": partial(kernels.swiglu, gate, up, loras[0], loras[1], out=up),
            "addmm_ + ours": unfused,
        }
        _report(f"swiglu {width}, two LoRAs of rank {rank}", 3 * unit, runs)
        runs = {"ours": partial(kernels.swiglu_backward_, dh, gate, up, *loras)}
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
                partial(kernels.lora_down_grad, dxa, x),
                partial(torch.mm, dxa.T, x, out_dtype=torch.float32),
                dropped_grad,
            ),
            (
                "lora_down_input_grad_",
                2,
                partial(kernels.lora_down_input_grad_, dx, dxa, a),
                partial(dx.addmm_, dxa, a),
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
