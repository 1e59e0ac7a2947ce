"""What a forward leaves for its backward: the input of every layer, and what a plan keeps besides, here or on the host.

Host room is one pinned pool of exactly the size that the longest micro-batch needs, made once. Copies run beside the
arithmetic: to the host while the next layers compute, back one layer ahead of the backward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from recipe.engine.memory import HostPool
from recipe.engine.streams import Streams

ALIGNMENT = 256
STAYS = "extra"  # softmax statistics and random states: small, and of a shape that depends on the kernel
IN_FLIGHT = 2  # layers whose copies to the host may be under way


@dataclass
class Saved:
    """The tensors of one layer: on the device, or (shape, dtype, bytes) in the layer's slot of the pool."""

    here: dict[str, torch.Tensor]
    away: dict[str, tuple[torch.Size, torch.dtype, torch.Tensor]]
    ready: Any = None


class Activations:
    """slots: bytes of host room for each layer, 0 where its tensors stay on the device."""

    def __init__(self, slots: list[int], device: torch.device, streams: Streams):
        self.device, self.streams = device, streams
        self.pool = HostPool(sum(slots), device, "activations kept on the host")
        self._slots = [self.pool.take(size) for size in slots]
        self._saved: dict[int, Saved] = {}
        self._leaving: deque[tuple[Any, list[torch.Tensor]]] = deque()

    def save(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of a layer. Those that go to the host must not be written to afterwards."""
        slot = self._slots[layer]
        saved = Saved({}, {})
        self._saved[layer] = saved
        if not len(slot):
            saved.here = tensors
            return
        used, leaving = 0, []
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        queued = self.streams.mark()
        with self.streams.on(self.streams.outgoing):
            self.streams.wait(queued)
            for name, tensor in tensors.items():
                if name.startswith(STAYS):
                    saved.here[name] = tensor
                    continue
                room = slot[used : used + tensor.nbytes]
                assert len(room) == tensor.nbytes, f"the host room of layer {layer} is too small"
                room.copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
                saved.away[name] = (tensor.shape, tensor.dtype, room)
                leaving.append(tensor)
                used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            self._leaving.append((self.streams.mark(), leaving))
        while len(self._leaving) > IN_FLIGHT:
            self._let_go()

    def _let_go(self) -> None:
        """Free the oldest tensors that were copied: later work on their memory waits for the copy."""
        copied, tensors = self._leaving.popleft()
        self.streams.wait(copied)
        tensors.clear()

    def fetch(self, layer: int) -> None:
        """Begin to copy a layer's tensors back."""
        saved = self._saved.get(layer)
        if saved is None or saved.ready is not None or not saved.away:
            return
        while self._leaving:
            self._let_go()
        for name, (shape, dtype, _) in saved.away.items():
            saved.here[name] = torch.empty(shape, dtype=dtype, device=self.device)
        queued = self.streams.mark()
        with self.streams.on(self.streams.returning):
            self.streams.wait(queued)
            for name, (_, _, room) in saved.away.items():
                saved.here[name].view(-1).view(torch.uint8).copy_(room, non_blocking=True)
            saved.ready = self.streams.mark() or True

    def take(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, on the device; they are the caller's from now on."""
        self.fetch(layer)
        saved = self._saved.pop(layer)
        if saved.ready is not None and saved.ready is not True:
            self.streams.wait(saved.ready)
        return saved.here

    def clear(self) -> None:
        """Forget what an interrupted forward has left."""
        while self._leaving:
            self._let_go()
        self._saved.clear()

    def close(self) -> None:
        self.pool.close()
