"""The plain model where it is too large for the GPUs: some decoder layers lie in host RAM and pass through two buffers.

The modules are transformers' own with bitsandbytes' Linear4bit, so that the numbers are those of `from_pretrained`, and
PEFT puts its adapters on them as on any model. All NF4 bytes of a layer lie in one run (recipe/engine/layout.py); the
matrices are views of it. While one layer computes the next one is copied, also from the last layer of one token to
the first of the next: a frozen weight is never out of date.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from recipe.engine.checkpoint import Checkpoint
from recipe.engine.layout import MODULES, Constants, Layout
from recipe.engine.load import (
    EMBEDDING,
    HEAD,
    NORM,
    READERS,
    check_sizes,
    is_nested,
    model_config,
    read_constants,
    read_slice,
)
from recipe.engine.memory import EmbeddingTable, HostPool
from recipe.engine.plain import quant_state
from recipe.engine.streams import Streams
from recipe.export.spread import BUFFERS, CPU, HOST, Spread
from recipe.plan.shapes import ModelShape, read_config, shape_from_config

Bound = list[tuple[nn.Module, nn.Parameter]]  # Linear4bit modules, and the weights to give them


class Source(Protocol):
    """Where the weights come from. `run` is filled on the CPU, by several threads at once."""

    nested: bool

    def fill(self, index: int, run: torch.Tensor) -> None: ...
    def constants(self, index: int, module: str, device: torch.device) -> Constants: ...
    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...
    def embedding_table(self) -> EmbeddingTable: ...


class Stored:
    """A prepared NF4 checkpoint."""

    def __init__(self, checkpoint: Checkpoint, shape: ModelShape):
        self.checkpoint, self.shape = checkpoint, shape
        self.nested = is_nested(checkpoint)
        layout = Layout.of(shape, 1, self.nested)
        check_sizes(checkpoint, layout, shape.layers)
        self._held = layout.of_rank(0)
        self._codes: dict[torch.device, dict[bytes, torch.Tensor]] = {}

    def fill(self, index: int, run: torch.Tensor) -> None:
        read_slice(self.checkpoint, index, self._held, run)

    def constants(self, index: int, module: str, device: torch.device) -> Constants:
        weight = f"model.layers.{index}.{module}.weight"
        codes = self._codes.setdefault(device, {})
        return read_constants(self.checkpoint, weight, self.nested, device, codes)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.checkpoint.read(name, shape)

    def embedding_table(self) -> EmbeddingTable:
        size = (self.shape.vocab, self.shape.hidden)
        self.checkpoint.verify(EMBEDDING, 0, self.checkpoint.stored(EMBEDDING, size).nbytes)
        return EmbeddingTable.from_checkpoint(self.checkpoint, EMBEDDING, size)


def load_streamed(folder: Path, dtype: torch.dtype, spread: Spread) -> PreTrainedModel:
    """As `from_pretrained`, placed as `spread` says. Raises UserError where the checkpoint is damaged."""
    config = model_config(folder)
    config.use_cache = True
    shape = shape_from_config(read_config(folder / "config.json"), f"{folder}/config.json")
    with Checkpoint(folder) as checkpoint:
        model = assemble(config, shape, dtype, spread, Stored(checkpoint, shape))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def assemble(
    config: PretrainedConfig, shape: ModelShape, dtype: torch.dtype, spread: Spread, source: Source
) -> PreTrainedModel:
    """The model with its weights where `spread` says; what streams its layers hangs on it as `streams`."""
    model = skeleton(config, dtype, source.nested)
    layout = Layout.of(shape, 1, source.nested)
    devices = [torch.device(name) for name in spread.devices]
    streams = {
        device: LayerStream(
            device, layout, sum(s for s, at in zip(spread.streamed, devices, strict=True) if at == device)
        )
        for device in dict.fromkeys(devices)
    }
    targets: list[torch.Tensor] = []
    for index, (layer, device) in enumerate(zip(model.model.layers, devices, strict=True)):
        _fill_small(layer, f"model.layers.{index}.", device, dtype, source)
        constants = {name: source.constants(index, place, device) for name, place in MODULES.items()}

        def bind(run: torch.Tensor, layer=layer, constants=constants) -> Bound:
            return bound(layer, layout, run, constants, dtype)

        if spread.streamed[index]:
            targets.append(streams[device].add(layer, bind))
        else:
            targets.append(torch.empty(layout.size, dtype=torch.uint8, device=device))
            give(bind(targets[-1]))
        if device != devices[0]:
            layer.register_forward_pre_hook(_move_to(device), with_kwargs=True)
    _fill_rest(model, shape, dtype, spread, source)
    _read(targets, source)
    model.streams = list(streams.values())
    model.is_loaded_in_4bit = True  # by which PEFT knows it
    return model.eval()


def skeleton(config: PretrainedConfig, dtype: torch.dtype, nested: bool) -> PreTrainedModel:
    """transformers' model on the meta device, its decoder layers' matrices bitsandbytes' NF4, as it makes them itself."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for layer in model.model.layers:
            for name in MODULES.values():
                linear = layer.get_submodule(name)
                new = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    dtype,
                    compress_statistics=nested,
                    quant_type="nf4",
                )
                layer.set_submodule(name, new)
        model.requires_grad_(False)
    return model


def bound(
    layer: nn.Module,
    layout: Layout,
    run: torch.Tensor,
    constants: dict[str, Constants],
    dtype: torch.dtype,
) -> Bound:
    """The NF4 matrices of a decoder layer as views of `run` (layout.size,) uint8."""
    found: Bound = []
    for name, place in MODULES.items():
        weight = layout.weight(run, name, constants[name])
        parameter = bnb.nn.Params4bit(
            weight.packed.view(-1, 1),
            requires_grad=False,
            quant_state=quant_state(weight, dtype),
            compress_statistics=layout.nested,
            quant_type="nf4",
            bnb_quantized=True,
        )
        found.append((layer.get_submodule(place), parameter))
    return found


def give(weights: Bound) -> None:
    for module, parameter in weights:
        module.weight = parameter
        module.quant_state = parameter.quant_state


@dataclass
class Slot:
    """A buffer for one layer; `holds` is whose bytes are in it or under way."""

    run: torch.Tensor
    bound: list[Bound] = field(default_factory=list)
    holds: int | None = None
    ready: Any = None
    free: Any = None


class LayerStream:
    """The `count` layers that one device has in host RAM. They take turns in the order in which they were added."""

    def __init__(self, device: torch.device, layout: Layout, count: int):
        self.device, self.layout, self.count = device, layout, count
        self.pool = HostPool(count * layout.size, device, f"{count} layers in host RAM")
        self.runs: list[torch.Tensor] = []
        with self._here():
            self.queues = Streams(device)
        self.slots = [
            Slot(torch.empty(layout.size, dtype=torch.uint8, device=device))
            for _ in range(min(BUFFERS, count))
        ]

    def add(self, layer: nn.Module, bind: Callable[[torch.Tensor], Bound]) -> torch.Tensor:
        """The host's room for the bytes of `layer`, which is brought over from there from now on."""
        turn = len(self.runs)
        self.runs.append(self.pool.take(self.layout.size))
        for slot in self.slots:
            slot.bound.append(bind(slot.run))
        give(self.slots[0].bound[turn])  # PEFT looks at the weights when it wraps them
        layer.register_forward_pre_hook(lambda *_: self.use(turn))
        layer.register_forward_hook(lambda *_: self.done(turn))
        return self.runs[turn]

    @property
    def bytes_per_pass(self) -> int:
        """That cross the link each time the model is run."""
        return self.count * self.layout.size if self.count > len(self.slots) else 0

    def use(self, turn: int) -> None:
        """Before the layer: its weights are the buffer's."""
        with self._here():
            slot = next((slot for slot in self.slots if slot.holds == turn), None)
            if slot is None:  # the first pass, or the one before was interrupted
                now = self.queues.mark()
                for number, one in enumerate(self.slots):
                    one.free = now
                    self._fill(one, (turn + number) % self.count)
                slot = self.slots[0]
            self.queues.wait(slot.ready)
        give(slot.bound[turn])

    def done(self, turn: int) -> None:
        """The layer's arithmetic is queued: its buffer takes the layer after the next one."""
        following = (turn + len(self.slots)) % self.count
        if following == turn:
            return
        slot = next(slot for slot in self.slots if slot.holds == turn)
        with self._here():
            slot.free = self.queues.mark()
            self._fill(slot, following)

    def _fill(self, slot: Slot, turn: int) -> None:
        with self.queues.on(self.queues.incoming):
            self.queues.wait(slot.free)
            slot.run.copy_(self.runs[turn], non_blocking=True)
            slot.ready = self.queues.mark()
        slot.holds = turn

    def _here(self):
        """Its device as the current one: events and streams belong to one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


class HostEmbedding(nn.Module):
    """The embedding where no GPU has room for it: one lookup in host RAM for each token."""

    def __init__(self, table: EmbeddingTable, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.table, self.device, self.dtype = table, device, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table.lookup(ids.cpu(), self.device, self.dtype)


def _fill_small(
    layer: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype, source: Source
) -> None:
    """Norms and biases."""
    matrices = {f"{place}.weight" for place in MODULES.values()}
    for name, parameter in list(layer.named_parameters()):
        if name not in matrices:
            value = source.read(prefix + name, tuple(parameter.shape)).to(device, dtype)
            folder, _, key = name.rpartition(".")
            setattr(layer.get_submodule(folder), key, nn.Parameter(value, requires_grad=False))


def _fill_rest(
    model: PreTrainedModel, shape: ModelShape, dtype: torch.dtype, spread: Spread, source: Source
) -> None:
    """Embedding, rotary tables, last norm and head."""

    def frozen(name: str, size: tuple[int, ...], device: str) -> nn.Parameter:
        return nn.Parameter(source.read(name, size).to(device, dtype), requires_grad=False)

    first, size = torch.device(spread.devices[0]), (shape.vocab, shape.hidden)
    core = model.model
    if spread.embedding == HOST:
        core.embed_tokens = HostEmbedding(source.embedding_table(), first, dtype)
    else:
        core.embed_tokens.weight = frozen(EMBEDDING, size, spread.embedding)
    # On the CPU first, as transformers does: a GPU's powers differ in the last bit.
    with torch.device(CPU):
        core.rotary_emb = type(core.rotary_emb)(model.config)
    core.rotary_emb.to(first)
    core.norm.weight = frozen(NORM, (shape.hidden,), spread.head)
    if shape.tied:
        model.lm_head.weight = core.embed_tokens.weight
    else:
        model.lm_head.weight = frozen(HEAD, size, spread.head)
    if spread.head != spread.devices[-1]:
        core.norm.register_forward_pre_hook(_move_to(torch.device(spread.head)), with_kwargs=True)


def _move_to(device: torch.device):
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return lambda module, args, kwargs: (move(args), {name: move(value) for name, value in kwargs.items()})


def _read(targets: list[torch.Tensor], source: Source) -> None:
    """The bytes of all layers, several at once."""
    staging = threading.local()

    def read(index: int) -> None:
        target = targets[index]
        if not target.is_cuda:
            source.fill(index, target)
            return
        if not hasattr(staging, "run"):
            staging.run = torch.empty(len(target), dtype=torch.uint8)
        source.fill(index, staging.run)
        target.copy_(staging.run)

    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(read, range(len(targets))):
            pass
