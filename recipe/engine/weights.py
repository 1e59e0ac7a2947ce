"""The frozen layers: each rank holds its slice of every layer, on its GPU or in host RAM, and sees them whole in turn.

A layer that a rank holds whole on its GPU is used where it lies. Every other layer passes through one of two buffers:
while one layer computes, the next one is copied from the host and gathered from the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from recipe.engine.layout import Constants, Layout, Weight
from recipe.engine.lora import Adapters, LoraView
from recipe.engine.memory import HostPool
from recipe.engine.streams import Streams

BUFFERS = 2


@dataclass
class Buffer:
    """Room for one gathered layer; `layer` is whose bytes are in it or under way."""

    run: torch.Tensor  # (layout.size,) uint8
    staging: torch.Tensor | None  # a slice on its way from the host to the other ranks
    adapters: torch.Tensor | None  # (world * local,) in the compute dtype; None for a single rank
    layer: int | None = None
    ready: Any = None
    free: Any = None


@dataclass(frozen=True)
class LayerView:
    """One layer as the arithmetic sees it: NF4 matrices, norms and biases, LoRA matrices."""

    index: int
    run: torch.Tensor
    layout: Layout
    constants: dict[str, Constants]
    small: dict[str, torch.Tensor]
    lora: LoraView

    def weight(self, name: str) -> Weight:
        return self.layout.weight(self.run, name, self.constants[name])


class LayerStore:
    """All decoder layers of a rank; filled by recipe.engine.load.

    shards: (slice_bytes,) uint8 of each layer, on the device or in host RAM
    constants, small: what every rank holds whole of each layer (some KiB)
    """

    def __init__(
        self,
        layout: Layout,
        adapters: Adapters,
        device: torch.device,
        offloaded: tuple[bool, ...],
        streams: Streams,
    ):
        self.layout, self.adapters, self.device = layout, adapters, device
        self.offloaded, self.streams = offloaded, streams
        world, size = layout.world, layout.slice_bytes
        self.pool = HostPool(size * sum(offloaded), device, f"{sum(offloaded)} offloaded layers")
        self.shards = [
            self.pool.take(size) if off else torch.empty(size, dtype=torch.uint8, device=device)
            for off in offloaded
        ]
        self.constants: list[dict[str, Constants]] = [{} for _ in offloaded]
        self.small: list[dict[str, torch.Tensor]] = [{} for _ in offloaded]
        # The layers that pass through a buffer.
        self.travelling = [i for i, off in enumerate(offloaded) if off or world > 1]
        self._buffers = [self._buffer() for _ in range(min(BUFFERS, len(self.travelling)))]
        self._in_use: Buffer | None = None
        self._reference = False
        self._begun: Any = None

    def _buffer(self) -> Buffer:
        def empty(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=self.device)

        world = self.layout.world
        return Buffer(
            run=empty(self.layout.size),
            staging=empty(self.layout.slice_bytes) if world > 1 and any(self.offloaded) else None,
            adapters=empty(world * self.adapters.local_size, self.adapters.dtype) if world > 1 else None,
        )

    def begin(self, reference: bool = False) -> None:
        """Before each forward: the optimizer may have changed the LoRA matrices, so what was gathered of them is old.

        reference: with the adapters that training began with, or without any (Adapters.has_reference).
        """
        self._reference = reference
        self._begun = self.streams.mark()
        self._in_use = None  # an interrupted pass may have left one
        for buffer in self._buffers:
            if buffer.adapters is not None:
                buffer.layer = None

    def use(self, layer: int, step: int) -> LayerView:
        """The whole layer; `step` is 1 in the forward and -1 in the backward, and says which ones are fetched ahead.

        What it returns may be overwritten after `done`.
        """
        buffer = self._fetch([layer]) if layer in self.travelling else None
        self._in_use = buffer
        ahead = self.travelling if step > 0 else self.travelling[::-1]
        self._fetch([i for i in ahead if (i - layer) * step > 0][:BUFFERS])
        if buffer is not None:
            self.streams.wait(buffer.ready)
        gathered = buffer.adapters if buffer is not None else None
        if self._without_adapters:
            lora = self.adapters.off()
        elif gathered is None:
            lora = self.adapters.view(self.adapters.local_half(layer, self._reference))
        else:
            lora = self.adapters.view(gathered)
        run = self.shards[layer] if buffer is None else buffer.run
        return LayerView(layer, run, self.layout, self.constants[layer], self.small[layer], lora)

    @property
    def _without_adapters(self) -> bool:
        return self._reference and not self.adapters.has_reference()

    def done(self) -> None:
        """The arithmetic on the layer in use is queued."""
        if self._in_use is not None:
            self._in_use.free = self.streams.mark()
            self._in_use = None

    def _fetch(self, wanted: list[int]) -> Buffer | None:
        """Begin to fetch the layers that are not here yet, as far as there are buffers; the first one's buffer."""
        here = {buffer.layer: buffer for buffer in self._buffers}
        for layer in wanted:
            if layer in here:
                continue
            unused = [b for b in self._buffers if b is not self._in_use and b.layer not in wanted]
            if not unused:
                break
            buffer = here[layer] = unused[0]
            with self.streams.on(self.streams.incoming):
                self.streams.wait(buffer.free)
                self.streams.wait(self._begun)
                self._fill(buffer, layer)
                buffer.ready = self.streams.mark()
            buffer.layer = layer
        return here[wanted[0]] if wanted and wanted[0] in here else None

    def _fill(self, buffer: Buffer, layer: int) -> None:
        shard = self.shards[layer]
        if self.layout.world == 1:
            buffer.run.copy_(shard, non_blocking=True)
            return
        if self.offloaded[layer]:
            assert buffer.staging is not None
            shard = buffer.staging.copy_(shard, non_blocking=True)
        assert buffer.adapters is not None
        travels = [(buffer.run, shard)]
        if not self._without_adapters:
            travels.append((buffer.adapters, self.adapters.local_half(layer, self._reference)))
        for gathered, mine in travels:
            work = dist.all_gather_into_tensor(gathered, mine, group=self.adapters.group, async_op=True)
            work.wait()

    def close(self) -> None:
        self.pool.close()
