"""Where the memory goes, part by part, computed from the model's shape and the settings alone.

On a GPU machine the "device" parts lie in each GPU's memory; on a CPU they lie in host RAM, once per rank. A
step has two moments that may be its peak: the loss (all logits at once), and the backward of one decoder
layer (its recomputed activations). Both hold the static parts and every checkpoint; the larger one is what
counts.

Not modelled yet: offloading weights, embedding or checkpoints to host RAM, a head sharded over the
vocabulary, and activations kept instead of recomputed. The training code does none of these yet either.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

GIB = 2**30
NF4_BYTES = 0.5
ABSMAX_BLOCK = 64  # weights that share one absmax constant
NESTED_BLOCK = 256  # absmax constants that share one fp32 constant under double quantisation
FP32 = 4

# What a GPU process takes outside torch's allocator: the CUDA context with its kernels, and NCCL's buffers
# and channels.
CUDA_CONTEXT_GIB = 0.5
NCCL_GIB = 0.4
# torch's allocator rounds up and fragments: up to 0.9 GiB between allocated and reserved was seen (FACTS,
# section 3).
ALLOCATOR_SLACK_GIB = 0.5
# Interpreter, torch, transformers, TRL and their arenas; on a GPU also CUDA's host side and pinned buffers.
CPU_PROCESS_GIB = 1.5
GPU_PROCESS_GIB = 2.5
# An output shard that `prepare` collects before it writes (recipe/prepare/quantise.py).
PREPARE_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """One entry of a budget."""

    name: str
    gib: float
    note: str = ""


def total_gib(parts: list[Part]) -> float:
    return sum(part.gib for part in parts)


def absmax_bytes(parameters: int, double_quant: bool) -> float:
    """Bytes of the quantisation constants of that many NF4 parameters."""
    blocks = parameters / ABSMAX_BLOCK
    return blocks + blocks / NESTED_BLOCK * FP32 if double_quant else blocks * FP32


def compute_bytes(settings: Settings, on_gpu: bool) -> int:
    """Bytes per element of activations and unquantised weights: bf16 and fp16 alike 2."""
    if settings.compute.dtype == "auto":
        return 2 if on_gpu else FP32
    return FP32 if settings.compute.dtype == "fp32" else 2


def device_parts(shape: ModelShape, settings: Settings, world_size: int, on_gpu: bool) -> list[Part]:
    """Memory of one rank at the peak of a training step, in GiB, without what lies outside the allocator."""
    width = compute_bytes(settings, on_gpu)
    moments = [
        _loss_moment(shape, settings, width),
        _layer_moment(shape, settings, width),
    ]
    parts = _static(shape, settings, world_size, width) + max(moments, key=total_gib)
    if on_gpu:
        parts.append(Part("allocator slack", ALLOCATOR_SLACK_GIB, "rounding and fragments"))
    return [part for part in parts if part.gib > 0]


def outside_allocator(world_size: int) -> list[Part]:
    """GPU memory that torch's allocator does not see."""
    parts = [Part("CUDA context", CUDA_CONTEXT_GIB, "driver and kernels")]
    return [*parts, Part("NCCL", NCCL_GIB, "buffers of the collectives")] if world_size > 1 else parts


def host_parts(device: list[Part], world_size: int, on_gpu: bool) -> list[Part]:
    """Host RAM of all ranks while training, in GiB. On a CPU every device part is in it, once per rank."""
    base = GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB
    parts = [Part("processes", base * world_size, f"{world_size} × {base} GiB: Python, torch, libraries")]
    if not on_gpu:
        parts += [Part(part.name, part.gib * world_size, part.note) for part in device]
    return parts


def prepare_gib(shape: ModelShape, on_gpu: bool) -> float:
    """Peak host RAM of `recipe prepare`: a process, an output shard, the largest tensor in 16 and 32 bits."""
    largest_linear = max(outputs * inputs for outputs, inputs in shape.linears.values())
    tensors = max(PREPARE_SHARD_BYTES, shape.embedding_parameters * 2) + largest_linear * (2 + FP32)
    return (GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB) + tensors / GIB


def disk_parts(shape: ModelShape, settings: Settings) -> tuple[list[Part], list[Part]]:
    """Disk for the models folder and for the runs folder, in GiB."""
    linear = shape.layers * shape.layer_linear_parameters
    prepared = (
        linear * NF4_BYTES
        + absmax_bytes(linear, settings.quantization.double_quant)
        + (shape.parameters - linear) * 2
    )
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    # One more than is kept: the oldest goes only when the newest is complete.
    checkpoints = settings.train.keep_checkpoints + 1
    models = [
        Part("source checkpoint", shape.parameters * 2 / GIB, "bf16, from the hub"),
        Part("NF4 checkpoint", prepared / GIB, "made by prepare"),
    ]
    runs = [
        Part(
            "run checkpoints",
            checkpoints * lora * 3 * FP32 / GIB,
            f"{checkpoints} × (LoRA + AdamW's two moments, fp32)",
        ),
        Part("adapters", 2 * lora * FP32 / GIB, "fp32, the run's and the exported ones"),
    ]
    return models, runs


def _static(shape: ModelShape, settings: Settings, world_size: int, width: int) -> list[Part]:
    """What one rank holds all the time."""
    linear = shape.layers * shape.layer_linear_parameters
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    small = shape.parameters - linear - shape.embedding_parameters - shape.head_parameters
    embedding = shape.embedding_parameters * width
    divided = f"1/{world_size} per rank" if world_size > 1 else "one rank holds all"
    parts = [
        Part("NF4 weights", linear * NF4_BYTES / world_size / GIB, divided),
        Part(
            "NF4 constants",
            absmax_bytes(linear, settings.quantization.double_quant) / GIB,
            "whole on every rank",
        ),
        Part("embedding", embedding / world_size / GIB, divided),
        Part("lm_head", shape.head_parameters * width / world_size / GIB, divided),
        Part("norms and biases", small * width / world_size / GIB, divided),
        Part("LoRA weights", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("LoRA gradients", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("AdamW state", lora * 2 * FP32 / world_size / GIB, f"two fp32 moments, {divided}"),
        _kept_activations(shape, settings, width),
    ]
    if shape.tied:
        parts.insert(3, Part("embedding gathered", embedding / GIB, "tied: whole while a step runs"))
    return parts


def _kept_activations(shape: ModelShape, settings: Settings, width: int) -> Part:
    """What the forward keeps of every layer for the backward."""
    if settings.compute.activation_checkpointing:
        inputs = shape.layers * settings.micro_batch_tokens * shape.hidden * width
        return Part("activation checkpoints", inputs / GIB, "input of every layer")
    whole = shape.layers * _activation_bytes(shape, settings, width)
    return Part("activations", whole / GIB, "of every layer: activation_checkpointing is off")


def _gathered_layer_bytes(shape: ModelShape, settings: Settings, width: int) -> float:
    """One decoder layer, gathered from all ranks: its NF4 bytes and, in the compute dtype, the rest."""
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules) / shape.layers
    return shape.layer_linear_parameters * NF4_BYTES + (shape.layer_other_parameters + lora) * width


def _loss_moment(shape: ModelShape, settings: Settings, width: int) -> list[Part]:
    """The head is gathered (flat buffer, then copied out), then all logits exist, with copy and gradient."""
    head = shape.head_parameters * width
    logits = settings.micro_batch_tokens * shape.vocab * (width + FP32 + FP32)
    return [
        Part("lm_head gathered", head / GIB, "whole while the loss is computed"),
        Part("its gather buffer", max(0, head - logits) / GIB, "what the logits do not reuse"),
        Part("logits", logits / GIB, "tokens × vocabulary: output, fp32 copy, gradient"),
        Part(
            "gathered layer", _gathered_layer_bytes(shape, settings, width) / GIB, "the last one, prefetched"
        ),
    ]


def _layer_moment(shape: ModelShape, settings: Settings, width: int) -> list[Part]:
    """The backward of one decoder layer while the next one is gathered."""
    layer = _gathered_layer_bytes(shape, settings, width)
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    recomputed = _activation_bytes(shape, settings, width) if settings.compute.activation_checkpointing else 0
    return [
        Part("gathered layers", 3 * layer / GIB, "this one, and the next: flat buffer and copy"),
        Part("dequantised weights", 2 * largest * width / GIB, "the largest linear layer, twice"),
        Part("activations of a layer", recomputed / GIB, "recomputed in the backward"),
    ]


def _activation_bytes(shape: ModelShape, settings: Settings, width: int) -> float:
    """What one layer keeps for its backward, tensor by tensor, and two gradients of the MLP."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden = (
        4 * shape.hidden * width + 2 * shape.hidden * FP32
    )  # norm outputs, residuals; norms compute in fp32
    attention = (3 * query + 4 * key) * width  # q and k before and after the rotation, v, the output
    mlp = (4 + 2) * shape.intermediate * width  # gate, up, silu(gate), their product; gradients of two
    # LoRA dropout gives every adapter its own copy of its input, and a mask of one byte per element.
    adapted = [shape.linears[name][1] for name in settings.lora.target_modules]
    dropout = sum(adapted) * (width + 1) if settings.lora.dropout else 0
    return settings.micro_batch_tokens * (hidden + attention + mlp + dropout)
