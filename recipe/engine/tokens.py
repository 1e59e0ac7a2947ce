"""New tokens: rows of the embedding, and of the head, that are trained beside the adapters (PEFT's trainable tokens).

Whole rows take the place of the checkpoint's, which stay as they are. They are few, so every rank holds all of them in
fp32, steps them alike, and has the same gradient: the ranks' shares are gathered and added up in the ranks' order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from recipe.engine.head import VocabularyHead
from recipe.engine.products import mm32

EMBEDDING, HEAD = "embed_tokens", "lm_head"


def token_indices(ids: Iterable[int], tied: bool) -> list[int] | dict[str, list[int]] | None:
    """What PEFT's `trainable_token_indices` is told: a tied head follows by itself, another one has to be named."""
    rows = sorted(ids)
    if not rows:
        return None
    return rows if tied else {EMBEDDING: rows, HEAD: list(rows)}


class NewTokens:
    """Rows (sides, tokens, hidden): one side where the head is tied to the embedding, else the embedding's and the head's."""

    def __init__(
        self,
        ids: Iterable[int],
        tied: bool,
        hidden: int,
        mesh: DeviceMesh,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.ids = torch.tensor(sorted(ids))  # on the CPU, as a batch's are
        self.world, self.group = mesh.size(), mesh.get_group()
        self.device, self.dtype = device, dtype
        sides = 1 if tied else 2
        self.flat = nn.Parameter(torch.zeros(sides, len(self.ids), hidden, device=device))
        self.masters = self.flat.detach()
        self.gradients = torch.zeros_like(self.masters)
        # By the modules that PEFT wraps.
        self.parameters = {
            name: nn.Parameter(rows) for name, rows in zip((EMBEDDING, HEAD), self.masters, strict=False)
        }
        self._reference = self.masters.clone()

    def start(self, *rows: torch.Tensor) -> None:
        """Begin with the checkpoint's rows (tokens, hidden), which are the reference too: one tensor for each side."""
        for side, values in enumerate(rows):
            self.masters[side].copy_(values)
        self.freeze()

    def freeze(self) -> None:
        """The rows as they are now are the reference."""
        self._reference = self.masters.clone()

    # -- forward --------------------------------------------------------------------------------------------------

    def rows(self, reference: bool = False) -> torch.Tensor:
        """In the compute dtype, as PEFT rounds them."""
        return (self._reference if reference else self.masters).to(self.dtype)

    def put_into_embedded(self, x: torch.Tensor, ids: torch.Tensor, reference: bool) -> None:
        """x (tokens, hidden), looked up for ids (tokens,) on the CPU: overwritten where these stand."""
        where, which = self._places(ids)
        x[where] = self.rows(reference)[0][which]

    def put_into_head(self, head: VocabularyHead, reference: bool) -> None:
        """Overwrite the rows that this rank's slice of the head has."""
        which = ((self.ids >= head.first) & (self.ids < head.last)).nonzero()[:, 0]
        places = (self.ids[which] - head.first).to(self.device)
        head.weight[places] = self.rows(reference)[-1][which.to(self.device)]

    def _places(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where these stand among ids, and which each is."""
        which = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        where = (self.ids[which] == ids).nonzero()[:, 0]
        return where.to(self.device), which[where].to(self.device)

    # -- backward -------------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """The gradients start at zero."""
        self.gradients.zero_()
        self.flat.grad = self.gradients
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient

    def embedding_gradient(self, grad: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(tokens of ours, hidden) fp32, from that of the first layer's input (tokens, hidden).

        A product and not index_add, whose sums on a GPU are in any order.
        """
        where, which = self._places(ids)
        chosen = which[None] == torch.arange(len(self.ids), device=self.device)[:, None]
        return mm32(chosen.to(grad.dtype), grad[where])

    def head_gradient(
        self, hidden: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens of ours, hidden) fp32: (softmax - one-hot) of our columns, times what went into the head.

        normaliser: log of the sum that softmax divides by; weights: the gradient of each token's loss.
        """
        columns = (mm32(hidden, self.rows()[-1].t()) - normaliser[:, None]).exp_()
        columns -= (targets[:, None] == self.ids.to(self.device)).to(columns.dtype)
        return mm32(columns.mul_(weights[:, None]).to(hidden.dtype).t(), hidden)

    def add_gradient(self, mine: torch.Tensor) -> None:
        """Add the mean over the ranks of their shares (sides, tokens, hidden): a collective."""
        if self.world == 1:
            self.gradients.add_(mine)
            return
        everyones = mine.new_empty(self.world * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(everyones, mine, group=self.group)
        self.gradients.add_(everyones.view(self.world, *mine.shape).sum(0), alpha=1 / self.world)
