"""What every tool measures of an export, so that they can be compared: how likely it finds given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What a model thinks of one document's labelled tokens."""

    loss: float  # sum of the cross-entropy, nats
    tokens: int  # how many are labelled
    gap: float  # largest (logit of the likeliest token - logit of the labelled one); 0: a greedy answer is this very text


def mean_loss(scores: Sequence[Score]) -> float:
    """Mean cross-entropy per labelled token, nats."""
    return sum(score.loss for score in scores) / max(sum(score.tokens for score in scores), 1)
