"""Does the software work, not only exist? Imports torch, compares NF4 with a reference, prints JSON.

Runs in a process of its own (see Context.stack): `python -m recipe.preflight.stack cpu|gpu`.

How to read it: `nf4_error` is what NF4 with double quantisation loses of normal weights (root mean square, about 9 %);
`nf4_codes_differ` the share of 4-bit codes that are not the reference's, and `nf4_values_differ` the largest difference of
what comes back, both about 0: only a weight on the bound between two codes may fall to either side.
"""

from __future__ import annotations

import sys
from typing import Any

from recipe.preflight.program import say

SIDE = 512  # a matrix large enough for double quantisation (more than 256 blocks of 64)
BLOCK = 64
# The 16 values of NF4, from the QLoRA paper (arXiv 2305.14314, appendix E).
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def look(device: str) -> dict[str, Any]:
    """Versions, GPUs that torch sees, and how NF4 does."""
    found: dict[str, Any] = {}
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    except Exception as error:
        return {"torch_error": _line(error)}
    try:
        found |= _nf4("cuda" if device == "gpu" else "cpu")
    except Exception as error:
        found["bitsandbytes_error"] = _line(error)
    return found


def _nf4(device: str) -> dict[str, float]:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator).to(device)
    double = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    back = dequantize_4bit(packed, state).cpu().view(-1)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).cpu().long()
    # The reference: the nearest of the 16 values for each weight over its block's largest.
    book = torch.tensor(CODEBOOK)
    blocks = weight.cpu().view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / absmax, (book[:-1] + book[1:]) / 2).view(-1)
    values = (book[codes].view(-1, BLOCK) * absmax).view(-1)
    return {
        "nf4_error": float((double - weight).norm() / weight.norm()),
        "nf4_codes_differ": float((codes != nearest).float().mean()),
        "nf4_values_differ": float((back - values).abs().max()),
    }


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


if __name__ == "__main__":
    say(**look(sys.argv[1]))
