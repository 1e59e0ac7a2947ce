"""Where the memory goes, part by part, computed from the model's shape, the settings and a placement alone.

On a GPU machine the "device" parts lie in each GPU's memory; on a CPU they lie in host RAM, once per rank. A step has
three moments that may be its peak: the loss (a chunk of logits), the attention's backward, and the MLP's backward (a
chunk of tokens). All hold the static parts and the saved activations; the largest is what counts.

Checked against an H100: 70B shapes, one rank, 8,192 tokens, 48 layers offloaded: 20.9 GiB here, 21.0 measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipe.plan.placement import EVERYTHING, NOTHING, Placement, kept_bytes
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

GIB = 2**30
NF4_BYTES = 0.5
ABSMAX_BLOCK = 64  # weights that share one absmax constant
NESTED_BLOCK = 256  # absmax constants that share one fp32 constant under double quantisation
FP32 = 4
LOGITS_BYTES = 256 * 2**20  # fp32 logits at once on a rank (recipe/engine/head.py)
BUFFERS = 2  # layers on their way to where they are computed (recipe/engine/weights.py)
FETCHED = 2  # layers whose saved activations are on their way back (recipe/engine/activations.py)

# What a GPU process takes outside torch's allocator: the CUDA context with its kernels, and NCCL's buffers
# and channels.
CUDA_CONTEXT_GIB = 0.5
NCCL_GIB = 0.4
# Between allocated and reserved 0.03 to 0.06 GiB were measured, and 0.2 more than the parts below at most.
ALLOCATOR_SLACK_GIB = 0.2
# Interpreter, torch, transformers, TRL and their arenas; on a GPU also CUDA's host side and the launcher.
CPU_PROCESS_GIB = 1.5
GPU_PROCESS_GIB = 2.0
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


def layer_bytes(shape: ModelShape, settings: Settings) -> float:
    """The frozen bytes of one decoder layer: NF4 and its constants."""
    linear = shape.layer_linear_parameters
    return linear * NF4_BYTES + absmax_bytes(linear, settings.quantization.double_quant)


def device_parts(
    shape: ModelShape, settings: Settings, world_size: int, on_gpu: bool, placement: Placement
) -> list[Part]:
    """Memory of one rank at the peak of a training step, in GiB, without what lies outside the allocator."""
    width = compute_bytes(settings, on_gpu)
    moments = [
        moment(shape, settings, world_size, width, placement)
        for moment in (_loss_moment, _attention_moment, _mlp_moment)
    ]
    parts = _static(shape, settings, world_size, width, placement) + max(moments, key=total_gib)
    if on_gpu:
        parts.append(Part("allocator slack", ALLOCATOR_SLACK_GIB, "rounding and fragments"))
    return [part for part in parts if part.gib > 0]


def outside_allocator(world_size: int) -> list[Part]:
    """GPU memory that torch's allocator does not see."""
    parts = [Part("CUDA context", CUDA_CONTEXT_GIB, "driver and kernels")]
    return [*parts, Part("NCCL", NCCL_GIB, "buffers of the collectives")] if world_size > 1 else parts


def host_parts(
    shape: ModelShape,
    settings: Settings,
    device: list[Part],
    world_size: int,
    on_gpu: bool,
    placement: Placement,
) -> list[Part]:
    """Host RAM of all ranks while training, in GiB. On a CPU every device part is in it, once per rank.

    The embedding is not: it is mapped from its file, one copy for all ranks, and the system may drop its pages.
    """
    base = GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB
    width = compute_bytes(settings, on_gpu)
    weights = placement.offload_layers * layer_bytes(shape, settings)
    parts = [
        Part("processes", base * world_size, f"{world_size} × {base} GiB: Python, torch, libraries"),
        Part("offloaded layers", weights / GIB, f"{placement.offload_layers} of {shape.layers}, pinned"),
        Part(
            "activations",
            _saved_bytes(shape, settings, width, placement, away=True) * world_size / GIB,
            f"of {placement.away_layers} layers on each rank, pinned",
        ),
    ]
    if not on_gpu:
        parts += [Part(part.name, part.gib * world_size, part.note) for part in device]
    return [part for part in parts if part.gib > 0]


def prepare_gib(shape: ModelShape, on_gpu: bool) -> float:
    """Peak host RAM of `recipe prepare`: a process, an output shard, the largest tensor in 16 and 32 bits."""
    largest_linear = max(outputs * inputs for outputs, inputs in shape.linears.values())
    tensors = max(PREPARE_SHARD_BYTES, shape.embedding_parameters * 2) + largest_linear * (2 + FP32)
    return (GPU_PROCESS_GIB if on_gpu else CPU_PROCESS_GIB) + tensors / GIB


def disk_parts(shape: ModelShape, settings: Settings) -> tuple[list[Part], list[Part]]:
    """Disk for the models folder and for the runs folder, in GiB."""
    linear = shape.layers * shape.layer_linear_parameters
    prepared = shape.layers * layer_bytes(shape, settings) + (shape.parameters - linear) * 2
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    # One more than is kept: the oldest goes only when the newest is complete.
    checkpoints = settings.train.keep_checkpoints + 1
    source = Part("source checkpoint", shape.parameters * 2 / GIB, "bf16, from the hub")
    if not settings.prepare.keep_source:
        largest = 10e9 if source.gib > 20 else shape.parameters * 2
        source = Part("source checkpoint", largest / GIB, "two files at a time (prepare.keep_source: false)")
    models = [source, Part("NF4 checkpoint", prepared / GIB, "made by prepare")]
    runs = [
        Part(
            "run checkpoints",
            checkpoints * lora * 3 * FP32 / GIB,
            f"{checkpoints} × (LoRA + AdamW's two moments, fp32)",
        ),
        Part("adapters", 2 * lora * FP32 / GIB, "fp32, the run's and the exported ones"),
    ]
    return models, runs


def _static(
    shape: ModelShape, settings: Settings, world_size: int, width: int, placement: Placement
) -> list[Part]:
    """What one rank holds all the time."""
    here = shape.layers - placement.offload_layers
    linear = here * shape.layer_linear_parameters
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    small = shape.layers * shape.layer_other_parameters + shape.hidden
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    divided = f"1/{world_size} per rank" if world_size > 1 else "one rank holds all"
    layers = f"{here} of {shape.layers} layers, {divided}" if placement.offload_layers else divided
    travelling = shape.layers if world_size > 1 else placement.offload_layers
    buffers = min(BUFFERS, travelling) * layer_bytes(shape, settings)
    if world_size > 1:
        buffers += min(BUFFERS, travelling) * lora / shape.layers * width
        if placement.offload_layers:
            buffers += BUFFERS * layer_bytes(shape, settings) / world_size
    constants = absmax_bytes(linear, settings.quantization.double_quant)
    head = shape.embedding_parameters * width
    return [
        Part("NF4 weights", linear * NF4_BYTES / world_size / GIB, layers),
        Part("NF4 constants", constants / world_size / GIB, layers),
        Part("layer buffers", buffers / GIB, "whole layers on their way: this one and the next"),
        Part("dequantised weights", placement.slots * largest * width / GIB, f"{placement.slots} matrices"),
        Part("lm_head", head / world_size / GIB, f"sharded over the vocabulary, {divided}"),
        Part("norms and biases", small * width / GIB, "whole on every rank"),
        Part("LoRA weights", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("LoRA gradients", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("AdamW state", lora * 2 * FP32 / world_size / GIB, f"two fp32 moments, {divided}"),
        _saved_activations(shape, settings, width, placement),
    ]


def _saved_activations(shape: ModelShape, settings: Settings, width: int, placement: Placement) -> Part:
    """What the forward keeps of every layer for the backward, where it stays on the device."""
    here = shape.layers - placement.away_layers
    kept = sum(1 for keep, away in zip(placement.keep, placement.away, strict=True) if keep and not away)
    note = f"inputs of {here} layers" + (f", all of {kept}" if kept else "")
    return Part("activations", _saved_bytes(shape, settings, width, placement, away=False) / GIB, note)


def _saved_bytes(
    shape: ModelShape, settings: Settings, width: int, placement: Placement, away: bool
) -> float:
    tokens = settings.micro_batch_tokens
    return sum(
        kept_bytes(shape, keep, tokens, width)
        for keep, is_away in zip(placement.keep, placement.away, strict=True)
        if is_away is away
    )


def _returning_bytes(shape: ModelShape, settings: Settings, width: int, placement: Placement) -> float:
    """Saved activations that are on the device for a moment, on their way from or to the host."""
    if not placement.away_layers:
        return 0.0
    kept = min(FETCHED, -(-FETCHED * placement.keep_layers // placement.layers))
    tokens = settings.micro_batch_tokens
    return kept * kept_bytes(shape, EVERYTHING, tokens, width) + (FETCHED - kept) * kept_bytes(
        shape, NOTHING, tokens, width
    )


def _sizes(shape: ModelShape, settings: Settings, width: int) -> tuple[float, float, float]:
    """Bytes of the hidden states, of q, and of k, for a whole micro-batch."""
    tokens = settings.micro_batch_tokens
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return tokens * shape.hidden * width, tokens * query * width, tokens * key * width


def _loss_moment(
    shape: ModelShape, settings: Settings, world_size: int, width: int, placement: Placement
) -> list[Part]:
    hidden, _, _ = _sizes(shape, settings, width)
    logits = min(LOGITS_BYTES, settings.micro_batch_tokens * shape.vocab * FP32)
    gathered = (2 * width + FP32) * shape.hidden * logits / FP32 / max(shape.vocab / world_size, 1)
    return [
        Part("hidden states", 4 * hidden / GIB, "last layer's output, normed, and their gradients"),
        Part("logits", (logits * (1 + width / FP32) + gathered) / GIB, "a chunk of tokens at a time"),
        Part(
            "activations under way",
            _returning_bytes(shape, settings, width, placement) / GIB,
            "to the host and back",
        ),
    ]


def _attention_moment(
    shape: ModelShape, settings: Settings, world_size: int, width: int, placement: Placement
) -> list[Part]:
    hidden, query, key = _sizes(shape, settings, width)
    tensors = hidden + 3 * query + 2 * key + query + 2 * key
    return [
        Part(
            "attention backward",
            (tensors + 4 * query) / GIB,
            "q, k, v, output, their gradients, and the kernel's own",
        ),
        Part(
            "activations under way",
            _returning_bytes(shape, settings, width, placement) / GIB,
            "to the host and back",
        ),
    ]


def _mlp_moment(
    shape: ModelShape, settings: Settings, world_size: int, width: int, placement: Placement
) -> list[Part]:
    hidden, query, key = _sizes(shape, settings, width)
    chunk = min(placement.mlp_chunk, settings.micro_batch_tokens)
    wide = chunk * (3 * shape.intermediate + 2 * shape.hidden) * width
    return [
        Part(
            "MLP backward", (2 * hidden + 2 * query + 2 * key + wide) / GIB, f"{chunk:,} tokens at a time"
        ),
        Part(
            "activations under way",
            _returning_bytes(shape, settings, width, placement) / GIB,
            "to the host and back",
        ),
    ]
