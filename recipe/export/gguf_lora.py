"""LoRA adapters as a GGUF file, which llama.cpp and Ollama put on a GGUF file of the base.

Of the base only config.json is read. What such a file cannot hold is refused: it knows A, B and one alpha, no more.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf

from recipe.errors import UserError
from recipe.export.gguf import ARCHITECTURES, EMBEDDING, HEAD, gguf_name, permuted
from recipe.export.gguf_types import converted, planned
from recipe.export.peftfolder import CONFIG, PeftFolder, Weighted
from recipe.plan.shapes import ModelShape, read_config, shape_from_config


def write_gguf_lora(adapters: Path, base_folder: Path, target: Path, *, name: str | None = None) -> None:
    """Write `target`, in fp32; nothing is left there where it fails.

    Raises UserError where the adapters are not of this base, or are more than plain LoRA.
    """
    where = base_folder / "config.json"
    shape = shape_from_config(read_config(where), str(where))
    folder = PeftFolder(Weighted(adapters), _weights(shape), base_folder)
    alpha = _alpha(folder)
    architecture = ARCHITECTURES[shape.family]
    names = gguf.get_tensor_name_map(architecture, shape.layers)
    plan = [
        (
            weight,
            planned(f"{gguf_name(weight, names, str(adapters))}.lora_{part}", weight, size, "f32", shape),
        )
        for weight in _weights(shape)
        if weight in folder.linears
        for part, size in zip("ab", (matrix.shape for matrix in folder.matrices(weight)), strict=True)
    ]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        for _, tensor in plan:
            writer.add_tensor_info(tensor.name, tensor.shape, "float32", tensor.bytes, tensor.type)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name or adapters.parent.name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, tensor in plan:
            a, b = folder.matrices(weight)
            values = a if tensor.name.endswith("_a") else permuted(b, weight, shape)
            writer.write_tensor_data(converted(values, tensor))
        writer.close()
    except BaseException:
        writer.close()
        target.unlink(missing_ok=True)
        raise


def _weights(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """What adapters can be on, by the names of a checkpoint."""
    part = {
        name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for name in shape.linears
    }
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        for name, size in shape.linears.items():
            found[f"model.layers.{layer}.{part[name]}.{name}.weight"] = size
    return found if shape.tied else found | {HEAD: (shape.vocab, shape.hidden)}


def _alpha(folder: PeftFolder) -> float:
    """llama.cpp multiplies by alpha / rank, so rsLoRA's alpha / sqrt(rank) is another alpha."""
    where = folder.folder / CONFIG
    if folder.tokens:
        raise UserError(
            f"{where}: trainable_token_indices is set, expected none: a GGUF adapter cannot hold rows of new tokens; use "
            "--gguf of the merged model"
        )
    alpha = float(folder.config.lora_alpha)
    if not alpha:
        raise UserError(f"{where}: lora_alpha is 0, which llama.cpp takes for rank, expected another")
    return alpha * math.sqrt(folder.config.r) if folder.config.use_rslora else alpha
