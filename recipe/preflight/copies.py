"""How fast bytes move between host and GPUs, and do they arrive from GPU to GPU? Prints JSON.

    python -m recipe.preflight.copies host     # each card to and from the host, pinned and not, and its PCIe link meanwhile
    python -m recipe.preflight.copies peers    # each card to each other one, compared with what was sent

How to read it: pinned copies reach about 80 % of the link: 25 GB/s at PCIe 4.0 x16, 12 at x8 or 3.0 x16, 6 at 3.0 x8. The
link's generation counts under load only: cards fall back to generation 1 when they idle.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from recipe.preflight.program import say

MIB = 2**20
HOST_MIB, PEER_MIB = 256, 64
REPEATS = 4
UNDER_LOAD_SECONDS = 0.5  # of copies in the queue while the link is read


def host_copies() -> None:
    import torch

    cards = []
    size = HOST_MIB * MIB
    _sensor("")  # NVML's start may take longer than the copies under which the link is read
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        pinned = torch.ones(size, dtype=torch.uint8).pin_memory()
        pageable = torch.ones(size, dtype=torch.uint8)
        there = torch.empty(size, dtype=torch.uint8, device=device)
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        found: dict[str, Any] = {"index": index, "uuid": uuid}
        ways: dict[str, tuple[Any, Any]] = {
            "pinned_to": (there, pinned),
            "pinned_from": (pinned, there),
            "pageable_to": (there, pageable),
            "pageable_from": (pageable, there),
        }
        for name, (target, source) in ways.items():
            copy = partial(target.copy_, source, non_blocking=True)
            found[name] = size / 2**30 / _best(copy, device)
        for _ in range(max(1, round(UNDER_LOAD_SECONDS * found["pinned_to"] / (size / 2**30)))):
            there.copy_(pinned, non_blocking=True)
        card = _sensor(uuid)
        torch.cuda.synchronize(device)
        if card:
            found |= {
                name: getattr(card, f"pcie_{name}")
                for name in ("generation", "width", "generation_max", "width_max")
            }
        cards.append(found)
        say(cards=cards)


def _sensor(uuid: str) -> Any:
    """NVML's reading of this card, or None."""
    from recipe import sensors

    try:
        return next((card for card in sensors.read() if card.uuid == uuid), None)
    except sensors.NoSensors:
        return None


def peer_copies() -> None:
    """The sent bytes come from the host and go back to it, so that only the way between the cards is judged."""
    import torch

    sent = torch.randint(0, 256, (PEER_MIB * MIB,), dtype=torch.uint8)
    pairs = []
    count = torch.cuda.device_count()
    for source in range(count):
        here = sent.to(torch.device("cuda", source))
        for target in range(count):
            if source == target:
                continue
            access = torch.cuda.can_device_access_peer(target, source)
            say(trying=f"GPU {source} to GPU {target}")
            # Zeros: memory that is used again may hold the right bytes of an earlier copy.
            there = torch.zeros_like(here, device=torch.device("cuda", target))
            copy = partial(there.copy_, here, non_blocking=True)
            seconds = _best(copy, there.device, here.device)
            pairs.append(
                {
                    "from": source,
                    "to": target,
                    "access": access,
                    "right": bool(torch.equal(there.cpu(), sent)),
                    "gib_per_second": PEER_MIB / 1024 / seconds,
                }
            )
            say(pairs=pairs)
    say(trying=None)


def _best(copy: Callable[[], Any], *devices: Any) -> float:
    """Seconds of the fastest of a few copies; the first warms up."""
    import torch

    best = float("inf")
    for _ in range(REPEATS):
        for device in devices:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        copy()
        for device in devices:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    {"host": host_copies, "peers": peer_copies}[sys.argv[1]]()
