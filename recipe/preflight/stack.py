"""Does the software work, not only exist? Imports torch, does an NF4 round trip, prints JSON.

Runs in a process of its own (see Context.stack): `python -m recipe.preflight.stack cpu|gpu`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SIDE = 512  # a matrix large enough for double quantisation (more than 256 blocks of 64)


def look(device: str) -> dict[str, Any]:
    """Versions, GPUs that torch sees, and the error of an NF4 round trip (relative, root mean square)."""
    found: dict[str, Any] = {}
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    except Exception as error:
        return {"torch_error": _line(error)}
    try:
        found["nf4_error"] = _round_trip("cuda" if device == "gpu" else "cpu")
    except Exception as error:
        found["bitsandbytes_error"] = _line(error)
    return found


def _round_trip(device: str) -> float:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = dequantize_4bit(packed, state)
    return float((back - weight).norm() / weight.norm())


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
