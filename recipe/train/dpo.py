"""DPO on the engine that SFT trains with: the reference is the same model without its adapters, so there is no second one.

loss of a pair = -log sigmoid(beta * ((policy - reference of the chosen) - (policy - reference of the rejected)))

where policy and reference are log-probabilities of whole answers. The mean is over the pairs of all ranks' micro-batches
of a step. Where a run begins with adapters (`lora.start`), those are the reference, as TRL has it. The reference is
computed on the way: a forward more for each micro-batch, a third to a half of a step, and nothing to keep for a resume.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from recipe.engine.engine import Batch, Engine
from recipe.train.trainer import ShardedSFTTrainer


def log_ratios(engine: Engine, batch: Batch, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document's labelled tokens: log policy - log reference, and log policy (a collective)."""
    documents = torch.arange(len(batch.documents.starts) - 1, device=batch.labelled.device)
    own = batch.documents_of_labelled[None] == documents[:, None]
    # Not index_add: its sums on a GPU are in any order.
    reference = engine.reference_losses(batch).expand(own.shape).where(own, 0.0).sum(1)
    policy = engine.losses(batch, training).expand(own.shape).where(own, 0.0).sum(1)
    return reference - policy, -policy


def pair_losses(ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """ratios of the documents chosen, rejected, chosen, … -> the loss of each pair."""
    return -F.logsigmoid(beta * (ratios[0::2] - ratios[1::2]))


class ShardedDPOTrainer(ShardedSFTTrainer):
    """ShardedSFTTrainer with the loss of pairs (recipe/data/preference.py) instead of tokens."""

    held_out_sums = (
        5  # loss, pairs, loss of the chosen answers' tokens, those tokens, pairs told apart rightly
    )

    def __init__(self, *args: Any, beta: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the pairs' losses over the pairs of all ranks' micro-batches of this step."""
        self.pulse.micro_batch += 1
        batch = Batch.of(inputs, self.engine.adapters.device)
        self.step_tokens += len(batch.ids)
        losses = pair_losses(log_ratios(self.engine, batch, training=True)[0], self.beta)
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() * dist.get_world_size() / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Pairs instead of labels."""
        pairs = sum(len(inputs["cu_seq_lens_q"]) // 2 for inputs in batch_samples)
        total = torch.tensor(pairs, device=device)
        dist.all_reduce(total)
        return total

    def held_out(self, batch: Batch) -> list[float]:
        ratios, policy = log_ratios(self.engine, batch, training=False)
        losses = pair_losses(ratios, self.beta)
        right = (ratios[0::2] > ratios[1::2]).sum().item()
        tokens = (batch.documents_of_labelled % 2 == 0).sum().item()
        return [losses.sum().item(), len(losses), -policy[0::2].sum().item(), tokens, right]

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        loss, pairs, chosen, tokens, right = sums
        return {
            "loss": loss / pairs,
            "chosen_loss": chosen / tokens,
            "accuracy": right / pairs,
            "pairs": int(pairs),
        }
