"""From an NF4 checkpoint on disk to an engine: each rank reads only the bytes of its own slices.

The model's skeleton (transformers, PEFT) stays on the meta device: it gives names, configuration and the plain
arithmetic. What it computes with lies in the engine. Stock accelerate loads the whole 4-bit model on every rank first,
which neither a 24 GB card nor a 64 GB host can hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from recipe.engine.activations import Activations
from recipe.engine.attend import Attention
from recipe.engine.attention import attention_name
from recipe.engine.checkpoint import Checkpoint
from recipe.engine.engine import Engine
from recipe.engine.head import VocabularyHead, vocabulary_slice
from recipe.engine.layer import FusedLayer, Workspace
from recipe.engine.layout import BLOCK, MODULES, Constants, Layout
from recipe.engine.lora import Adapters
from recipe.engine.memory import EmbeddingTable
from recipe.engine.nf4 import NF4Linear
from recipe.engine.plain import PlainLayer
from recipe.engine.streams import Streams
from recipe.engine.weights import LayerStore
from recipe.errors import UserError
from recipe.plan.placement import Placement, kept_bytes
from recipe.plan.shapes import ModelShape, shape_from_config
from recipe.settings import Lora

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
READERS = 3  # layers read at once; each holds a slice in host RAM on its way to the GPU


def load_sharded(
    folder: Path,
    lora: Lora,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    placement: Placement,
    max_tokens: int,
    kernels: str = "fused",
) -> PeftModel:
    """The NF4 checkpoint in `folder` with fresh LoRA adapters, sharded over `mesh`; its engine is `model.engine`.

    LoRA parameters are fp32 masters, computed in `dtype` and reduced in fp32. Their start does not depend on the
    number of ranks. max_tokens: the longest micro-batch. kernels: `fused` or `plain`. Raises UserError where the
    checkpoint is damaged or does not fit its config, Refused where the host has too little memory.
    """
    with Checkpoint(folder) as checkpoint:
        config = model_config(folder)
        shape = shape_from_config(json.loads((folder / "config.json").read_text()), f"{folder}/config.json")
        nested = _is_nested(checkpoint)
        model = skeleton(config, lora, dtype, attention_name(attention))
        engine = make_engine(
            model, shape, lora, mesh, device, dtype, attention, placement, max_tokens, kernels, nested
        )
        read_layers(engine, model, checkpoint, mesh.get_local_rank())
        hidden = (shape.vocab, shape.hidden)
        engine.embedding = EmbeddingTable.from_checkpoint(checkpoint, EMBEDDING, hidden)
        head = EMBEDDING if shape.tied else HEAD
        first, last = vocabulary_slice(shape.vocab, mesh.size(), mesh.get_local_rank())
        if not shape.tied:  # else the head is read from it
            row = shape.hidden * checkpoint.stored(EMBEDDING).dtype.itemsize
            checkpoint.verify(EMBEDDING, first * row, last * row)
        engine.head.weight.copy_(checkpoint.read_rows(head, hidden, first, last))
        engine.norm.copy_(checkpoint.read(NORM, (shape.hidden,)))
        start_adapters(engine.adapters, seed)
    return model


def model_config(folder: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    return config


def skeleton(config: PretrainedConfig, lora: Lora, dtype: torch.dtype, attention: str) -> PeftModel:
    """The model on the meta device: NF4 linears in every decoder layer, LoRA around them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        for layer in model.model.layers:
            for name in MODULES.values():
                module = layer.get_submodule(name)
                new = NF4Linear(module.in_features, module.out_features, module.bias is not None)
                if module.bias is not None:
                    new.bias = nn.Parameter(module.bias.to(dtype))
                layer.set_submodule(name, new)
        model.tie_weights()
        model.requires_grad_(False)
        peft_model = get_peft_model(
            model, peft_config(lora), low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
    # transformers' Trainer then leaves placement and gradient reduction alone (is_distributed_loading_by_transformers).
    model._is_distributed_loading_by_transformers = True
    return peft_model


def peft_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def make_engine(
    model: PeftModel,
    shape: ModelShape,
    lora: Lora,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    placement: Placement,
    max_tokens: int,
    kernels: str,
    nested: bool,
) -> Engine:
    """An engine with room for everything and nothing in it yet; the model's LoRA parameters become its own."""
    core = model.get_base_model()
    config = core.config
    streams = Streams(device)
    adapters = Adapters(shape, lora, mesh, device, dtype)
    layout = Layout.of(shape, mesh.size(), nested)
    store = LayerStore(layout, adapters, device, placement.offloaded, streams)
    with torch.device(device):
        rotary = type(core.model.rotary_emb)(config)
    first, last = vocabulary_slice(shape.vocab, mesh.size(), mesh.get_local_rank())
    head = VocabularyHead(
        torch.empty(last - first, shape.hidden, device=device, dtype=dtype), shape.vocab, mesh
    )
    if kernels == "plain":
        arithmetic: PlainLayer | FusedLayer = PlainLayer(core.model.layers)
    else:
        arithmetic = FusedLayer(
            shape,
            config.rms_norm_eps,
            adapters.scale,
            Attention(attention, core.model.layers[0].self_attn.scaling),
            [_window(layer.self_attn) for layer in core.model.layers],
            Workspace(shape, placement.slots, device, dtype),
            placement.mlp_chunk,
        )
    slots = [
        kept_bytes(shape, keep, max_tokens, dtype.itemsize) if away else 0
        for keep, away in zip(placement.keep, placement.away, strict=True)
    ]
    engine = Engine(
        store=store,
        adapters=adapters,
        embedding=None,  # type: ignore[arg-type]  # mapped when the checkpoint is read
        rotary=rotary,
        norm=torch.empty(shape.hidden, device=device, dtype=dtype),
        head=head,
        eps=config.rms_norm_eps,
        arithmetic=arithmetic,
        activations=Activations(slots, device, streams),
        placement=placement,
        dropout=lora.dropout,
    )
    for (layer, module, kind), parameter in adapters.parameters.items():
        place = core.model.layers[layer].get_submodule(MODULES[module])
        (place.lora_A if kind == "A" else place.lora_B)["default"].weight = parameter
    model.engine = engine
    return engine


def _window(attention: nn.Module) -> int | None:
    """Qwen's attention has it as an attribute, Mistral's reads it from the config."""
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def _is_nested(checkpoint: Checkpoint) -> bool:
    """Whether the absmax constants are quantised too. Raises UserError where the layers are no bitsandbytes NF4."""
    name = f"model.layers.0.{MODULES['q_proj']}.weight"
    state = next((key for key in checkpoint._constants.get(name, []) if key.startswith("quant_state.")), None)
    if state != "quant_state.bitsandbytes__nf4":
        raise UserError(
            f"{checkpoint.folder}: {name} is not quantised to NF4, expected what `make prepare` writes"
        )
    return f"{name}.nested_absmax" in checkpoint


def read_layers(engine: Engine, model: PeftModel, checkpoint: Checkpoint, rank: int) -> None:
    """Fill the slices of this rank, and what every rank holds whole."""
    store = engine.store
    codes: dict[bytes, torch.Tensor] = {}
    for index, layer in enumerate(model.get_base_model().model.layers):
        prefix = f"model.layers.{index}."
        for name, module in MODULES.items():
            weight = f"{prefix}{module}.weight"
            store.constants[index][name] = _constants(checkpoint, weight, store, codes)
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
        for piece, start, end, place in held:
            checkpoint.read_bytes(
                f"model.layers.{index}.{piece.key}", start, target[place : place + end - start]
            )
        if target is not shard:
            shard.copy_(target)

    for index in range(len(store.shards)):
        for piece in store.layout.pieces.values():
            _check_size(checkpoint, f"model.layers.{index}.{piece.key}", piece.size)
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(read, range(len(store.shards))):
            pass


def small_tensors(layer: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the checkpoint and shapes of a decoder layer's norms and biases, which every rank holds whole."""
    for name, parameter in layer.named_parameters():
        frozen_matrix = isinstance(layer.get_submodule(name.rpartition(".")[0]), NF4Linear)
        if ".lora_" in name or (frozen_matrix and name.endswith("weight")):
            continue
        yield name.replace(".base_layer", ""), tuple(parameter.shape)


def _check_size(checkpoint: Checkpoint, name: str, expected: int) -> None:
    stored = checkpoint.stored(name)
    if stored.nbytes != expected:
        raise UserError(
            f"{stored.file}: {name} has {stored.nbytes} bytes, expected {expected} from config.json; "
            "weights and config are of different models"
        )


def _constants(
    checkpoint: Checkpoint, weight: str, store: LayerStore, codes: dict[bytes, torch.Tensor]
) -> Constants:
    """Offset and code of a matrix; the code is the same for all, and held once."""
    found = checkpoint.constants(weight)
    state = found.get("quant_state.bitsandbytes__nf4")
    if state is None:
        raise UserError(f"{checkpoint.folder}: {weight} is not quantised to NF4; run `make prepare` again")
    try:
        described = json.loads(bytes(state.tolist()))
        block_size = described["blocksize"]
        offset = float(described["nested_offset"]) if store.layout.nested else 0.0
        code = found["nested_quant_map"] if store.layout.nested else None
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
        codes[key] = code.to(store.device)
    return Constants(codes[key], offset)


def start_adapters(adapters: Adapters, seed: int) -> None:
    """PEFT's start: A uniform in +-1/sqrt(in), B zero; the same on any number of ranks."""
    for (layer, module, kind), parameter in adapters.parameters.items():
        if kind == "A":
            matrix = next(m for m in adapters.matrices if (m.module, m.kind) == (module, kind))
            name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_A.default"
            start, end = adapters.rows_of_rank(matrix)
            whole = initial_lora(name, (matrix.rows, matrix.columns), seed)
            parameter.detach().to_local().copy_(whole[start:end])


def initial_lora(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A (rank, in) in fp32, drawn from its name, so that it does not depend on what else is drawn."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def local_range(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """The rows of dimension 0 that a rank holds of a DTensor (torch.chunk: the last ranks may get fewer, or none)."""
    size = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * size, rows)
    return start, min(start + size, rows)
