"""AdamW with LoRA+'s two learning rates over one tensor of all adapters."""

from __future__ import annotations

import torch


class LoraPlusAdamW(torch.optim.AdamW):
    """AdamW over `flat` (layers, local), whose columns from `first_of_b` on are B and learn `ratio` times as fast.

    What AdamW takes off a parameter, decay included, is its learning rate times something that does not depend on it.
    So all make B's step, and A's is then shortened: the same as two groups of parameters, with one state. Shortened, not
    lengthened: a step divided by `ratio` loses less in rounding than one multiplied by it.
    """

    def __init__(self, flat: torch.nn.Parameter, first_of_b: int, ratio: float, **options):
        super().__init__([flat], **options)
        self._a, self._ratio = flat.detach()[:, :first_of_b], ratio

    @torch.no_grad()
    def step(self, closure=None):
        before, (group,) = self._a.clone(), self.param_groups
        rate = group["lr"]
        group["lr"] = rate * self._ratio
        result = super().step(closure)
        group["lr"] = rate
        self._a.copy_(torch.lerp(before, self._a, 1 / self._ratio))
        return result
