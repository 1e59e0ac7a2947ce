"""AdamW with LoRA+'s two learning rates over one tensor of all adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LoraPlusAdamW(torch.optim.AdamW):
    """AdamW over `flat` (layers, local), whose columns from `first_of_b` on are B and learn `ratio` times as fast.

    What AdamW takes off a parameter, decay included, is its learning rate times something that does not depend on it.
    So all make B's step, and A's is then shortened: the same as two groups of parameters, with one state. Shortened, not
    lengthened: a step divided by `ratio` loses less in rounding than one multiplied by it. `others` learn as A does.
    """

    def __init__(
        self,
        flat: torch.nn.Parameter,
        first_of_b: int,
        ratio: float,
        others: Sequence[torch.nn.Parameter] = (),
        **options,
    ):
        super().__init__([flat, *others], **options)
        self._slow = [flat.detach()[:, :first_of_b], *(other.detach() for other in others)]
        self._ratio = ratio

    @torch.no_grad()
    def step(self, closure=None):
        before, (group,) = [part.clone() for part in self._slow], self.param_groups
        rate = group["lr"]
        group["lr"] = rate * self._ratio
        result = super().step(closure)
        group["lr"] = rate
        for part, old in zip(self._slow, before, strict=True):
            part.copy_(torch.lerp(old, part, 1 / self._ratio))
        return result
