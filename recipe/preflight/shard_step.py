"""One training step of a small model that FSDP2 shards over all ranks, against the same step unsharded.

What it proves: gather, compute, reduce-scatter and the optimizer work together here; training differs only in size.
"""

from __future__ import annotations

import copy
from typing import Any

WIDTH, ROWS = 256, 32
TOLERANCE = 1e-4  # fp32, sums in another order; TF32 is off


def shard_step(rank: int, ranks: int, device: Any) -> dict[str, float]:
    """Losses before and after one step, sharded and not. Ends the rank where they differ, here or from another rank's.

    Each rank has rows of its own: the unsharded model sees all of them, so a gradient that stays local shows.
    """
    import torch
    from torch import distributed, nn
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5
    plain.to(device)
    sharded = copy.deepcopy(plain)
    mesh = distributed.init_device_mesh(device.type, (ranks,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    rows = torch.randn(ranks, ROWS, WIDTH, generator=generator).to(device)
    expected = _two_losses(plain, rows.flatten(0, 1))
    found = [_mean_over_ranks(loss, ranks) for loss in _two_losses(sharded, rows[rank])]
    for name, ours, reference in zip(("before", "after"), found, expected, strict=True):
        if not abs(ours - float(reference)) <= TOLERANCE * abs(float(reference)):
            raise SystemExit(
                f"rank {rank}: loss {name} the sharded step is {ours:.6f}, unsharded {float(reference):.6f}"
            )
    return {"loss": found[0], "loss_after": found[1], "difference": abs(found[1] - float(expected[1]))}


def _two_losses(model: Any, rows: Any) -> list[Any]:
    """The loss, and the loss after a step of SGD."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = model(rows).square().mean()
    first.backward()
    optimizer.step()
    with torch.no_grad():
        second = model(rows).square().mean()
    return [first.detach(), second]


def _mean_over_ranks(loss: Any, ranks: int) -> float:
    from torch import distributed

    distributed.all_reduce(loss)
    return float(loss) / ranks
