"""Attention over a packed row with its backward called by name, so that the caller says what is kept in between.

q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), causal, documents apart. Three ways:
variable-length FlashAttention inside torch; cuDNN document by document, which is twice as fast on data-centre cards
but costs a launch per document; and plain SDPA document by document, which works everywhere.

The plain layer gets the third, through transformers' registry of attention functions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

# cuDNN's kernels win where documents are long; below, one launch for all documents does. It refuses a single token.
CUDNN_MEAN_TOKENS = 1024
CUDNN_FEWEST_TOKENS = 64
CUDNN_HEAD_DIMS = (64, 128)
BY_DOCUMENT = "recipe_by_document"  # sdpa_by_document, for `attn_implementation`


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row lie: bounds (documents + 1,) int32 on the device, and on the host."""

    bounds: torch.Tensor
    starts: list[int]
    longest: int
    shortest: int

    @classmethod
    def of(cls, starts: list[int], device: torch.device) -> Documents:
        """starts: 0, the first token of each further document, and the number of tokens."""
        lengths = [b - a for a, b in itertools.pairwise(starts)]
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), starts, max(lengths), min(lengths))

    @property
    def spans(self) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise(self.starts)]


@dataclass(frozen=True)
class Attended:
    """The output (tokens, heads, head_dim) and what the backward needs besides q, k and v."""

    out: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()


class Attention:
    """kind: `varlen` or `sdpa` (recipe.engine.devices chooses). window: tokens that a token sees, or None."""

    def __init__(self, kind: str, scale: float):
        self.kind, self.scale = kind, scale

    def way(self, q: torch.Tensor, documents: Documents, window: int | None) -> str:
        if self.kind != "varlen":
            return "sdpa"
        cudnn = (
            q.dtype in (torch.bfloat16, torch.float16)
            and (window is None or documents.longest <= window)
            and q.shape[0] >= CUDNN_MEAN_TOKENS * (len(documents.starts) - 1)
            and documents.shortest >= CUDNN_FEWEST_TOKENS
            and q.shape[-1] in CUDNN_HEAD_DIMS
            and not torch.are_deterministic_algorithms_enabled()  # its backward is not
            and torch.cuda.get_device_capability(q.device)[0] >= 9
        )
        return "cudnn" if cudnn else "varlen"

    def forward(self, q, k, v, documents: Documents, window: int | None = None) -> Attended:
        way = self.way(q, documents, window)
        if way == "varlen":
            out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, *self._bounds(documents), 0.0, True, False, **self._window(window)
            )
            return Attended(out, (lse, rng, unused))
        if way == "cudnn":
            return self._cudnn_forward(q, k, v, documents)
        return Attended(self._sdpa(q, k, v, documents, window))

    def backward(self, grad, q, k, v, attended: Attended, documents: Documents, window: int | None = None):
        """grad (tokens, heads, head_dim) -> gradients of q, k, v in their shapes."""
        way = self.way(q, documents, window)
        if way == "varlen":
            lse, rng, unused = attended.extra
            bounds = self._bounds(documents)
            return torch.ops.aten._flash_attention_backward(
                grad, q, k, v, attended.out, lse, *bounds, 0.0, True, rng, unused, **self._window(window)
            )
        if way == "cudnn":
            return self._cudnn_backward(grad, q, k, v, attended, documents)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            out = self._sdpa(leaves[0], leaves[1], leaves[2], documents, window)
        return torch.autograd.grad(out, leaves, grad)

    def _sdpa(self, q, k, v, documents: Documents, window: int | None) -> torch.Tensor:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        out, _ = sdpa_by_document(
            None, query, key, value, None, self.scale, sliding_window=window, bounds=documents.starts
        )
        return out[0]

    def _bounds(self, documents: Documents) -> tuple:
        return documents.bounds, documents.bounds, documents.longest, documents.longest

    def _window(self, window: int | None) -> dict:
        sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        return {"scale": self.scale, **sides}

    def _cudnn_forward(self, q, k, v, documents: Documents) -> Attended:
        out = None
        extra: list[torch.Tensor] = []
        for span in documents.spans:
            made = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(_heads_first(tensor[span]) for tensor in (q, k, v)),
                None,
                True,
                0.0,
                True,
                False,
                scale=self.scale,
            )
            part = made[0][0].transpose(0, 1)
            extra += [made[1], made[6], made[7]]
            if len(part) == len(q):
                return Attended(part, tuple(extra))
            out = torch.empty_like(q) if out is None else out
            out[span].copy_(part)
        return Attended(out, tuple(extra))

    def _cudnn_backward(self, grad, q, k, v, attended: Attended, documents: Documents):
        gradients: tuple[torch.Tensor, ...] = ()
        for number, span in enumerate(documents.spans):
            lse, seed, offset = attended.extra[3 * number : 3 * number + 3]
            tokens = span.stop - span.start
            parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                _heads_first(grad[span]),
                *(_heads_first(tensor[span]) for tensor in (q, k, v)),
                _heads_first(attended.out[span]),
                lse,
                seed,
                offset,
                None,
                None,
                None,
                tokens,
                tokens,
                0.0,
                True,
                scale=self.scale,
            )
            parts = tuple(part[0].transpose(0, 1) for part in parts)
            if tokens == len(q):
                return parts
            gradients = gradients or tuple(torch.empty_like(tensor) for tensor in (q, k, v))
            for whole, part in zip(gradients, parts, strict=True):
                whole[span].copy_(part)
        return gradients


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (1, heads, tokens, head_dim), a view."""
    return tensor.transpose(0, 1).unsqueeze(0)


def register() -> str:
    """Make sdpa_by_document known to transformers, without a mask; the name for `attn_implementation`."""
    AttentionInterface.register(BY_DOCUMENT, sdpa_by_document)
    AttentionMaskInterface.register(BY_DOCUMENT, lambda *args, **kwargs: None)
    return BY_DOCUMENT


def sdpa_by_document(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    bounds=None,
    **kwargs,
):
    """query (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim) -> (1, tokens, heads, head_dim).

    The documents' bounds come as a tensor, as transformers hands them down, or as a list in `bounds`.
    """
    if bounds is None:
        bounds = cu_seq_lens_q.tolist() if cu_seq_lens_q is not None else [0, query.shape[2]]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        mask = _window(end - start, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(tokens: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    if not sliding_window or tokens <= sliding_window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)
