"""An engine with random weights of a true shape, for benchmarks: nothing is quantised and nothing is read.

Every packed byte is random, so the weights are NF4's sixteen values in equal shares, scaled to a deviation of about
0.02 as trained weights have. The embedding is a file like a checkpoint's, so that its host memory is that of a real run.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from bitsandbytes.functional import create_dynamic_map
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PretrainedConfig

from recipe.engine.build import Build, make_engine, small_tensors, start_adapters
from recipe.engine.layout import Constants
from recipe.engine.memory import EmbeddingTable
from recipe.plan.shapes import ModelShape

DEVIATION = 0.02
NF4_DEVIATION = 0.59  # of NF4's sixteen values in equal shares
CHUNK_ROWS = 8192


def random_model(shape: ModelShape, build: Build, seed: int, deviation: float = DEVIATION) -> PeftModel:
    """As recipe.engine.load.load_sharded, without a checkpoint; B is random too, so that no gradient is zero.

    deviation: of the weights and the head. Random weights as large as trained ones make a network that amplifies
    every rounding; a tenth of it leaves the residual stream near its input, and gradients can be compared.
    """
    device, dtype = build.device, build.dtype
    embedding = random_embedding(shape, build.mesh, device)
    model = make_engine(random_config(shape), shape, build, nested=True, embedding=embedding)
    engine = model.engine
    generator = torch.Generator(device).manual_seed(seed + build.rank)
    store, layers = engine.store, model.get_base_model().model.layers
    code = create_dynamic_map().to(device)
    held = store.layout.of_rank(build.rank)
    scratch = torch.empty(store.layout.slice_bytes, dtype=torch.uint8, device=device)
    for index, shard in enumerate(store.shards):
        scratch.random_(0, 256, generator=generator)
        for piece, start, end, place in held:
            if piece.key.endswith("nested_absmax"):
                scratch[place : place + end - start].view(torch.float32).fill_(deviation / NF4_DEVIATION / 4)
        shard.copy_(scratch)
        for name in store.layout.linears:
            store.constants[index][name] = Constants(code, deviation / NF4_DEVIATION)
        for name, size in small_tensors(layers[index]):
            value = 0.0 if name.endswith("bias") else 1.0
            store.small[index][name] = torch.full(size, value, device=device, dtype=dtype)
    engine.head.weight.normal_(0, deviation, generator=generator)
    engine.norm.fill_(1)
    start_adapters(engine.adapters, seed)
    engine.adapters.masters.add_(torch.randn(engine.adapters.masters.shape, device=device) * 1e-3)
    return model


def random_config(shape: ModelShape) -> PretrainedConfig:
    """transformers' configuration of a shape, with the settings of Llama 3.1 where a shape says nothing."""
    return AutoConfig.for_model(
        shape.family,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        attention_bias=shape.attention_bias,
        tie_word_embeddings=shape.tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def random_embedding(shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> EmbeddingTable:
    """A table that all ranks of a host share."""
    made = [write_table(shape, device) if mesh.get_local_rank() == 0 else ""]
    if mesh.size() > 1:
        dist.broadcast_object_list(made, src=0)
    table = EmbeddingTable(Path(made[0]), 0, (shape.vocab, shape.hidden), torch.bfloat16)
    if mesh.size() > 1:
        dist.barrier()
    if mesh.get_local_rank() == 0:
        os.unlink(made[0])
    return table


def random_table(shape: ModelShape, device: torch.device) -> EmbeddingTable:
    """A table of this process alone."""
    made = write_table(shape, device)
    table = EmbeddingTable(Path(made), 0, (shape.vocab, shape.hidden), torch.bfloat16)
    os.unlink(made)
    return table


def write_table(shape: ModelShape, device: torch.device) -> str:
    """A file that is to lose its name once it is mapped: it then goes when the processes end."""
    descriptor, made = tempfile.mkstemp(prefix="embedding-")
    with open(descriptor, "wb") as file:
        for first in range(0, shape.vocab, CHUNK_ROWS):
            rows = min(CHUNK_ROWS, shape.vocab - first)
            block = torch.randn(rows, shape.hidden, device=device).bfloat16() * DEVIATION
            file.write(block.cpu().view(torch.uint8).numpy().tobytes())
    return made
