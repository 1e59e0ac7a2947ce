"""The shape of a model, which is all that a plan needs: no weights, no torch, no network.

A shape comes from a `config.json` (a local folder, or one already prepared), else from a small table of the
models that this recipe was written for. Dense Llama, Mistral and Qwen models only; `check_supported` names
what is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recipe.errors import UserError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "a dense Llama, Mistral, Qwen2 or Qwen3 text model"
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model, as its config.json names them; counts are exact."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    attention_bias: bool = False
    family: str = "llama"

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each quantised linear layer of one decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @cached_property
    def layer_linear_parameters(self) -> int:
        """Parameters of one layer that become NF4."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def layer_other_parameters(self) -> int:
        """Norms and biases of one layer, which stay unquantised."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.family == "qwen3" else 0)
        if not self.attention_bias:
            return norms
        biased = ("q_proj", "k_proj", "v_proj") + (() if self.family == "qwen2" else ("o_proj",))
        return norms + sum(self.linears[name][0] for name in biased)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the lm_head alone: 0 where it is the embedding."""
        return 0 if self.tied else self.embedding_parameters

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        layer = self.layer_linear_parameters + self.layer_other_parameters
        return self.layers * layer + self.embedding_parameters + self.head_parameters + self.hidden

    def lora_parameters(self, rank: int, target_modules: Iterable[str]) -> int:
        """Trainable parameters: A (rank × inputs) and B (outputs × rank) for each adapted linear layer."""
        return self.layers * rank * sum(sum(self.linears[name]) for name in target_modules)


_LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128256)
_SMOLLM2_135M = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
KNOWN = {
    "demo": _SMOLLM2_135M,
    "smollm2-135m": _SMOLLM2_135M,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.3-70b": _LLAMA_70B,
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
    "mistral-7b-v0.3": ModelShape(4096, 14336, 32, 32, 8, 128, 32768, family="mistral"),
    "qwen2.5-72b": ModelShape(8192, 29568, 80, 64, 8, 128, 152064, attention_bias=True, family="qwen2"),
}


def shape_of(model_id: str | None, config_folders: Iterable[str | Path] = ()) -> ModelShape:
    """The shape of a hub id, a local folder or `demo`.

    `config_folders` are places where a hub id's config.json may already lie, such as its prepared folder.
    Raises UserError where the shape is not to be had without network.
    """
    if not model_id:
        raise UserError("model.id is empty, expected a hub id (org/name), a local folder, or `demo`")
    for folder in (model_id, *config_folders):
        config = Path(folder) / "config.json"
        if config.is_file():
            return shape_from_config(read_config(config), str(config))
    if Path(model_id).is_dir():
        raise UserError(f"{model_id}: has no config.json, expected a Hugging Face model folder")
    # Copies of a model under another organisation's name have its shape.
    name = re.sub(r"^meta-|-instruct(?=-v|$)", "", model_id.lower().rpartition("/")[2])
    if name not in KNOWN:
        raise UserError(
            f"model.id is `{model_id}`, whose shape is not known here; expected one of "
            f"{', '.join(KNOWN)}, or a folder with config.json; run `recipe prepare` first, or download its "
            "config.json and name that folder"
        )
    return KNOWN[name]


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or UserError with the line that is wrong."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}), expected a model's config"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, expected a model's config") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a model's config") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no JSON object, expected a model's config")
    return config


def check_supported(config: dict[str, Any], where: str) -> None:
    """Refuse by name what the recipe would train wrongly or not at all. `where` opens the message."""
    family = config.get("model_type")
    name = (config.get("architectures") or [family or "unknown"])[0]
    experts = next((key for key in EXPERT_KEYS if (config.get(key) or 0) > 1), None)
    if experts or "moe" in str(family) or family == "mixtral":
        count = f" ({experts} {config[experts]})" if experts else ""
        raise UserError(
            f"{where}: {name} is a mixture of experts{count}, expected {SUPPORTED}: "
            "bitsandbytes silently leaves the experts unquantised, so nearly the whole model would stay in 16 bits"
        )
    other_inputs = next(
        (key for key in ("vision_config", "audio_config", "text_config") if config.get(key)), None
    )
    if other_inputs or name.endswith("ForConditionalGeneration"):
        found = f" ({other_inputs} is set)" if other_inputs else ""
        raise UserError(f"{where}: {name} is a vision or multimodal model{found}, expected {SUPPORTED}")
    if family not in FAMILIES:
        raise UserError(f"{where}: {name} (model_type `{family}`) is not supported, expected {SUPPORTED}")
    if config.get("architectures") and name != FAMILIES[family]:
        raise UserError(f"{where}: architecture {name} is not supported, expected {FAMILIES[family]}")


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a supported config.json describes."""
    check_supported(config, where)

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is `{value}`, expected a whole number of at least 1")
        return value

    family, heads, hidden = config["model_type"], size("num_attention_heads"), size("hidden_size")
    return ModelShape(
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        # Qwen2's projections have biases without saying so.
        attention_bias=bool(config.get("attention_bias", family == "qwen2")),
        family=family,
    )
