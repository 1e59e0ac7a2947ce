"""Matmuls on each card alone, then on all cards in step; are they fast, steady, and always the same? Prints JSON.

    python -m recipe.preflight.load cuda 10       # all GPUs, 10 s
    python -m recipe.preflight.load cpu,cpu 2     # two "cards" that are this CPU

How to read it: `tflops` is one card alone, 16-bit with fp32 sums; `tflops_together` while all work. Bursts begin on all
cards at once, since training does so too, and that step in power is what weak supplies do not survive. `damaged` counts
bursts whose result was not that of the first, `unlike` the cards whose result is not the first card's.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from recipe.preflight.program import say

SIDE = {"cuda": 8192, "cpu": 256}
BURST_SECONDS, PAUSE_SECONDS = 0.3, 0.05
WARM = 2  # products, until the libraries are loaded
ALONE_SECONDS = 0.5  # clocks take a while to rise: so long before the rate is taken, and so long for it


class Card:
    """One device with its matrices: the same numbers on every card."""

    def __init__(self, device: Any):
        import torch

        self.device = device
        on_gpu = device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        self.uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if on_gpu else ""
        has_bf16 = on_gpu and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = torch.float32 if not on_gpu else torch.bfloat16 if has_bf16 else torch.float16
        generator = torch.Generator().manual_seed(0)
        self.side = SIDE[device.type]
        a, b = (torch.randn(self.side, self.side, generator=generator) for _ in range(2))
        self.a, self.b = a.to(device, dtype), b.to(device, dtype)
        self.out = self.a @ self.b
        self.first = self.out.clone()
        self.damaged = 0
        self.tflops = 0.0

    def begin(self, products: int) -> None:
        import torch

        for _ in range(products):
            torch.matmul(self.a, self.b, out=self.out)

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_of(self, products: int) -> float:
        self.wait()
        started = time.perf_counter()
        self.begin(products)
        self.wait()
        return (time.perf_counter() - started) / products


def load(devices: list[Any], seconds: float) -> None:
    import torch

    cards = [Card(device) for device in devices]
    for card in cards:
        card.seconds_of(WARM)
        products = max(1, round(ALONE_SECONDS / card.seconds_of(WARM)))
        card.seconds_of(products)
        card.tflops = 2 * card.side**3 / card.seconds_of(products) / 1e12
        say(cards=[{"name": c.name, "uuid": c.uuid, "tflops": c.tflops} for c in cards if c.tflops])
    slowest = min(card.tflops for card in cards)
    products = max(1, round(BURST_SECONDS * slowest * 1e12 / (2 * cards[0].side ** 3)))
    readings: dict[str, dict[str, Any]] = {}
    _read({}, {card.uuid for card in cards if card.uuid})  # NVML's start may take longer than a burst
    bursts, busy, end = 0, 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        for card in cards:
            card.begin(products)
        _read(readings, {card.uuid for card in cards if card.uuid})
        for card in cards:
            card.wait()
        busy += time.perf_counter() - started
        bursts += 1
        for card in cards:
            card.damaged += not torch.equal(card.out, card.first)
        time.sleep(PAUSE_SECONDS)
    together = 2 * cards[0].side ** 3 * products * bursts / busy / 1e12
    alike = [card for card in cards if card.name == cards[0].name]
    unlike = [cards.index(card) for card in alike if not torch.equal(card.first.cpu(), cards[0].first.cpu())]
    say(bursts=bursts, tflops_together=together, damaged=[card.damaged for card in cards], unlike=unlike,
        readings=readings)  # fmt: skip


def _read(readings: dict[str, dict[str, Any]], uuids: set[str]) -> None:
    """Highest temperature and power, lowest clock, and every reason to hold back so far, by the card's uuid."""
    if not uuids:
        return
    from recipe import sensors

    try:
        found = [card for card in sensors.read() if card.uuid in uuids]
    except sensors.NoSensors:
        return
    for card in found:
        seen = readings.setdefault(card.uuid, {"celsius": 0, "watts": 0.0, "clock_mhz": None, "reasons": []})
        seen["celsius"] = max(seen["celsius"], card.temperature_celsius or 0)
        seen["watts"] = max(seen["watts"], card.power_watts or 0.0)
        clocks = [clock for clock in (seen["clock_mhz"], card.sm_clock_mhz) if clock is not None]
        seen["clock_mhz"] = min(clocks, default=None)
        seen["reasons"] = sorted({*seen["reasons"], *(card.throttle_reasons or ())})


def main(names: str, seconds: float) -> None:
    import torch

    if names == "cuda":
        load([torch.device("cuda", index) for index in range(torch.cuda.device_count())], seconds)
    else:
        load([torch.device(name) for name in names.split(",")], seconds)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
