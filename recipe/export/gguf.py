"""A model as one GGUF file, which llama.cpp, Ollama and what builds on them run.

Tensors come one at a time from any `Tensors` (recipe/export/tensors.py) and go to disk at once, so that a 70B model
needs the memory of its largest tensor twice. The result is the one that llama.cpp's own converter writes, tensor by
tensor and byte by byte (tests/long/test_gguf_oracle.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from recipe.errors import UserError
from recipe.export.gguf_types import KINDS, Fallback, Planned, converted, planned
from recipe.export.gguf_vocab import add_vocabulary
from recipe.plan.shapes import ModelShape, read_config, shape_from_config

if TYPE_CHECKING:
    from recipe.export.tensors import Tensors

# llama.cpp knows no architecture of Mistral's own for these: it is Llama's.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
VOCABULARY_BYTES = 2**24  # more than any of these has, with its merges
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_gguf(
    source: Tensors,
    tokenizer_folder: Path,
    target: Path,
    kind: str,
    *,
    name: str | None = None,
    licence: str | None = None,
) -> list[Fallback]:
    """Write `target`, of a kind of KINDS; what fell back to another type. Nothing is left at `target` where it fails.

    Raises UserError where the kind is unknown, or llama.cpp would compute something else than transformers does.
    """
    if kind not in KINDS:
        raise UserError(f"`{kind}` is no GGUF type that is written here, expected one of {', '.join(KINDS)}")
    where = source.folder / "config.json"
    config = read_config(where)
    shape = shape_from_config(config, str(where))
    plan = list(_plan(source, config, shape, kind, str(where)))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[shape.family]])
    try:
        for tensor in plan:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type
            )
        _add_description(writer, name or source.folder.name, licence)
        _add_parameters(writer, config, shape, str(where))
        writer.add_file_type(KINDS[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer_folder, config, source.shape(EMBEDDING)[0])
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            if tensor.source is None:
                values = _rope_factors(rope_settings(config), shape.head_dim)
            else:
                values = permuted(source.read(tensor.source), tensor.source, shape)
            writer.write_tensor_data(converted(values, tensor))
        writer.close()
    except BaseException:
        writer.close()
        target.unlink(missing_ok=True)
        raise
    return [tensor.fallback for tensor in plan if tensor.fallback]


def file_bytes(source: Tensors, kind: str) -> int:
    """What a file of this kind takes on the disk, known before it is written; nothing else is written on the way."""
    where = source.folder / "config.json"
    config = read_config(where)
    shape = shape_from_config(config, str(where))
    return VOCABULARY_BYTES + sum(tensor.bytes for tensor in _plan(source, config, shape, kind, str(where)))


def permuted(tensor: torch.Tensor, name: str, shape: ModelShape) -> torch.Tensor:
    """The rows of q and k in the order of llama.cpp's Llama: it rotates neighbours, transformers the head's two halves.

    Of a LoRA's B as well, whose rows are the projection's. Qwen's architectures rotate as transformers does.
    """
    if ARCHITECTURES[shape.family] != gguf.MODEL_ARCH.LLAMA:
        return tensor
    heads = shape.heads if ".q_proj." in name else shape.kv_heads if ".k_proj." in name else 0
    if not heads:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def gguf_name(name: str, names: gguf.TensorNameMap, where: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(
            f"{where}: has the tensor {name}, for which GGUF has no name; expected a plain checkpoint"
        )
    return found


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of them: transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _plan(
    source: Tensors, config: dict[str, Any], shape: ModelShape, kind: str, where: str
) -> Iterator[Planned]:
    names = gguf.get_tensor_name_map(ARCHITECTURES[shape.family], shape.layers)
    if rope_settings(config)["rope_type"] == "llama3":
        yield planned("rope_freqs.weight", None, (shape.head_dim // 2,), kind, shape)
    for name in source.names():
        if name.endswith(".rotary_emb.inv_freq") or (shape.tied and name == HEAD):
            continue  # computed, not learnt; the head is the embedding
        yield planned(gguf_name(name, names, where), name, source.shape(name), kind, shape)


def _add_description(writer: gguf.GGUFWriter, name: str, licence: str | None) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    total, shared, expert, experts = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, experts))


def _add_parameters(writer: gguf.GGUFWriter, config: dict[str, Any], shape: ModelShape, where: str) -> None:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(
            f"{where}: hidden_act is `{activation}`, expected silu: llama.cpp has no other for this family"
        )
    if shape.family == "qwen3" and shape.attention_bias:
        raise UserError(f"{where}: attention_bias is set, expected none: llama.cpp's Qwen3 has no biases")
    writer.add_block_count(shape.layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    _add_rope(writer, config, where)


def context_length(config: dict[str, Any]) -> int:
    """Positions that the file may be used with: where layers see a window only, no more than that window.

    llama.cpp attends to everything here, which is the same within the window and something else beyond.
    """
    length, window = int(config.get("max_position_embeddings", 2048)), config.get("sliding_window")
    used = config.get("model_type") == "mistral" or config.get("use_sliding_window", False)
    return min(length, int(window)) if window and used else length


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any], where: str) -> None:
    rope = rope_settings(config)
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or "full_attention" in rope:
        raise UserError(
            f"{where}: rotates part of each head or by layer, expected one rotation of whole heads"
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("default", "llama3"):
        return  # llama3's factors are a tensor
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return
    if kind != "yarn" or rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise UserError(
            f"{where}: the rotary scaling is `{kind}`, expected none, linear, llama3 or plain yarn"
        )
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope.get("beta_fast"):
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if rope.get("beta_slow"):
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope.get("attention_factor") is not None:
        # transformers puts it in the place of 0.1 ln(factor) + 1, llama.cpp multiplies that with it
        # (and does not read yarn_attn_factor, which its converter writes).
        usual = 0.1 * math.log(rope["factor"]) + 1
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / usual)


def _rope_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What Llama 3 divides each frequency by: long waves by `factor`, short ones by 1, a ramp between."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    ramp = (original / wavelengths - low) / (high - low)
    factors = 1 / ((1 - ramp) / factor + ramp)
    factors[wavelengths < original / high] = 1
    factors[wavelengths > original / low] = factor
    return factors
