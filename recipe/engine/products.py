"""Matrix products of 16-bit tensors whose result is fp32: logits, and gradients that add up."""

from __future__ import annotations

import torch


def mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) @ b (k, n) -> (m, n) fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    if a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return (a @ b).float()  # cuBLAS has no product with fp16 sums and an fp32 result
    return torch.mm(a, b, out_dtype=torch.float32)
