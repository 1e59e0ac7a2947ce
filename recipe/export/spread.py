"""Where the parts of a model lie that answers: on one GPU, over several, with some layers in host RAM, or on the CPU.

Over several GPUs each one holds a block of successive layers: hidden states cross from card to card, weights do not.
Where the cards together are too small, some layers lie in host RAM as their NF4 bytes and are copied over just before
their turn (recipe/export/streamed.py); they are spread evenly, so that copies have the time of the layers between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import psutil
import torch

from recipe.engine.layout import Layout
from recipe.engine.memory import SPARE_BYTES
from recipe.errors import Refused
from recipe.plan.placement import spread
from recipe.plan.shapes import ModelShape

Document = tuple[list[int], list[int]]  # input_ids, labels
GIB = 2**30
CPU = "cpu"
HOST = "host"  # of the embedding: host RAM, while all else is computed on GPUs
BUFFERS = 2  # layers on their way or in use, on each GPU that has layers in host RAM
FORWARD_TOKENS = 1024  # in one pass through the layers; longer prompts go in pieces
# Of torch's allocator, for fragments, cuBLAS' workspace and kernels that are loaded when they are first met.
MARGIN_BYTES = GIB // 2


@dataclass(frozen=True)
class Work:
    """What is to be answered at once: `rows` sequences of up to `tokens`, each with its KV cache.

    longest: tokens in one pass, where a single text is longer than FORWARD_TOKENS and is not answered but measured.
    """

    rows: int = 1
    tokens: int = 4096
    longest: int = FORWARD_TOKENS

    @classmethod
    def of(
        cls, prompts: Sequence[list[int]], documents: Sequence[Document], new_tokens: int, batch_size: int
    ) -> Work:
        """Of answering prompts in batches, and measuring the losses of documents and of those answers."""
        most = max((len(ids) for ids in prompts), default=0) + new_tokens
        measured = max((len(ids) for ids, _ in documents), default=0)
        return cls(max(1, min(batch_size, len(prompts))), most, max(most, measured))

    def bytes(self, shape: ModelShape, width: int) -> int:
        """Activations of a pass: LoRA computes in fp32 beside the layer's own dtype, and a matrix is dequantised."""
        tokens = max(self.longest, min(self.rows * self.tokens, FORWARD_TOKENS))
        layer = tokens * (20 * shape.intermediate + 24 * shape.hidden)
        matrix = max(outputs * inputs for outputs, inputs in shape.linears.values()) * width
        # All tokens' logits when losses are measured, a part of them in fp32 too; beside nothing of a layer.
        logits = tokens * shape.vocab * width + min(tokens, LOSS_TOKENS) * shape.vocab * 12
        return max(layer + matrix, logits)

    def cache_bytes(self, shape: ModelShape, width: int) -> int:
        """Keys and values of one layer."""
        return 2 * self.rows * self.tokens * shape.kv_heads * shape.head_dim * width


LOSS_TOKENS = 256  # whose logits are in fp32 at once


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts on the device that they lie on.

    run: the NF4 bytes of a layer. beside: what a layer takes on its GPU wherever its run lies (norms, biases, LoRA,
    KV cache). work: on each GPU. embedding_fixed: the embedding must lie on a GPU.
    """

    layers: int
    run: int
    beside: int
    embedding: int
    head: int
    work: int
    tied: bool
    embedding_fixed: bool

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        nested: bool,
        dtype: torch.dtype,
        work: Work,
        adapter_bytes: int = 0,
        trained_tokens: bool = False,
    ) -> Sizes:
        """adapter_bytes: of the LoRA matrices in fp32. trained_tokens: PEFT copies embedding and head to alter rows."""
        width = dtype.itemsize
        run = Layout.of(shape, 1, nested).size
        small = shape.layer_other_parameters * width
        embedding = shape.embedding_parameters * width
        return cls(
            layers=shape.layers,
            run=run,
            beside=small + adapter_bytes // shape.layers + work.cache_bytes(shape, width),
            embedding=embedding * (2 if trained_tokens else 1),
            head=0 if shape.tied else embedding * (2 if trained_tokens else 1),
            work=work.bytes(shape, width),
            tied=shape.tied,
            embedding_fixed=shape.tied or trained_tokens,
        )

    @property
    def whole(self) -> int:
        """A layer with all that it takes."""
        return self.run + self.beside


@dataclass(frozen=True)
class Room:
    """A GPU, and the bytes that the model may take of it."""

    device: str
    bytes: int


@dataclass(frozen=True)
class Spread:
    """devices: of each layer, where it computes. streamed: whose bytes lie in host RAM. The final norm is with the head."""

    devices: tuple[str, ...]
    streamed: tuple[bool, ...]
    embedding: str
    head: str
    host_bytes: int = 0

    @property
    def plain(self) -> bool:
        """Whether transformers itself can place it so."""
        return not any(self.streamed) and self.embedding != HOST

    @property
    def device_map(self) -> dict[str, str]:
        """As transformers takes it."""
        if len({*self.devices, self.embedding, self.head}) == 1:
            return {"": self.head}
        layers = {f"model.layers.{i}": device for i, device in enumerate(self.devices)}
        return {
            "model.embed_tokens": self.embedding,
            "model.rotary_emb": self.embedding,
            **layers,
            "model.norm": self.head,
            "lm_head": self.head,
        }

    def describe(self) -> str:
        """One line."""
        parts = []
        for device in dict.fromkeys(self.devices):
            mine = [
                streamed for at, streamed in zip(self.devices, self.streamed, strict=True) if at == device
            ]
            away = f", {sum(mine)} of them from host RAM" if any(mine) else ""
            parts.append(f"{len(mine)} layers on {device}{away}")
        if self.host_bytes:
            parts.append(f"{self.host_bytes / GIB:.1f} GiB of host RAM")
        return "; ".join(parts)


def rooms(cap_bytes: int | None = None) -> list[Room]:
    """What the GPUs have free, for torch's allocator as far as it is limited, or to `cap_bytes` each."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        mine = torch.cuda.memory_allocated(index)
        unused = torch.cuda.memory_reserved(index) - mine
        limit = total * torch.cuda.get_per_process_memory_fraction(index)
        limit = min(limit, cap_bytes or limit) - mine
        found.append(Room(f"cuda:{index}", int(min(free + unused, limit)) - MARGIN_BYTES))
    return found


def place(sizes: Sizes, gpus: Sequence[Room], host_free: int | None = None) -> Spread:
    """The spread with the fewest layers in host RAM, on the fewest GPUs.

    host_free: bytes; None: what this host has. Raises Refused where GPUs or host RAM are too small.
    """
    free = psutil.virtual_memory().available if host_free is None else host_free
    if not gpus:
        needed = sizes.layers * sizes.whole + sizes.embedding + sizes.head + sizes.work
        _require_host(needed, free, "to compute on the CPU, there is no GPU")
        return _everywhere(sizes, CPU)
    for gpu in gpus:
        if sizes.layers * sizes.whole + sizes.embedding + sizes.head + sizes.work <= gpu.bytes:
            return _everywhere(sizes, gpu.device)
    for count in range(2, len(gpus) + 1):
        if found := _blocks(sizes, gpus[:count]):
            return found
    return _with_host(sizes, gpus, free)


def _everywhere(sizes: Sizes, device: str) -> Spread:
    return Spread((device,) * sizes.layers, (False,) * sizes.layers, device, device)


def _blocks(sizes: Sizes, gpus: Sequence[Room]) -> Spread | None:
    """A block of layers on each GPU, in proportion to its room; None where they do not fit."""
    left = _left(sizes, gpus, sizes.embedding)
    most = [max(0, room // sizes.whole) for room in left]
    if sum(most) < sizes.layers:
        return None
    counts = [sizes.layers * m // sum(most) for m in most]
    while sum(counts) < sizes.layers:
        counts[max(range(len(gpus)), key=lambda g: most[g] - counts[g])] += 1
    devices = tuple(gpu.device for gpu, count in zip(gpus, counts, strict=True) for _ in range(count))
    head = gpus[_head(sizes, gpus)].device
    return Spread(devices, (False,) * sizes.layers, gpus[0].device, head)


def _with_host(sizes: Sizes, gpus: Sequence[Room], free: int) -> Spread:
    """Layers one after another to the GPU that then has the fewest to bring from host RAM."""
    embedding = sizes.embedding if sizes.embedding_fixed else 0
    left = _left(sizes, gpus, embedding)
    if left[_head(sizes, gpus)] < 0 or (embedding and left[0] < 0):
        _refuse_gpus(sizes, gpus, embedding)
    counts = [0] * len(gpus)
    for _ in range(sizes.layers):
        away = [_away(sizes, room, count + 1) for room, count in zip(left, counts, strict=True)]
        able = [g for g, number in enumerate(away) if number is not None]
        if not able:
            _refuse_gpus(sizes, gpus, embedding)
        best = min(able, key=lambda g: (away[g], counts[g]))
        counts[best] += 1
    devices: list[str] = []
    streamed: list[bool] = []
    for gpu, room, count in zip(gpus, left, counts, strict=True):
        devices += [gpu.device] * count
        streamed += spread(count, _away(sizes, room, count) or 0)
    host = sum(streamed) * sizes.run
    _require_host(host, free, f"for {sum(streamed)} of {sizes.layers} layers that fit on no GPU")
    where = gpus[0].device if sizes.embedding_fixed else HOST
    return Spread(tuple(devices), tuple(streamed), where, gpus[_head(sizes, gpus)].device, host)


def _left(sizes: Sizes, gpus: Sequence[Room], embedding: int) -> list[int]:
    """Room for layers on each GPU, beside embedding, head and activations."""
    left = [gpu.bytes - sizes.work for gpu in gpus]
    left[0] -= embedding
    left[_head(sizes, gpus)] -= sizes.head
    return left


def _head(sizes: Sizes, gpus: Sequence[Room]) -> int:
    """The GPU that has the head: the roomiest, of equal ones the last; a tied one is where the embedding is."""
    return 0 if sizes.tied else max(range(len(gpus)), key=lambda g: (gpus[g].bytes, g))


def _away(sizes: Sizes, room: int, count: int) -> int | None:
    """How many of `count` layers on a GPU must lie in host RAM; None where even all of them would not do."""
    spare = room - count * sizes.whole
    if spare >= 0:
        return 0
    away = -(-(BUFFERS * sizes.run - spare) // sizes.run)
    return away if away <= count else None


def _refuse_gpus(sizes: Sizes, gpus: Sequence[Room], embedding: int) -> NoReturn:
    needed = (sizes.work + embedding + sizes.head + BUFFERS * sizes.run + sizes.layers * sizes.beside) / GIB
    have = ", ".join(f"{gpu.device} {max(0, gpu.bytes) / GIB:.1f}" for gpu in gpus)
    raise Refused(
        f"GPU memory: {have} GiB are free for the model, about {needed:.1f} GiB are needed even with all layers in host "
        "RAM; end other programs on the GPU, or hide it with CUDA_VISIBLE_DEVICES= to compute on the CPU"
    )


def _require_host(needed: int, free: int, why: str) -> None:
    if needed + SPARE_BYTES > free:
        raise Refused(
            f"host RAM: {(needed + SPARE_BYTES) / GIB:.1f} GiB are needed {why}, {free / GIB:.1f} GiB are available; end "
            "other programs, add RAM, or use a GPU with more memory"
        )
