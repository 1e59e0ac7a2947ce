"""The rates of this machine's GPUs that the time of a run depends on, one GPU after another. Prints JSON.

    python -m recipe.plan.measure

A process of its own, since it imports torch and takes GPU memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PRODUCT_SIZE = 8192  # as in recipe bench, whose rates cards.py has
BLOCK_SECONDS = 0.3
BLOCKS = 5
COPY_BYTES = 2**30


def main() -> int:
    found: dict[str, Any] = {"torch": torch.__version__, "gpus": {}}
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        rates = card_rates(torch.device("cuda", index))
        before = found["gpus"].get(name)
        # Of two alike the slower decides: one may have the slower slot.
        found["gpus"][name] = (
            rates if before is None else {key: min(before[key], rates[key]) for key in rates}
        )
        print(f"{name} ({index}): {rates['tflops']:.0f} TFLOP/s", file=sys.stderr, flush=True)
    print(json.dumps(found))
    return 0


def card_rates(device: torch.device) -> dict[str, float]:
    torch.cuda.set_device(device)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    flop = 2 * PRODUCT_SIZE**3
    tflops = flop / _seconds(_product(device, dtype)) / 1e12
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    fp16 = flop / _seconds(_product(device, torch.float16)) / 1e12
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    here, other = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "tflops": round(tflops, 1),
        "fp16_factor": round(max(1.0, fp16 / tflops), 2),
        "memory_gb_per_second": round(2 * COPY_BYTES / _seconds(lambda: other.copy_(here)) / 1e9),
        "link_gb_per_second": round(
            min(
                COPY_BYTES / _seconds(copy) / 1e9
                for copy in (
                    lambda: here.copy_(host, non_blocking=True),
                    lambda: host.copy_(here, non_blocking=True),
                )
            ),
            1,
        ),
    }


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    # Of random numbers: zeros draw less power and run faster.
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _seconds(work: Callable[[], Any]) -> float:
    """Of one call: the median of blocks, of which the first warms up."""
    times = []
    for _ in range(BLOCKS + 1):
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < BLOCK_SECONDS:
            work()
            torch.cuda.synchronize()
            calls += 1
        times.append((time.perf_counter() - started) / calls)
    return sorted(times[1:])[BLOCKS // 2]


if __name__ == "__main__":
    sys.exit(main())
