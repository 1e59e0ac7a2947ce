"""This recipe's own engine as a variant of the benchmark.

To be filled in when the engine exists. `build` gets the process group joined (NCCL, or gloo on CPUs), the device
chosen and the allocator capped; it may log to standard error. What it returns:

    step(input_ids_row, document_lengths) -> loss
        Forward and backward of one micro-batch on this rank. input_ids_row: (tokens,) int64 on the CPU;
        document_lengths: their lengths in the row, summing up to tokens. loss: float tensor of one element, the mean
        over this rank's labelled tokens. Gradients accumulate until optimizer_step; the last of
        `spec.micro_batches` calls before it is the one after which they must be reduced.
    optimizer_step()
        AdamW on the adapters, gradients cleared.
    describe() -> dict
        What the engine chose, as JSON values: {"offloaded_layers": 46, "kept": "x", ...}. It stands in the row.

Of the spec, `offload` (a number of layers or "auto"), `dropout`, `lora_rank`, `cap_gib`, `document_tokens` and
`seed` are orders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipe.bench.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from recipe.bench.emulate import Program


def build(spec: Spec, device: torch.device, mesh: DeviceMesh) -> Program:
    raise NotImplementedError("recipe/bench/ours.py does not call the engine yet")
