"""Attention over packed rows: several documents lie in one row, and none may see another.

transformers hands the document boundaries down to the attention function as `cu_seq_lens_q` (what
DataCollatorWithFlattening produces for FlashAttention). We register two functions that use them: torch's own
variable-length kernel (GPU), and SDPA document by document, which needs no (tokens x tokens) mask.
"""

from __future__ import annotations

import inspect
import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

VARLEN = "recipe_varlen"
SDPA = "recipe_sdpa"


def attention_name(kind: str) -> str:
    """The name for `attn_implementation`, registered with transformers."""
    AttentionInterface.register(VARLEN, varlen)
    AttentionInterface.register(SDPA, sdpa_by_document)
    for name in (VARLEN, SDPA):
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return {"varlen": VARLEN, "sdpa": SDPA}.get(kind, kind)


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


def varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **kwargs,
):
    """The same on a GPU in one kernel (torch.nn.attention.varlen, FlashAttention inside torch)."""
    from torch.nn.attention.varlen import varlen_attn

    tokens = query.shape[2]
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = (
            torch.tensor([0, tokens], dtype=torch.int32, device=query.device),
            tokens,
        )
    window = (sliding_window - 1 if sliding_window else -1, 0)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    shared_heads = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            shared_heads = {"enable_gqa": True}
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        **shared_heads,
    )
    return out.unsqueeze(0), None


def _window(tokens: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    if not sliding_window or tokens <= sliding_window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)
