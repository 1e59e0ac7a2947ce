"""The queues of work on a GPU: arithmetic, weights coming in, activations going out and back. On a CPU there is one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Streams:
    """`incoming` brings weights, `outgoing` and `returning` carry activations; arithmetic is the current stream."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.incoming = torch.cuda.Stream(device) if self.on_gpu else None
        self.outgoing = torch.cuda.Stream(device) if self.on_gpu else None
        self.returning = torch.cuda.Stream(device) if self.on_gpu else None

    def on(self, stream: Any):
        """What is queued within goes to `stream`."""
        return torch.cuda.stream(stream) if self.on_gpu else contextlib.nullcontext()

    def mark(self) -> Any:
        """An event at this point of the current queue."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """The current queue goes on only after `event`."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
