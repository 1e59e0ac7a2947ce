"""This recipe's own engine as a variant of the benchmark: random weights of the true shape, the placement of the plan."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from recipe.bench.spec import Spec
from recipe.engine.attention import Documents
from recipe.engine.build import Build
from recipe.engine.engine import Batch
from recipe.engine.load import load_sharded
from recipe.engine.random import random_model
from recipe.plan.budget import choose_placement
from recipe.plan.cards import slowest_card
from recipe.plan.memory import compute_bytes, device_parts, host_parts, outside_allocator
from recipe.plan.parts import GIB, total_gib
from recipe.plan.placement import Placement
from recipe.plan.seconds import step_seconds
from recipe.settings import Settings, from_dict

LEARNING_RATE = 1e-4


def settings_of(spec: Spec) -> Settings:
    """The run that the spec stands for, as the plan reads it."""
    return from_dict(
        {
            "lora": {"rank": spec.lora_rank, "alpha": spec.lora_rank, "dropout": spec.dropout},
            "data": {"max_length": max(16, min(spec.document_tokens or spec.tokens, spec.tokens))},
            "train": {
                "micro_batch_tokens": max(16, spec.tokens),
                "global_batch_tokens": max(16, spec.tokens) * spec.ranks,
            },
            "compute": {
                "offload_layers": spec.offload,
                "keep_layers": spec.keep,
                "kernels": spec.kernels,
                "dtype": spec.dtype if spec.on_gpu else "fp32",
            },
        }
    )


def placement_of(spec: Spec, settings: Settings, card: str | None = None) -> Placement:
    """What the plan would choose for a card whose allocator may use `cap_gib`, on a host of `ram_gib`."""
    vram_gib = spec.cap_gib + total_gib(outside_allocator(spec.ranks)) if spec.on_gpu else None
    known = slowest_card([card]) if card else None
    return choose_placement(spec.shape, settings, spec.ranks, vram_gib, spec.ram_gib, known)


class Ours:
    """A Program, as recipe.bench.worker drives it; of random weights, or of the spec's checkpoint."""

    def __init__(self, spec: Spec, device: torch.device, mesh: DeviceMesh):
        self.spec, self.device, self.mesh = spec, device, mesh
        self.settings = settings_of(spec)
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu and spec.dtype == "bf16" else torch.float32
        card = torch.cuda.get_device_name(device) if on_gpu else None
        self.placement = placement_of(spec, self.settings, card)
        build = Build(
            lora=self.settings.lora,
            mesh=mesh,
            device=device,
            dtype=dtype,
            attention="varlen" if dtype == torch.bfloat16 else "sdpa",
            placement=self.placement,
            max_tokens=spec.tokens,
            kernels=spec.kernels,
        )
        self.model = (
            load_sharded(Path(spec.checkpoint), build, spec.seed)
            if spec.checkpoint
            else random_model(spec.shape, build, spec.seed)
        )
        self.engine: Any = self.model.engine
        self.optimizer = torch.optim.AdamW([self.engine.adapters.flat], lr=LEARNING_RATE, fused=True)

    def step(self, input_ids_row: torch.Tensor, document_lengths: list[int]) -> torch.Tensor:
        """Forward and backward of a micro-batch; the mean loss over this rank's labelled tokens."""
        starts = [0, *itertools.accumulate(document_lengths)]
        positions = torch.cat([torch.arange(length) for length in document_lengths]).to(self.device)
        # No document predicts the first token of the next.
        labelled = torch.ones(len(input_ids_row) - 1, dtype=torch.bool)
        labelled[[start - 1 for start in starts[1:-1]]] = False
        kept = labelled.nonzero()[:, 0]
        batch = Batch(
            input_ids_row,
            positions,
            Documents.of(starts, self.device),
            kept.to(self.device),
            input_ids_row[1:][kept].to(self.device),
        )
        loss = self.engine.loss(batch, training=True) / len(kept)
        loss.backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def describe(self) -> dict[str, Any]:
        """The placement, and what the plan foresees for it."""
        on_gpu, ranks = self.spec.on_gpu, self.spec.ranks
        device = device_parts(self.spec.shape, self.settings, ranks, on_gpu, self.placement)
        host = host_parts(self.spec.shape, self.settings, device, ranks, on_gpu, self.placement)
        card = slowest_card([torch.cuda.get_device_name(self.device)]) if on_gpu else None
        return {
            **dataclasses.asdict(self.placement),
            "kernels": self.spec.kernels,
            "planned_device_gib": round(total_gib(device), 2),
            "planned_host_gib": round(total_gib(host), 2),
            "planned_step_seconds": card
            and round(step_seconds(self.spec.shape, self.settings, ranks, card, self.placement), 3),
            "bytes_per_element": compute_bytes(self.settings, on_gpu),
            "layer_gib": round(self.engine.store.layout.size / GIB, 4),
        }
