"""A frozen linear layer whose weight is NF4 bytes, seen as the dtype that FSDP2 gathers in.

FSDP2 shards and gathers floating tensors and casts them to `param_dtype`. Bytes viewed as that very dtype pass through
unchanged, all 65,536 patterns of them; a cast would destroy them (tests/engine/test_nf4_bits.py). The bytes of a
checkpoint are therefore viewed, whatever dtype they are stored in, and viewed back as bytes for bitsandbytes.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit without its conversions: the weight is a plain parameter that FSDP2 may own.

    weight: (out * in / 2 / itemsize, 1) of `gather_dtype`; quant_state: absmax constants, whole on every rank.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, gather_dtype: torch.dtype):
        super().__init__(in_features, out_features, bias=bias, device=torch.device("meta"))
        rows = in_features * out_features // 2 // gather_dtype.itemsize
        self.weight = nn.Parameter(
            torch.empty(rows, 1, dtype=gather_dtype, device="meta"), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out); computed in x's dtype, without bitsandbytes' repacking for CPUs with bf16."""
        return bnb.matmul_4bit(x, self.weight.view(torch.uint8), bias=self.bias, quant_state=self.quant_state)


def quant_state(tensors: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> QuantState:
    """The absmax constants of one weight from the tensors that stand beside it in the checkpoint.

    `dtype` is what the weight is dequantised to in the backward pass; the checkpoint names that of its source, whose
    rounding would make fp32 gradients those of another model.
    """
    state = QuantState.from_dict({key: tensor.to(device) for key, tensor in tensors.items()}, device=device)
    state.dtype = dtype
    return state
