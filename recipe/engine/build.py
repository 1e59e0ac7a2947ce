"""An engine with room for everything and nothing in it yet: what loading from a checkpoint and random weights share.

The model's skeleton (transformers, PEFT) stays on the meta device: it gives names, configuration and the plain
arithmetic. What it computes with lies in the engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PretrainedConfig

from recipe.engine.activations import Activations
from recipe.engine.attention import Attention, register
from recipe.engine.engine import Engine
from recipe.engine.head import VocabularyHead
from recipe.engine.layer import FusedLayer, Workspace
from recipe.engine.layout import MODULES, Layout
from recipe.engine.lora import Adapters
from recipe.engine.marks import Mark, unmarked
from recipe.engine.memory import EmbeddingTable
from recipe.engine.nf4 import NF4Linear
from recipe.engine.plain import PlainLayer
from recipe.engine.rows import rows_of_rank
from recipe.engine.streams import Streams
from recipe.engine.tokens import EMBEDDING, token_indices
from recipe.engine.weights import LayerStore
from recipe.plan.placement import Placement, kept_bytes
from recipe.plan.shapes import ModelShape
from recipe.settings import Lora


@dataclass(frozen=True)
class Build:
    """How an engine is to be built.

    dtype: of the arithmetic; LoRA masters are fp32 and reduced in fp32. attention: `varlen` or `sdpa`. max_tokens: of
    the longest micro-batch. kernels: `fused` or `plain`. token_ids: those whose rows are trained too. mark: told what
    begins.
    """

    lora: Lora
    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype
    attention: str
    placement: Placement
    max_tokens: int
    kernels: str = "fused"
    neftune_alpha: float = 0.0
    token_ids: tuple[int, ...] = ()
    mark: Mark = unmarked

    @property
    def world(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()


def make_engine(
    config: PretrainedConfig, shape: ModelShape, build: Build, nested: bool, embedding: EmbeddingTable
) -> PeftModel:
    """The skeleton, its engine as `model.engine`, and its LoRA parameters the engine's own.

    nested: whether the absmax constants are quantised too. Raises Refused where the host has too little memory.
    """
    lora, device, dtype, placement = build.lora, build.device, build.dtype, build.placement
    model = skeleton(config, lora, dtype, build.token_ids)
    core = model.get_base_model()
    streams = Streams(device)
    adapters = Adapters(shape, lora, build.mesh, device, dtype, build.token_ids)
    layout = Layout.of(shape, build.world, nested)
    store = LayerStore(layout, adapters, device, placement.offloaded, streams)
    with torch.device(device):
        rotary = type(core.model.rotary_emb)(config)
    first, last = rows_of_rank(shape.vocab, build.world, build.rank)
    head = VocabularyHead(
        torch.empty(last - first, shape.hidden, device=device, dtype=dtype), shape.vocab, build.mesh
    )
    if build.kernels == "plain":
        arithmetic: PlainLayer | FusedLayer = PlainLayer(core.model.layers)
    else:
        arithmetic = FusedLayer(
            shape,
            config.rms_norm_eps,
            adapters.scale,
            Attention(build.attention, core.model.layers[0].self_attn.scaling),
            [_window(layer.self_attn) for layer in core.model.layers],
            Workspace(shape, placement.slots, device, dtype),
            placement.mlp_chunk,
        )
    slots = [
        kept_bytes(shape, keep, build.max_tokens, dtype.itemsize) if away else 0
        for keep, away in zip(placement.keep, placement.away, strict=True)
    ]
    model.engine = Engine(
        store=store,
        adapters=adapters,
        embedding=embedding,
        rotary=rotary,
        norm=torch.empty(shape.hidden, device=device, dtype=dtype),
        head=head,
        eps=config.rms_norm_eps,
        arithmetic=arithmetic,
        activations=Activations(slots, device, streams),
        placement=placement,
        dropout=lora.dropout,
        neftune_alpha=build.neftune_alpha,
        mark=build.mark,
    )
    for (layer, module, kind), parameter in adapters.parameters.items():
        place = core.model.layers[layer].get_submodule(MODULES[module])
        (place.lora_A if kind == "A" else place.lora_B)["default"].weight = parameter
    if adapters.tokens is not None:
        for name, rows in adapters.tokens.parameters.items():
            wrapped = core.model.embed_tokens if name == EMBEDDING else core.lm_head
            wrapped.token_adapter.trainable_tokens_delta["default"] = rows
    return model


def _window(attention: nn.Module) -> int | None:
    """Qwen's attention has it as an attribute, Mistral's reads it from the config."""
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def skeleton(
    config: PretrainedConfig, lora: Lora, dtype: torch.dtype, token_ids: tuple[int, ...] = ()
) -> PeftModel:
    """The model on the meta device: NF4 linears in every decoder layer, LoRA around them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register())
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
            model,
            peft_config(lora, token_ids, config.tie_word_embeddings),
            low_cpu_mem_usage=True,
            autocast_adapter_dtype=False,
        )
    # transformers' Trainer then leaves placement and gradient reduction alone (is_distributed_loading_by_transformers).
    model._is_distributed_loading_by_transformers = True
    return peft_model


def peft_config(lora: Lora, token_ids: tuple[int, ...] = (), tied: bool = False) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=token_indices(token_ids, tied),
    )


def small_tensors(layer: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in the checkpoint and shapes of a decoder layer's norms and biases, which every rank holds whole."""
    for name, parameter in layer.named_parameters():
        frozen_matrix = isinstance(layer.get_submodule(name.rpartition(".")[0]), NF4Linear)
        if ".lora_" in name or (frozen_matrix and name.endswith("weight")):
            continue
        yield name.replace(".base_layer", ""), tuple(parameter.shape)


def start_adapters(adapters: Adapters, seed: int) -> None:
    """PEFT's start: A uniform in +-1/sqrt(in), B zero; the same on any number of ranks."""
    for (layer, module, kind), parameter in adapters.parameters.items():
        if kind == "A":
            name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_A.default"
            whole = initial_lora(name, tuple(parameter.shape), seed)
            start, end = rows_of_rank(len(whole), adapters.world, adapters.place)
            parameter.detach().to_local().copy_(whole[start:end])


def initial_lora(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A (rank, in) in fp32, drawn from its name, so that it does not depend on what else is drawn."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
