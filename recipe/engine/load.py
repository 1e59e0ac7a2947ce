"""From an NF4 checkpoint on disk to an engine: each rank reads only the bytes of its own slices.

Stock accelerate loads the whole 4-bit model on every rank first, which neither a 24 GB card nor a 64 GB host can hold.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PretrainedConfig

from recipe.engine.build import Build, make_engine, small_tensors, start_adapters
from recipe.engine.checkpoint import Checkpoint
from recipe.engine.engine import Engine
from recipe.engine.layout import BLOCK, MODULES, Constants, Layout, Piece
from recipe.engine.memory import EmbeddingTable
from recipe.engine.rows import rows_of_rank
from recipe.errors import UserError
from recipe.plan.shapes import shape_from_config

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
STATE = "quant_state.bitsandbytes__nf4"
READERS = 3  # layers read at once; each holds a slice in host RAM on its way to the GPU


def load_sharded(folder: Path, build: Build, seed: int) -> PeftModel:
    """The NF4 checkpoint in `folder` with fresh LoRA adapters, sharded over `build.mesh`; its engine is `model.engine`.

    The adapters' start depends on `seed` and not on the number of ranks. Raises UserError where the checkpoint is
    damaged or does not fit its config, Refused where the host has too little memory.
    """
    with Checkpoint(folder) as checkpoint:
        shape = shape_from_config(json.loads((folder / "config.json").read_text()), f"{folder}/config.json")
        size = (shape.vocab, shape.hidden)
        nested = is_nested(checkpoint)
        build.mark("build the model")
        embedding = EmbeddingTable.from_checkpoint(checkpoint, EMBEDDING, size)
        model = make_engine(model_config(folder), shape, build, nested, embedding)
        read_layers(model, checkpoint, build.rank)
        first, last = rows_of_rank(shape.vocab, build.world, build.rank)
        build.mark("check embedding")
        if not shape.tied:  # else the head is read from it
            row = shape.hidden * checkpoint.stored(EMBEDDING).dtype.itemsize
            checkpoint.verify(EMBEDDING, first * row, last * row)
        build.mark("load head")
        head = EMBEDDING if shape.tied else HEAD
        model.engine.head.weight.copy_(checkpoint.read_rows(head, size, first, last))
        model.engine.norm.copy_(checkpoint.read(NORM, (shape.hidden,)))
        if (tokens := model.engine.adapters.tokens) is not None:
            sides = (EMBEDDING,) if shape.tied else (EMBEDDING, HEAD)
            tokens.start(*(_rows(checkpoint, name, size, tokens.ids.tolist()) for name in sides))
        build.mark("start adapters")
        start_adapters(model.engine.adapters, seed)
    return model


def _rows(checkpoint: Checkpoint, name: str, size: tuple[int, int], ids: list[int]) -> torch.Tensor:
    return torch.cat([checkpoint.read_rows(name, size, row, row + 1) for row in ids])


def model_config(folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    return config


def is_nested(checkpoint: Checkpoint) -> bool:
    """Whether the absmax constants are quantised too. Raises UserError where the layers are no bitsandbytes NF4."""
    name = f"model.layers.0.{MODULES['q_proj']}.weight"
    if f"{name}.{STATE}" not in checkpoint:
        raise UserError(
            f"{checkpoint.folder}: {name} is not quantised to NF4, expected what `make prepare` writes"
        )
    return f"{name}.nested_absmax" in checkpoint


def read_layers(model: PeftModel, checkpoint: Checkpoint, rank: int) -> None:
    """Fill the slices of this rank, and what every rank holds whole."""
    engine: Engine = model.engine
    store = engine.store
    codes: dict[bytes, torch.Tensor] = {}
    for index, layer in enumerate(model.get_base_model().model.layers):
        prefix = f"model.layers.{index}."
        for name, module in MODULES.items():
            weight = f"{prefix}{module}.weight"
            store.constants[index][name] = read_constants(
                checkpoint, weight, store.layout.nested, store.device, codes
            )
        for name, shape in small_tensors(layer):
            value = checkpoint.read(prefix + name, shape)
            store.small[index][name] = value.to(store.device, engine.adapters.dtype)
    held = store.layout.of_rank(rank)
    staging = threading.local()

    def read(index: int) -> None:
        shard = store.shards[index]
        target = shard
        if shard.is_cuda:
            if not hasattr(staging, "slice"):
                staging.slice = torch.empty(len(shard), dtype=torch.uint8)
            target = staging.slice
        read_slice(checkpoint, index, held, target)
        if target is not shard:
            shard.copy_(target)

    check_sizes(checkpoint, store.layout, len(store.shards))
    with ThreadPoolExecutor(READERS) as readers:
        engine.mark("load layer", 0)
        for done, _ in enumerate(readers.map(read, range(len(store.shards))), 1):
            engine.mark("load layer", done)


def read_slice(
    checkpoint: Checkpoint, index: int, held: list[tuple[Piece, int, int, int]], target: torch.Tensor
) -> None:
    """What is held of a layer (Layout.of_rank) into `target` (slice_bytes,) uint8 on the CPU."""
    for piece, start, end, place in held:
        checkpoint.read_bytes(f"model.layers.{index}.{piece.key}", start, target[place : place + end - start])


def check_sizes(checkpoint: Checkpoint, layout: Layout, layers: int) -> None:
    for index in range(layers):
        for piece in layout.pieces.values():
            name = f"model.layers.{index}.{piece.key}"
            stored = checkpoint.stored(name)
            if stored.nbytes != piece.size:
                raise UserError(
                    f"{stored.file}: {name} has {stored.nbytes} bytes, expected {piece.size} from config.json; "
                    "weights and config are of different models"
                )


def read_constants(
    checkpoint: Checkpoint, weight: str, nested: bool, device: torch.device, codes: dict[bytes, torch.Tensor]
) -> Constants:
    """Offset and code of a matrix; the code is the same for all, and held once."""
    found = checkpoint.constants(weight)
    state = found.get(STATE)
    if state is None:
        raise UserError(f"{checkpoint.folder}: {weight} is not quantised to NF4; run `make prepare` again")
    try:
        described = json.loads(bytes(state.tolist()))
        block_size = described["blocksize"]
        offset = float(described["nested_offset"]) if nested else 0.0
        code = found["nested_quant_map"] if nested else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint.stored(weight).file}: what describes {weight} is damaged ({error}), expected bitsandbytes' "
            "quant state and nested_quant_map; run `make prepare` again"
        ) from None
    if block_size != BLOCK:
        raise UserError(
            f"{checkpoint.folder}: {weight} has blocks of {block_size} weights, expected {BLOCK}; "
            "quantise it with `make prepare`"
        )
    if code is None:
        return Constants()
    key = code.numpy().tobytes()
    if key not in codes:
        codes[key] = code.to(device)
    return Constants(codes[key], offset)
