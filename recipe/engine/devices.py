"""Which device, dtype and attention a rank computes with; chosen once, and said."""

from __future__ import annotations

import torch

from recipe.errors import UserError
from recipe.settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(settings: Settings) -> torch.dtype:
    """bf16 where the GPU has it, else fp16; fp32 on a CPU, whose bf16 matmul is 7 times slower without AMX.

    Raises UserError where the dtype asked for cannot be had.
    """
    wanted = settings.compute.dtype
    if not torch.cuda.is_available():
        if wanted == "fp16":
            raise UserError("compute.dtype is `fp16`, expected auto, fp32 or bf16 on a machine without a GPU")
        return DTYPES["fp32" if wanted == "auto" else wanted]
    has_bf16 = torch.cuda.get_device_capability()[0] >= 8
    if wanted == "bf16" and not has_bf16:
        raise UserError("compute.dtype is `bf16`, but this GPU has no bf16; expected auto or fp16")
    return DTYPES[("bf16" if has_bf16 else "fp16") if wanted == "auto" else wanted]


def set_accumulation(settings: Settings, dtype: torch.dtype) -> None:
    """Let matrix products add up in fp16 where that is asked for. Raises UserError where they are not in fp16."""
    if settings.compute.accumulate == "fp16" and dtype != torch.float16:
        raise UserError(
            f"compute.accumulate is `fp16`, but the run computes in {str(dtype).removeprefix('torch.')}; "
            "expected compute.dtype: fp16 with it"
        )
    torch.backends.cuda.matmul.allow_fp16_accumulation = settings.compute.accumulate == "fp16"


def set_deterministic(wanted: bool) -> None:
    """Only operations that give the same bits each time: FlashAttention's backward then adds up in a fixed order.

    torch raises where it has no such kernel. cuBLAS needs CUBLAS_WORKSPACE_CONFIG, which the launcher sets.
    """
    torch.use_deterministic_algorithms(wanted)
    # What is not yet written is never read here: to fill it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted


def attention_kind(settings: Settings, dtype: torch.dtype) -> str:
    """`varlen` (FlashAttention-2 inside torch) or `sdpa`. Raises UserError where the one asked for cannot be had."""
    wanted = settings.compute.attention
    on_gpu = (
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 and dtype != torch.float32
    )
    able = {
        "varlen": on_gpu,
        "sdpa": True,
    }
    if wanted == "auto":
        return next(kind for kind, works in able.items() if works)
    if not able[wanted]:
        raise UserError(
            f"compute.attention is `{wanted}`, which needs a GPU of compute capability 8.0 or newer, bf16 or fp16; "
            "expected auto or sdpa here"
        )
    return wanted
