"""Where the time of one step goes: torch.profiler's kernels, grouped into classes.

On a GPU the kernels are read from the trace, whose categories tell them from the annotations that cover them; on a
CPU the operators' own times stand in.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 25
OTHER = "other"
# The first that matches a name, wherever in it, counts.
CLASSES = {
    "nccl": r"nccl|c10d::|gloo|FSDP::.*(gather|reduce)",
    # Inductor names its kernels after the operators that they fuse, copies and softmax among them.
    "triton/elementwise": r"^triton_(?!tem_)",
    "attention": r"flash|fmha|attention|sdpa|attn",
    "dequantise": r"dequant|blockwise",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|wgmma|triton_tem_|aten::(add|b|badd)?mm_?\b",
    "copies": r"memcpy|memset|copy|catarray|chunk_cat|aten::(cat|clone)\b",
}
# What else computes: asked last, since these words stand in many names.
ELEMENTWISE = (
    r"elementwise|vectorized|reduce|softmax|norm|rope|rotary|"
    r"swiglu|silu|lora|index|scatter|gather|multi_tensor|dropout|bernoulli|embedding|distribution|aten::"
)
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CLASSES.items()}
_ELEMENTWISE = re.compile(ELEMENTWISE, re.IGNORECASE)


def class_of(kernel: str) -> str:
    found = next((name for name, pattern in _PATTERNS.items() if pattern.search(kernel)), None)
    return found or ("triton/elementwise" if _ELEMENTWISE.search(kernel) else OTHER)


def start(device: Any) -> Any:
    """A running profiler: of kernels only on a GPU, since watching the operators too slows the step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profile

    profiler = Profile(
        activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU], acc_events=True
    )
    profiler.start()
    return profiler


def summary(profiler: Any, device: Any, step_seconds: float) -> dict[str, Any]:
    """Stop it; classes and top kernels in ms, shares of the kernels' total, which may overlap on several streams."""
    profiler.stop()
    busy_ms: float | None = None
    alone_ms: dict[str, float] | None = None
    if device.type == "cuda":
        with tempfile.TemporaryDirectory(prefix="recipe-bench-trace-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(errors="replace"))["traceEvents"]
        spans = [
            (event["name"], event["ts"], event["dur"])
            for event in events
            if event.get("cat") in KERNEL_CATEGORIES and "dur" in event
        ]
        busy_ms = covered(spans) / 1e3
        alone_ms = alone(spans)
        kernels = totals((name, 1, duration / 1e3) for name, _, duration in spans)
    else:
        kernels = totals(
            (event.key, event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()
        )
    return grouped(kernels, step_seconds * 1e3, busy_ms, alone_ms)


def totals(events: Iterable[tuple[str, int, float]]) -> dict[str, tuple[int, float]]:
    """(name, calls, ms) added up by name."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, calls, ms in events:
        found[name] = (found[name][0] + calls, found[name][1] + ms)
    return dict(found)


def covered(spans: list[tuple[str, float, float]]) -> float:
    """The time in which at least one of the (name, start, duration) ran."""
    total, end = 0.0, float("-inf")
    for _, begin, duration in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, begin + duration - max(begin, end))
        end = max(end, begin + duration)
    return total


def alone(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """ms in which kernels of one class ran and no others: what a class costs that hides behind nothing."""
    classes = {name: class_of(name) for name in {span[0] for span in spans}}
    everything = covered(spans)
    return {
        each: (everything - covered([span for span in spans if classes[span[0]] != each])) / 1e3
        for each in set(classes.values())
    }


def grouped(
    kernels: dict[str, tuple[int, float]],
    step_ms: float,
    busy_ms: float | None,
    alone_ms: dict[str, float] | None = None,
) -> dict[str, Any]:
    total = sum(ms for _, ms in kernels.values()) or 1.0
    classes = dict.fromkeys((*CLASSES, OTHER), 0.0)
    for name, (_, ms) in kernels.items():
        classes[class_of(name)] += ms
    ranked = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP]
    return {
        "step_ms": step_ms,
        "kernels_ms": total,
        "busy_ms": busy_ms,
        "classes": [
            {
                "class": name,
                "ms": ms,
                "share": ms / total,
                "alone_ms": None if alone_ms is None else alone_ms.get(name, 0.0),
            }
            for name, ms in classes.items()
        ],
        "top": [
            {"kernel": name, "class": class_of(name), "calls": calls, "ms": ms, "share": ms / total}
            for name, (calls, ms) in ranked
        ],
    }
