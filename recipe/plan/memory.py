"""Where the memory goes, part by part, computed from the model's shape, the settings and a placement alone.

On a GPU machine the "device" parts lie in each GPU's memory; on a CPU they lie in host RAM, once per rank. Some lie
there all the time; to them comes the largest moment of a step (moments.py).

Checked against an H100, 70B shapes, one rank, bytes allocated: 8,192 tokens, 48 layers offloaded: 21.08 GiB here, 21.01
measured; 4,096 tokens, 46 offloaded, 8 that keep their activations: 21.82 here, 21.87 measured.
"""

from __future__ import annotations

from recipe.plan import moments
from recipe.plan.moments import FP32
from recipe.plan.parts import GIB, Part
from recipe.plan.placement import EVERYTHING, NOTHING, Placement, kept_bytes, spread_before
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

NF4_BYTES = 0.5
ABSMAX_BLOCK = 64  # weights that share one absmax constant
NESTED_BLOCK = 256  # absmax constants that share one fp32 constant under double quantisation
BUFFERS = 2  # layers on their way to where they are computed (recipe/engine/weights.py)
CUBLAS_BYTES = 32 * 2**20  # its workspace on an H100; less on others
LORA_PARTS = 8  # partial sums of a LoRA gradient (recipe/engine/kernels.py)

# What a GPU process takes outside torch's allocator: the CUDA context with its kernels, and NCCL's buffers
# and channels.
CUDA_CONTEXT_GIB = 0.5
NCCL_GIB = 0.4
# Between allocated and reserved: 0.01 to 0.17 GiB in the settings of docs/benchmarks.md, "The plan against what happened".
ALLOCATOR_SLACK_GIB = 0.2
# Interpreter, torch, transformers, TRL and their arenas, of each rank; on a GPU also CUDA's host side, and NCCL's where
# there are several. Measured there: 1.09 to 1.16 alone, 0.19 more of two (docs/benchmarks.md).
CPU_RANK_GIB = 0.31
GPU_RANK_GIB = 1.10
NCCL_RANK_GIB = 0.19
# `recipe train` itself and torchrun or accelerate's launcher: once. On a GPU machine both import CUDA's libraries.
CPU_LAUNCHER_GIB = 0.5
GPU_LAUNCHER_GIB = 1.0
# What a checkpoint holds is copied, each rank its slice: the adapters and both moments (recipe/train/saver.py). The
# rehearsal keeps the adapters besides.
COPIED = 3
# Preparing needs one process, which reads with many threads.
CPU_PREPARE_GIB = 1.5
GPU_PREPARE_GIB = 2.0
SOURCE_FILE_BYTES = 5e9  # the usual size of a hub checkpoint's files
# Besides the process: pieces of 8 MiB on their way (recipe/prepare/pipeline.py). 0.8 GiB in all were measured on a GPU
# machine, 1.7 with 16 CPU workers, whatever the model's size.
PREPARE_PIECES_GIB = 0.5


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
    parts = _static(shape, settings, world_size, width, placement)
    parts += moments.peak(shape, settings.micro_batch_tokens, width, world_size, placement)
    if on_gpu:
        parts.append(Part("cuBLAS", CUBLAS_BYTES / GIB, "its workspace"))
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
    base = GPU_RANK_GIB + (NCCL_RANK_GIB if world_size > 1 else 0) if on_gpu else CPU_RANK_GIB
    launcher = GPU_LAUNCHER_GIB if on_gpu else CPU_LAUNCHER_GIB
    width = compute_bytes(settings, on_gpu)
    weights = placement.offload_layers * layer_bytes(shape, settings)
    tokens = settings.micro_batch_tokens
    saved = away_bytes(shape, tokens, width, placement)
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules) * FP32
    embedded = tokens * shape.hidden * width * world_size / GIB
    parts = [
        Part("launcher", launcher, "recipe train and what starts the ranks"),
        Part("processes", base * world_size, f"{world_size} × {base:.2f} GiB: Python, torch, libraries"),
        Part("checkpoint", COPIED * lora / GIB, "LoRA and AdamW's moments, copied to be written"),
        # Not at one time, so the larger of the two.
        Part("LoRA once more", lora / GIB, "while rehearsing")
        if lora / GIB >= embedded
        else Part("embedded tokens", embedded, "rows of the embedding"),
        Part("offloaded layers", weights / GIB, f"{placement.offload_layers} of {shape.layers}, pinned"),
        Part(
            "activations",
            saved * world_size / GIB,
            f"of {placement.away_layers} layers on each rank, pinned",
        ),
    ]
    if not on_gpu:
        parts += [Part(part.name, part.gib * world_size, part.note) for part in device]
    return [part for part in parts if part.gib > 0]


def away_bytes(shape: ModelShape, tokens: int, width: int, placement: Placement) -> float:
    """Of the activations of one rank in host RAM."""
    keeping = spread_before(placement.layers, placement.keep_layers, placement.away_layers)
    everything, nothing = (kept_bytes(shape, keep, tokens, width) for keep in (EVERYTHING, NOTHING))
    return keeping * everything + (placement.away_layers - keeping) * nothing


def page_cache_parts(shape: ModelShape, settings: Settings, on_gpu: bool) -> list[Part]:
    """Host RAM that the system fills with files as long as nobody else wants it; no run fails for want of it."""
    width = compute_bytes(settings, on_gpu)
    checkpoint = shape.layers * layer_bytes(shape, settings)
    return [
        Part("embedding", shape.embedding_parameters * width / GIB, "mapped from its file, once per host"),
        Part("NF4 checkpoint", checkpoint / GIB, "read once at the start; from the cache at the next"),
    ]


def prepare_gib(on_gpu: bool) -> float:
    """Peak host RAM of `recipe prepare`, which streams: it does not depend on the model."""
    return (GPU_PREPARE_GIB if on_gpu else CPU_PREPARE_GIB) + PREPARE_PIECES_GIB


def disk_parts(shape: ModelShape, settings: Settings) -> tuple[list[Part], list[Part]]:
    """Disk for the models folder and for the runs folder, in GiB."""
    linear = shape.layers * shape.layer_linear_parameters
    prepared = shape.layers * layer_bytes(shape, settings) + (shape.parameters - linear) * 2
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    # One more than is kept: the oldest goes only when the newest is complete.
    checkpoints = settings.train.keep_checkpoints + 1
    source = Part("source checkpoint", shape.parameters * 2 / GIB, "bf16, from the hub")
    if not settings.prepare.keep_source:
        at_once = min(shape.parameters * 2, 2 * SOURCE_FILE_BYTES)
        source = Part("source checkpoint", at_once / GIB, "two files at a time (prepare.keep_source: false)")
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
    reference = lora if settings.train.method == "dpo" and settings.lora.start else 0
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
    # Gathered, its gradient, and under way to the other ranks, of two layers at a time.
    layer_lora = lora / shape.layers
    working = layer_lora * (width + FP32 if world_size == 1 else width + FP32 * (3 + 3 / world_size))
    working += LORA_PARTS * 3 * settings.lora.rank * shape.hidden * FP32
    constants = absmax_bytes(linear, settings.quantization.double_quant)
    head = shape.embedding_parameters * width
    return [
        Part("NF4 weights", linear * NF4_BYTES / world_size / GIB, layers),
        Part("NF4 constants", constants / world_size / GIB, layers),
        Part("layer buffers", buffers / GIB, "whole layers on their way: this one and the next"),
        Part(
            "dequantised weights",
            placement.slots * largest * width / GIB,
            "one matrix" if placement.slots == 1 else f"{placement.slots} matrices",
        ),
        Part("lm_head", head / world_size / GIB, f"sharded over the vocabulary, {divided}"),
        Part("norms and biases", small * width / GIB, "whole on every rank"),
        Part("LoRA weights", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("LoRA gradients", lora * FP32 / world_size / GIB, f"fp32, {divided}"),
        Part("LoRA reference", reference * width / world_size / GIB, f"what DPO began with, {divided}"),
        Part("AdamW state", lora * 2 * FP32 / world_size / GIB, f"two fp32 moments, {divided}"),
        Part("LoRA of a layer", working / GIB, "whole, its gradient, and partial sums"),
        *_new_tokens(shape, settings),
    ]


def _new_tokens(shape: ModelShape, settings: Settings) -> list[Part]:
    """Rows of the embedding, and of a head of its own, whole on every rank; nothing where there are none."""
    count = len(settings.lora.new_tokens)
    rows = count * shape.hidden * (1 if shape.tied else 2)
    # They, their gradient, AdamW's moments, and what they began with.
    return [Part("new tokens", 5 * rows * FP32 / GIB, f"{count}, fp32, whole on every rank")] if count else []
