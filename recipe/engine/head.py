"""The loss without the logits: each rank holds a slice of the vocabulary, and tokens go through it in chunks.

The head of a 70B model is 1.96 GiB and is never gathered; what travels are hidden states and two numbers per token.
The gradient of the hidden states is computed in the same pass, since softmax needs the very numbers that the loss does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from recipe.engine.marks import Mark, unmarked
from recipe.engine.products import mm32
from recipe.engine.rows import rows_of_rank, rows_per_rank

LOGITS_BYTES = 256 * 2**20  # of the fp32 logits that exist at once on a rank


class VocabularyHead:
    """weight: this rank's rows (slice, hidden) of the head, in the compute dtype."""

    def __init__(self, weight: torch.Tensor, vocab: int, mesh: DeviceMesh, chunk: int | None = None):
        self.weight, self.vocab = weight, vocab
        self.world, self.group = mesh.size(), mesh.get_group()
        self.first, self.last = rows_of_rank(vocab, self.world, mesh.get_local_rank())
        widest = rows_per_rank(vocab, self.world)
        self.chunk = chunk or max(16, LOGITS_BYTES // (4 * widest * self.world) // 16 * 16)

    def loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        backward: bool,
        mark: Mark = unmarked,
        normaliser: torch.Tensor | None = None,
    ):
        """hidden (tokens, hidden), targets (tokens,) -> losses (tokens,) fp32, and with `backward` the gradient of
        their sum with respect to hidden, else None. A collective: ranks may have different numbers of tokens.

        normaliser: (tokens,) fp32, filled with the log of the sum that each token's softmax divides by.
        """
        counts = self._counts(len(hidden), hidden.device)
        gradient = torch.empty_like(hidden) if backward else None
        losses = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, max(counts), self.chunk):
            mark("head and loss, chunk", start // self.chunk)
            own = slice(start, min(start + self.chunk, len(hidden)))
            rows = min(self.chunk, max(counts) - start)
            h, t = self._gather(hidden[own], targets[own], rows)
            part, sums, dh = self._chunk(h, t, backward)
            mine = slice(0, max(own.stop - own.start, 0))
            place = dist.get_rank(self.group) * rows if self.world > 1 else 0
            losses[own] = part[place : place + rows][mine]
            if normaliser is not None:
                normaliser[own] = sums[place : place + rows][mine]
            if gradient is not None:
                gradient[own] = self._scatter(dh, rows)[mine]
        return losses, gradient

    def _counts(self, count: int, device: torch.device) -> list[int]:
        if self.world == 1:
            return [count]
        counts = torch.empty(self.world, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(counts, torch.tensor([count], device=device), group=self.group)
        return counts.tolist()

    def _gather(self, hidden: torch.Tensor, targets: torch.Tensor, rows: int):
        """`rows` tokens of every rank, short ones filled up with zeros and the target -1, which is no word."""
        if self.world == 1:
            return hidden, targets
        padded = hidden.new_zeros(rows, hidden.shape[1])
        padded[: len(hidden)] = hidden
        wanted = targets.new_full((rows,), -1)
        wanted[: len(targets)] = targets
        everyones = hidden.new_empty(self.world * rows, hidden.shape[1])
        everyones_targets = targets.new_empty(self.world * rows)
        dist.all_gather_into_tensor(everyones, padded, group=self.group)
        dist.all_gather_into_tensor(everyones_targets, wanted, group=self.group)
        return everyones, everyones_targets

    def _chunk(self, h: torch.Tensor, targets: torch.Tensor, backward: bool):
        """Losses of some tokens, the logs of their softmax's sums, and this rank's share of the gradient of h."""
        z = mm32(h, self.weight.t())
        highest = z.amax(1) if z.shape[1] else z.new_full((len(z),), -torch.inf)
        if self.world > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        here = (targets >= self.first) & (targets < self.last)
        column = (targets - self.first).clamp(0, max(z.shape[1] - 1, 0))
        picked = z.gather(1, column[:, None])[:, 0] if z.shape[1] else torch.zeros_like(highest)
        z.sub_(highest[:, None]).exp_()
        sums = torch.stack([z.sum(1), torch.where(here, picked, torch.zeros_like(picked))])
        if self.world > 1:
            dist.all_reduce(sums, group=self.group)
        normaliser = sums[0].log() + highest
        losses = normaliser - sums[1]
        if not backward:
            return losses, normaliser, None
        z.div_(sums[0][:, None])
        if z.shape[1]:
            z.scatter_add_(1, column[:, None], -here[:, None].to(z.dtype))
        return losses, normaliser, z.to(h.dtype) @ self.weight

    def _scatter(self, gradient: torch.Tensor, rows: int) -> torch.Tensor:
        """The sum over the ranks of this rank's tokens' gradient; added up in fp32."""
        if self.world == 1:
            return gradient
        mine = torch.empty(rows, gradient.shape[1], device=gradient.device)
        dist.reduce_scatter_tensor(mine, gradient.float(), group=self.group)
        return mine
