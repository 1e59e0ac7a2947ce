"""A frozen linear layer whose weight is bitsandbytes' NF4 bytes, handed to it for the moment that it is needed.

It stands in the model's skeleton on the meta device, so that transformers and PEFT know the layer; the bytes come from
the gathered layer (recipe/engine/layout.py) and stay bytes: no cast ever touches them.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' Linear4bit without its conversions. weight: (out * in / 2, 1) uint8."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias=bias, device=torch.device("meta"))
        self.weight = nn.Parameter(
            torch.empty(in_features * out_features // 2, 1, dtype=torch.uint8, device="meta"),
            requires_grad=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out); computed in x's dtype, without bitsandbytes' repacking for CPUs with bf16."""
        return bnb.matmul_4bit(x, self.weight, bias=self.bias, quant_state=self.quant_state)
