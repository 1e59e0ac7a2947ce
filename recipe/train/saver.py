"""Writes checkpoints beside the training: what is trained is copied, and a thread of each rank brings it to the disk.

The training stands still only for the copies: a rank's slices of the adapters and of both moments. The threads then
send them to rank 0, layer by layer, over a process group of their own, and rank 0 writes whole tensors as they come, so
that no rank ever holds another's. A checkpoint counts once it has its name; then all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from recipe.engine.marks import Mark, unmarked
from recipe.files import sha256_of, write_text, written_aside
from recipe.train import checkpoint

if TYPE_CHECKING:
    from recipe.engine.lora import Adapters

MASTERS = "masters"


@dataclass(frozen=True)
class Place:
    """Where a training stands after a whole step: what a checkpoint holds besides tensors that are trained.

    ready: recorded on the stream that computes, after the step; None on a CPU.
    """

    step: int
    scheduler: dict[str, Any]
    random: dict[str, torch.Tensor]
    ready: Any = None

    @classmethod
    def here(cls, step: int, scheduler: dict[str, Any]) -> Place:
        ready = torch.cuda.Event() if torch.cuda.is_available() else None
        if ready is not None:
            ready.record()
        return cls(step, scheduler, checkpoint.random_state(), ready)


class Saver:
    """One checkpoint at a time. The constructor, `begin` and `wait` are collectives."""

    def __init__(self, model: nn.Module, adapters: Adapters):
        self.adapters = adapters
        names = {id(parameter): name for name, parameter in checkpoint.trained_parameters(model)}
        # Of each layer, in the order of its whole run: a file is nothing but these runs, one after another.
        self.names = [
            [names[id(adapters.parameters[layer, m.module, m.kind])] for m in adapters.matrices]
            for layer in range(adapters.flat.shape[0])
        ]
        rows = adapters.tokens.parameters.values() if adapters.tokens else ()
        self.token_names = [(names[id(parameter)], tuple(parameter.shape)) for parameter in rows]
        self.group = dist.new_group(backend="gloo") if adapters.world > 1 else None
        self.failure: str | None = None  # why the last checkpoint is not there, on all ranks alike
        self.paused_seconds = 0.0  # that the last `begin` took
        self._copies: dict[str, torch.Tensor] = {}  # (layers, local) fp32 in host RAM, made once
        self._rows: dict[str, torch.Tensor] = {}  # of new tokens, whole on every rank
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._stream: Any = None

    def begin(
        self,
        folder: Path,
        optimizer: torch.optim.Optimizer,
        place: Place,
        trainer_state: str,
        mark: Mark = unmarked,
        done: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Copy what is trained and write it from now on. `trainer_state` is transformers' own, as JSON.

        Called where the training stands still at `place`, or where it is held from stepping beyond it. `done` is called
        on rank 0, in the thread, with the folder once it is complete.
        """
        began = time.perf_counter()
        self.wait(mark)
        mark("copy what is trained")
        step = self._copy(optimizer, place)
        self.failure = None
        self.paused_seconds = time.perf_counter() - began
        arguments = (folder, step, place, trainer_state, done)
        self._thread = threading.Thread(target=self._bring, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def wait(self, mark: Mark = unmarked) -> None:
        """Until the checkpoint that was begun is complete, or has failed."""
        if self._thread is not None:
            mark(checkpoint.WAIT)
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken

    def _copy(self, optimizer: torch.optim.Optimizer, place: Place) -> torch.Tensor:
        """Into host RAM; AdamW's count of steps (1,). On a GPU beside what it computes meanwhile."""
        held = optimizer.state.get(self.adapters.flat) or {}  # empty before its first step
        with self._beside(place):
            for flat, copies in zip(self.adapters.flats, (self._copies, self._rows), strict=False):
                state = optimizer.state.get(flat) or {}
                for key in (MASTERS, *checkpoint.MOMENTS):
                    value = flat.detach() if key == MASTERS else state.get(key)
                    if key not in copies:
                        copies[key] = torch.empty(flat.shape)
                    if value is None:
                        copies[key].zero_()
                    else:
                        copies[key].copy_(value)
            # A copy: on a CPU the training counts on in this very tensor while it waits to be written.
            return held["step"].detach().cpu().clone().reshape(1) if held else torch.zeros(1)

    def _beside(self, place: Place) -> Any:
        if place.ready is None:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.adapters.device)
        self._stream.wait_event(place.ready)
        return torch.cuda.stream(self._stream)

    # -- the threads ----------------------------------------------------------------------------------------------

    def _bring(
        self,
        folder: Path,
        step: torch.Tensor,
        place: Place,
        trainer_state: str,
        done: Callable[[Path], None],
    ) -> None:
        try:
            random = self._everyones(place.random)
            if self.adapters.place == 0:
                self.failure = self._write(folder, step, place, random, trainer_state)
                if self.failure is None:
                    done(folder)
            else:
                for runs in self._copies.values():
                    for run in runs:
                        dist.send(run, 0, group=self.group)
            if self.group is not None:
                said = [self.failure]
                dist.broadcast_object_list(said, src=0, group=self.group)
                self.failure = said[0]
        except BaseException as error:
            self._broken = error

    def _everyones(self, random: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All ranks' random states, by rank and device."""
        states = [random]
        if self.group is not None:
            states = [{}] * self.adapters.world
            dist.all_gather_object(states, random, group=self.group)
        return {f"{rank}.{key}": value for rank, state in enumerate(states) for key, value in state.items()}

    def _layers(self) -> Iterator[torch.Tensor]:
        """The whole runs of all layers, first of the masters, then of each moment."""
        for runs in self._copies.values():
            for mine in runs:
                everyones = [mine, *(torch.empty_like(mine) for _ in range(1, self.adapters.world))]
                for rank, theirs in enumerate(everyones[1:], 1):
                    dist.recv(theirs, rank, group=self.group)
                yield self.adapters.whole(torch.stack(everyones))

    def _write(
        self,
        folder: Path,
        step: torch.Tensor,
        place: Place,
        random: dict[str, torch.Tensor],
        trainer_state: str,
    ) -> str | None:
        """Why it could not be written, where it could not."""
        layers = self._layers()
        try:
            with written_aside(folder) as aside:
                hashes = self._write_tensors(aside, layers, step)
                save_file(random, aside / checkpoint.RNG)
                write_text(aside / checkpoint.TRAINER_STATE, trainer_state)
                hashes |= {
                    name: sha256_of(aside / name) for name in (checkpoint.RNG, checkpoint.TRAINER_STATE)
                }
                state = {"step": place.step, "scheduler": place.scheduler, "world_size": self.adapters.world}
                checkpoint.write_state(aside, state, hashes)
        except (OSError, SafetensorError) as error:
            for _ in layers:  # the others send to the end
                pass
            return f"{folder}: {getattr(error, 'strerror', None) or error}"
        return None

    def _write_tensors(
        self, aside: Path, layers: Iterator[torch.Tensor], step: torch.Tensor
    ) -> dict[str, str]:
        """The two large files; their hashes by name."""
        shapes = [(m.rows, m.columns) for m in self.adapters.matrices]
        adapters = [(name, shape) for names in self.names for name, shape in zip(names, shapes, strict=True)]
        moments = [(f"{name}.{key}", shape) for key in checkpoint.MOMENTS for name, shape in adapters]
        weights = itertools.islice(layers, len(self.names))
        # New tokens stand behind what comes layer by layer.
        masters, rest = list(self._rows.values())[:1], list(self._rows.values())[1:]
        moments += [(f"{name}.{key}", s) for key in checkpoint.MOMENTS for name, s in self.token_names]
        return {
            checkpoint.ADAPTERS: write_tensors(
                aside / checkpoint.ADAPTERS,
                [*adapters, *self.token_names],
                itertools.chain(weights, masters),
                {"format": "pt"},
            ),
            checkpoint.OPTIMIZER: write_tensors(
                aside / checkpoint.OPTIMIZER,
                [*moments, ("step", (1,))],
                itertools.chain(layers, rest, [step]),
            ),
        }


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    pieces: Iterable[torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> str:
    """A safetensors file of fp32 tensors (name, shape) whose values come in `pieces`, cut anywhere; its SHA-256.

    safetensors' own writer takes whole tensors only, all at once.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in tensors:
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for piece in pieces:
            raw = memoryview(piece.contiguous().numpy()).cast("B")
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()
