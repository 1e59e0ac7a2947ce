"""A training step from tokens to gradients, over layers that come and go.

    embedding -> layer 0 ... layer N-1 -> norm -> head, loss   (forward: each layer's input is kept)
    layer 0 <- ... <- layer N-1 <- gradient of the loss        (backward: LoRA's gradients are reduced layer by layer)

To autograd all of it is one function of one number; see docs/engine.md for the way of one layer through a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from recipe.engine import kernels
from recipe.engine.activations import Activations
from recipe.engine.attention import Documents
from recipe.engine.head import VocabularyHead
from recipe.engine.layer import Kept, Pass
from recipe.engine.lora import Adapters, LoraView
from recipe.engine.marks import Mark, unmarked
from recipe.engine.memory import EmbeddingTable
from recipe.engine.tokens import NewTokens
from recipe.engine.weights import LayerStore, LayerView
from recipe.plan.placement import NOTHING, Placement

IGNORED = -100


class Arithmetic(Protocol):
    """What layer.py (fused) and plain.py do alike."""

    def forward(
        self, x: torch.Tensor, layer: LayerView, step: Pass, keep: frozenset[str]
    ) -> tuple[torch.Tensor, Kept]: ...

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, kept: Kept, layer: LayerView, step: Pass, sink: LoraView
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Batch:
    """One packed row: ids, position_ids (tokens,), where its documents lie, which tokens have a label, and which."""

    ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    labelled: torch.Tensor
    targets: torch.Tensor

    @property
    def documents_of_labelled(self) -> torch.Tensor:
        """The number of the document that each labelled token is in."""
        return torch.searchsorted(
            self.documents.bounds[1:].to(self.labelled.dtype), self.labelled, right=True
        )

    @classmethod
    def of(cls, inputs: dict[str, Any], device: torch.device) -> Batch:
        """From what PackedCollator makes: tensors (1, tokens), labels -100 where a token is not in the loss."""
        ids, labels = inputs["input_ids"][0], inputs["labels"][0].to(device)
        tokens = len(ids)
        bounds = inputs.get("cu_seq_lens_q")
        starts = bounds.tolist() if bounds is not None else [0, tokens]
        positions = inputs.get("position_ids")
        where = positions[0] if positions is not None else torch.arange(tokens)
        labelled = (labels[1:] != IGNORED).nonzero()[:, 0]
        return cls(ids.cpu(), where.to(device), Documents.of(starts, device), labelled, labels[1:][labelled])


@dataclass
class Left:
    """What a forward leaves for its backward besides activations: the gradient of the labelled tokens' last states.

    That of the sum of their losses. Each token's row stands for its own loss alone, so a weight per token makes of it
    the gradient of any function of the losses. hidden and normaliser: what went into the head and the log of each
    softmax's sum, for the head's rows of new tokens.
    """

    step: Pass
    gradient: torch.Tensor | None
    batch: Batch
    hidden: torch.Tensor | None = None
    normaliser: torch.Tensor | None = None

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """The gradient of all tokens' last states (tokens, hidden), by a weight per labelled token; what it was made from
        is let go."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None, "a loss goes backward once"
        gradient.mul_(weights[:, None])
        grad = gradient.new_zeros(len(self.batch.ids), gradient.shape[1])
        grad[self.batch.labelled] = gradient
        return grad


class Engine:
    """The model of one rank. Built by recipe.engine.load."""

    def __init__(
        self,
        store: LayerStore,
        adapters: Adapters,
        embedding: EmbeddingTable,
        rotary: nn.Module,
        norm: torch.Tensor,
        head: VocabularyHead,
        eps: float,
        arithmetic: Arithmetic,
        activations: Activations,
        placement: Placement,
        dropout: float,
        neftune_alpha: float = 0.0,
        mark: Mark = unmarked,
    ):
        self.store, self.adapters, self.embedding, self.rotary = store, adapters, embedding, rotary
        self.norm, self.head, self.eps = norm, head, eps
        self.arithmetic, self.activations, self.placement = arithmetic, activations, placement
        self.dropout, self.neftune_alpha, self.mark = dropout, neftune_alpha, mark
        # Something that autograd follows: the real parameters get their gradients from us.
        self._anchor = torch.zeros((), device=adapters.device, requires_grad=True)

    def loss(self, batch: Batch, training: bool) -> torch.Tensor:
        """The sum of `losses`."""
        return self.losses(batch, training).sum()

    def losses(self, batch: Batch, training: bool) -> torch.Tensor:
        """The cross-entropy of each labelled token of a micro-batch, fp32; a collective, like its backward.

        Under torch.enable_grad, `backward()` on what is made of them adds the mean over the ranks to the LoRA
        parameters' gradients. `training` turns dropout and noise on; both come from torch's random state.
        """
        if torch.is_grad_enabled():
            return _Losses.apply(self._anchor, self, batch, training)
        return self._forward(batch, training, recording=False)[0]

    @torch.no_grad()
    def reference_losses(self, batch: Batch) -> torch.Tensor:
        """`losses` of the model before this training: adapters off, or the ones that it began with (Adapters.freeze).

        Not between the losses of a micro-batch and their backward.
        """
        return self._forward(batch, training=False, recording=False, reference=True)[0]

    def _forward(self, batch: Batch, training: bool, recording: bool, reference: bool = False):
        probability = self.dropout if training else 0.0
        draw = int(torch.randint(2**40, ())) if probability else 0
        device, dtype = self.adapters.device, self.adapters.dtype
        x = self.embedding.lookup(batch.ids, device, dtype)
        tokens = self.adapters.tokens
        if tokens is not None:
            tokens.put_into_embedded(x, batch.ids, reference)
            tokens.put_into_head(self.head, reference)
        if training and self.neftune_alpha:
            _add_noise(x, batch.documents, self.neftune_alpha)
        cosine, sine = self.rotary(x[None], batch.position_ids[None])
        step = Pass(batch.documents, cosine[0], sine[0], probability, draw)
        self.activations.clear()
        self.store.begin(reference)
        for i, keep in enumerate(self.placement.keep):
            self.mark("gather for forward layer", i)
            layer = self.store.use(i, 1)
            self.mark("forward layer", i)
            out, kept = self.arithmetic.forward(x, layer, step, keep if recording else NOTHING)
            self.store.done()
            if recording:
                self.activations.save(i, {"x": x, **kept})
            x, kept = out, {}
        self.mark("gather for the head")
        # A row without labels still takes part in what ranks do together.
        labelled = batch.labelled
        hidden = x[labelled]
        normed = kernels.rms_norm(hidden, self.norm, self.eps)
        normaliser = torch.empty(len(labelled), device=device) if tokens is not None else None
        losses, gradient = self.head.loss(normed, batch.targets, recording, self.mark, normaliser)
        left = Left(step, gradient, batch, normed if tokens is not None else None, normaliser)
        del normed
        if gradient is not None:
            left.gradient = kernels.rms_norm_backward(gradient, hidden, self.norm, self.eps, None)
        return losses, left

    def _backward(self, weights: torch.Tensor, left: Left) -> None:
        """weights: the gradient of each labelled token's loss. The largest is a factor of its own, see below."""
        largest = weights.abs().amax() if len(weights) else weights.sum()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        weights = weights / scale
        tokens = self.adapters.tokens
        self.adapters.begin_backward()
        rows = self._rows_of_head(tokens, left, weights) if tokens is not None else None
        grad = left.spread(weights)
        for i in reversed(range(len(self.placement.keep))):
            self.activations.fetch(i)
            self.activations.fetch(i - 1)
            self.mark("gather for backward layer", i)
            layer = self.store.use(i, -1)
            self.mark("backward layer", i)
            kept = self.activations.take(i)
            sink = self.adapters.empty_gradient()
            grad = self.arithmetic.backward(grad, kept.pop("x"), kept, layer, left.step, sink)
            self.store.done()
            # In fp32: fp16 would lose what a mean over many tokens leaves of a gradient.
            sink.run.mul_(scale)
            self.adapters.add_gradient(i, sink)
        self.mark("reduce-scatter of the last gradients")
        self.adapters.end_backward()
        if tokens is not None and rows is not None:
            self.mark("gather the new tokens' gradients")
            rows[0] += tokens.embedding_gradient(grad, left.batch.ids)
            tokens.add_gradient(rows.mul_(scale))

    @staticmethod
    def _rows_of_head(tokens: NewTokens, left: Left, weights: torch.Tensor) -> torch.Tensor:
        """New tokens' gradient as far as it comes out of the head, zero for the embedding; what it needed is let go."""
        hidden, normaliser = left.hidden, left.normaliser
        left.hidden = left.normaliser = None
        assert hidden is not None and normaliser is not None
        rows = torch.zeros_like(tokens.masters)
        rows[-1] = tokens.head_gradient(hidden, normaliser, left.batch.targets, weights)
        return rows

    def close(self) -> None:
        """Give the host memory back."""
        self.store.close()
        self.activations.close()


def _add_noise(x: torch.Tensor, documents: Documents, alpha: float) -> None:
    """NEFTune: uniform noise of at most alpha / sqrt(tokens of the document x hidden), added in place.

    It is drawn once: the backward needs no embedding, and the first layer's input is kept with its noise.
    """
    lengths = documents.bounds.diff()
    largest = alpha / (lengths.float() * x.shape[1]).sqrt()
    noise = torch.empty_like(x).uniform_(-1, 1)
    x += noise.mul_(torch.repeat_interleave(largest, lengths, output_size=len(x))[:, None])


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, engine: Engine, batch: Batch, training: bool):
        losses, ctx.left = engine._forward(batch, training, recording=True)
        ctx.engine = engine
        return losses

    @staticmethod
    def backward(ctx, *grads):
        ctx.engine._backward(grads[0], ctx.left)
        ctx.left = None
        return None, None, None, None
