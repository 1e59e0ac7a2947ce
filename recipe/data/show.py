"""Rows as the model sees them, with what is not in the loss marked."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from transformers import PreTrainedTokenizerBase

from recipe.data.encode import IGNORED

GREY, PLAIN = "\x1b[2m", "\x1b[0m"


def shown_rows(
    documents: Iterable[tuple[list[int], list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    count: int = 3,
    color: bool = True,
) -> str:
    """The first rows; what is not in the loss is dim, or in brackets without colour."""
    return "\n".join(
        f"  row {number} ({len(ids)} tokens): " + marked(ids, labels, tokenizer, color).replace("\n", "⏎")
        for number, (ids, labels) in enumerate(islice(documents, count), 1)
    )


def marked(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, color: bool = True) -> str:
    grey, plain = (GREY, PLAIN) if color else ("[[", "]]")
    text, was_masked = "", False
    for token, label in zip(ids, labels, strict=True):
        masked = label == IGNORED
        if masked != was_masked:
            text += grey if masked else plain
            was_masked = masked
        text += tokenizer.decode([token])
    return text + (plain if was_masked else "")
