"""How long a micro-batch and a step take: what a rank computes, moves and waits for, each at a measured rate.

Arithmetic fills the card; copies run beside it and cost what they take longer than it. The constants come from one step
of 70B's shapes on an H100, 4,096 tokens, under torch.profiler (docs/benchmarks.md): what each kind of work took against
what is counted here. On other cards the same shares of their own rates are taken, which nobody has measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipe.plan import memory
from recipe.plan.cards import Card, product_flop
from recipe.plan.moments import FP32
from recipe.plan.placement import MLP_SLOTS, Placement
from recipe.plan.shapes import ModelShape
from recipe.settings import Settings

# Of the card's dense rate: 2,104 ms for 1,545 TFLOP are 734 TFLOP/s of the 790 in cards.py (772 in that very run).
PRODUCTS = 0.93
# Of the same, for attention over long documents, and the length at which it reaches half of that: 213 ms for 99 TFLOP at
# 4,096 tokens tie the one to the other. How it rises beyond is known from one sequence of 32,768 tokens alone (28 s, met
# within 5 %), whose peer did not exist, so that it may be somewhat slower on real numbers.
ATTENTION = 0.85
ATTENTION_HALF_TOKENS = 1800
ATTENTION_BACKWARD = 2.5  # times the forward's FLOP: five products for two
# Of memory bandwidth: 274 ms for 539 GB of norms, rotation, SwiGLU, LoRA's thin products and softmax.
ELEMENT_WISE = 0.59
# The same, for NF4 to 16 bits, half a byte read and two written: 131 ms for 373 GB.
DEQUANTISATION = 0.85
# The embedding's rows, looked up on the host and copied from pageable memory before anything can compute: 67 MB in the
# 29 ms of the step in which nothing did.
EMBEDDING_GB_PER_SECOND = 2.3
# What Python and the driver take to start the kernels of a layer's forward and backward, on an H200's host: 0.252 s for
# 32 layers at 2,048 tokens, 0.362 s on two ranks (docs/benchmarks.md).
LAUNCH_SECONDS = 0.0075
LAUNCH_AWAY_SECONDS = 0.006  # besides, for a layer whose activations go to the host
LAUNCH_GATHER_SECONDS = 0.0035  # besides, for a layer that is gathered
# What a layer that keeps nothing computes again in its backward, of its forward: all but down_proj.
AGAIN = 0.8
# Of copies that hide, since memory bandwidth is shared: what the step took beyond the sum of its kinds.
HIDDEN_COPIES = 0.02
ADAMW_PASSES = 7  # over fp32: parameter, gradient and two moments read, all but the gradient written
# fp32 logits of a chunk: read for the maximum and the sum, read and written to subtract, raise and divide, and rounded.
LOGITS_BYTES = 4 + 4 + 3 * 8 + 6


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch on one rank; the total is less than the sum, as copies hide."""

    products: float
    attention: float
    element_wise: float
    dequantisation: float
    embedding: float  # nothing computes meanwhile
    exchange: float  # of hidden states for the loss, between the ranks; nothing computes meanwhile
    host_copies: float
    gathers: float
    launches: float  # the host's; the card computes meanwhile
    forward: float  # of the arithmetic, as a share

    @property
    def arithmetic(self) -> float:
        return self.products + self.attention + self.element_wise + self.dequantisation

    @property
    def copies(self) -> float:
        """Both go over the card's one link."""
        return self.host_copies + self.gathers

    @property
    def hidden_copies(self) -> float:
        """Forward and backward need the same layers, half of the copies each, and hide them behind their own arithmetic."""
        phases = (self.forward * self.arithmetic, (1 - self.forward) * self.arithmetic)
        return sum(min(self.copies / 2, phase) for phase in phases)

    @property
    def total(self) -> float:
        hidden = self.hidden_copies
        waits = self.embedding + self.exchange + self.copies - hidden
        return max(self.arithmetic + HIDDEN_COPIES * hidden + waits, self.launches)


def micro_batch_seconds(
    shape: ModelShape, settings: Settings, world_size: int, card: Card, placement: Placement
) -> Seconds:
    """Forward and backward of a micro-batch whose documents are as long as the settings allow."""
    tokens = settings.micro_batch_tokens
    bandwidth, link = card.memory_gb_per_second * 1e9, card.link_gb_per_second * 1e9
    rate = card.tflops * 1e12  # attention kernels add up in fp32 always
    document = min(settings.data.max_length, tokens)
    attention_rate = ATTENTION * rate * document / (document + ATTENTION_HALF_TOKENS)
    embedded = tokens * shape.hidden * memory.compute_bytes(settings, on_gpu=True)
    return Seconds(
        products=product_flop(shape, tokens, placement.keep_layers)
        / (PRODUCTS * card.product_rate(settings.compute.accumulate)),
        attention=_attention_flop(shape, tokens, document, placement) / attention_rate,
        element_wise=_element_wise_bytes(shape, settings, placement) / (ELEMENT_WISE * bandwidth),
        dequantisation=_dequantised_bytes(shape, settings, placement) / (DEQUANTISATION * bandwidth),
        embedding=embedded / (EMBEDDING_GB_PER_SECOND * 1e9),
        # Gathered in 16 bits, the gradients summed up in fp32.
        exchange=(world_size - 1) * (embedded + tokens * shape.hidden * FP32) / link,
        host_copies=_host_bytes(shape, settings, world_size, placement) / link,
        gathers=_gathered_bytes(shape, settings, world_size) / link,
        launches=shape.layers * (LAUNCH_SECONDS + (LAUNCH_GATHER_SECONDS if world_size > 1 else 0))
        + placement.away_layers * LAUNCH_AWAY_SECONDS,
        # The backward has as many products as the forward, since frozen weights need no gradient.
        forward=1 / (2 + AGAIN * (1 - placement.keep_layers / shape.layers)),
    )


def step_seconds(
    shape: ModelShape, settings: Settings, world_size: int, card: Card, placement: Placement
) -> float:
    """An optimizer step: its micro-batches, one after another, and AdamW over the rank's share of LoRA."""
    micro_batch = micro_batch_seconds(shape, settings, world_size, card, placement)
    adamw = adamw_seconds(shape, settings, world_size, card)
    return passes(settings, world_size, micro_batch) * micro_batch.total + adamw


def passes(settings: Settings, world_size: int, micro_batch: Seconds) -> float:
    """Micro-batches of a step; for DPO with the forward of the reference that each has besides."""
    reference = micro_batch.forward if settings.train.method == "dpo" else 0.0
    return settings.accumulation(world_size) * (1 + reference)


def adamw_seconds(shape: ModelShape, settings: Settings, world_size: int, card: Card) -> float:
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules) / world_size
    return ADAMW_PASSES * lora * FP32 / (card.memory_gb_per_second * 1e9)


def _attention_flop(shape: ModelShape, tokens: int, document: int, placement: Placement) -> float:
    """Causal: half of the scores."""
    forward = 2 * tokens * document * shape.heads * shape.head_dim
    again = shape.layers - placement.keep_layers
    return forward * ((1 + ATTENTION_BACKWARD) * shape.layers + again)


def _element_wise_bytes(shape: ModelShape, settings: Settings, placement: Placement) -> float:
    """What the kernels of recipe/engine/kernels.py read and write, every projection adapted; and the loss's."""
    hidden, wide = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rotation = 2 * (query + key)
    # Elements per token. Norms 4 hidden, a copy of the residual stream 2; LoRA reads each input once; SwiGLU.
    forward = 6 * hidden + (2 * hidden + query + wide) + rotation + 3 * wide
    # The same up to the MLP, without its norm, which the backward needs in any case.
    again = 4 * hidden + (hidden + query) + rotation
    # Norms and their gradients 14; LoRA's inputs, gradients of A and additions to the gradients; SwiGLU's.
    backward = 14 * hidden + (8 * hidden + 4 * query + 4 * wide) + rotation + 6 * wide
    layers = shape.layers * (forward + backward) + (shape.layers - placement.keep_layers) * again
    width = memory.compute_bytes(settings, on_gpu=True)
    return settings.micro_batch_tokens * (layers * width + shape.vocab * LOGITS_BYTES)


def _dequantised_bytes(shape: ModelShape, settings: Settings, placement: Placement) -> float:
    """Read and written; each weight counted as often as it is dequantised in one micro-batch."""
    linear, layers = shape.layer_linear_parameters, shape.layers
    mlp = 3 * shape.linears["down_proj"][0] * shape.linears["down_proj"][1]
    attention = linear - mlp
    chunks = -(-settings.micro_batch_tokens // placement.mlp_chunk)
    again = layers - placement.keep_layers
    weights: float
    if placement.slots >= MLP_SLOTS:
        weights = 2 * layers * linear + again * attention
    else:
        recomputed = chunks * mlp * 2 / 3
        weights = layers * (attention + chunks * mlp) * 2 + again * (attention + recomputed)
    return weights * (memory.NF4_BYTES + memory.compute_bytes(settings, on_gpu=True))


def _host_bytes(shape: ModelShape, settings: Settings, world_size: int, placement: Placement) -> float:
    """The rank's slices of offloaded layers, for the forward and the backward; activations, there and back."""
    width, tokens = memory.compute_bytes(settings, on_gpu=True), settings.micro_batch_tokens
    away = memory.away_bytes(shape, tokens, width, placement)
    return 2 * (placement.offload_layers * memory.layer_bytes(shape, settings) / world_size + away)


def _gathered_bytes(shape: ModelShape, settings: Settings, world_size: int) -> float:
    """Of the other ranks: layers and their LoRA for the forward and the backward; LoRA's gradients in fp32."""
    lora = shape.lora_parameters(settings.lora.rank, settings.lora.target_modules)
    width = memory.compute_bytes(settings, on_gpu=True)
    layers = shape.layers * memory.layer_bytes(shape, settings)
    return (2 * (layers + lora * width) + lora * FP32) * (world_size - 1) / world_size
