"""A PEFT folder, opened for merging: which weights of the base it changes, and its matrices, read one at a time.

Everything is checked when it is opened, before a merge has written anything: what PEFT can do and a merge here cannot is
refused by its name, and every tensor must have its place in the base.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from recipe.engine.checkpoint import Checkpoint
from recipe.errors import UserError
from recipe.files import read_json, sha256_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, ROWS = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
EXPORT_AGAIN = "export the adapters again"
# What may have any value: names, what only training needs, and what is merged.
FREE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "trainable_token_indices", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("peft_type", "qalora_group_size"),  # the latter is for use_qalora only
}
# Starts that leave the base as it is; PiSSA and its like take something out of it.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Weighted:
    """Adapters in a PEFT folder, and what their update is multiplied by.

    Rows of new tokens are replaced, not added to, so they are taken as they are whatever the weight, as PEFT does.
    """

    folder: Path
    weight: float = 1.0


class PeftFolder:
    """The adapters of a folder, fitted to the weights of a base (name: shape)."""

    def __init__(self, adapters: Weighted, base: dict[str, tuple[int, ...]], base_folder: Path):
        self.folder, self.weight = adapters.folder, adapters.weight
        self.base_folder = base_folder
        if not math.isfinite(adapters.weight):
            raise UserError(f"{self.folder}: its weight is {adapters.weight}, expected a number")
        self.config = self._config()
        if not (self.folder / WEIGHTS).is_file():
            raise UserError(
                f"{self.folder}: has no {WEIGHTS}, expected the adapters' weights beside {CONFIG}"
            )
        self.tensors = Checkpoint(self.folder, EXPORT_AGAIN, WEIGHTS)
        self.linears: set[str] = set()  # weights of the base that get an update
        self.tokens: dict[str, list[int]] = {}  # weights of the base with rows of their own: which rows
        self._names: dict[str, str] = {}  # of the tensors with those rows
        self._fit(base)

    def _config(self) -> LoraConfig:
        """Raises UserError unless it is plain LoRA."""
        path = self.folder / CONFIG
        said = read_json(path)
        if not isinstance(said, dict) or said.get("peft_type") != "LORA":
            kind = said.get("peft_type") if isinstance(said, dict) else "no mapping"
            raise UserError(f"{path}: peft_type is {kind}, expected LORA: nothing else can be merged")
        known = {field.name: field for field in dataclasses.fields(LoraConfig)}
        for name, value in said.items():
            if name == "init_lora_weights":
                if value not in PLAIN_STARTS:
                    raise UserError(
                        f"{path}: init_lora_weights is {value}, which changes the base; merge it with PEFT"
                    )
            elif name not in FREE and value:
                unused = _unused(known[name]) if name in known else None
                if value != unused:
                    raise UserError(
                        f"{path}: {name} is {json.dumps(value)[:60]}, expected {json.dumps(unused)}: such adapters cannot be "
                        "merged here; merge them with PEFT"
                    )
        if not isinstance(said.get("r"), int) or said["r"] < 1:
            raise UserError(f"{path}: r is {said.get('r')}, expected the rank, a whole number from 1")
        return LoraConfig(
            r=said["r"],
            lora_alpha=said.get("lora_alpha", 8),
            use_rslora=bool(said.get("use_rslora")),
            trainable_token_indices=said.get("trainable_token_indices"),
            init_lora_weights=False,
            inference_mode=True,
        )

    def _fit(self, base: dict[str, tuple[int, ...]]) -> None:
        """Find the place of every tensor in the base. Raises UserError for the first that has none or does not fit."""
        rows = _rows_by_module(self.config.trainable_token_indices)
        for name in self.tensors.tensors:
            stem = next((name.removesuffix(end) for end in (A, B, ROWS) if name.endswith(end)), "")
            weight = f"{stem.removeprefix(PREFIX)}.weight"
            if not stem.startswith(PREFIX):
                raise self._wrong(
                    name, "is no matrix of LoRA and no row of a token", "lora_A, lora_B or rows"
                )
            if weight not in base:
                raise self._wrong(
                    name,
                    f"has no place in {self.base_folder}",
                    "adapters of this very model, which is another",
                )
            if name.endswith(ROWS):
                module = stem.removeprefix(PREFIX)
                ids = next((ids for key, ids in rows.items() if f".{module}".endswith(f".{key}")), None)
                if ids is None:
                    raise self._wrong(name, f"has rows that {CONFIG} does not number", "its indices there")
                self._check_shape(name, (len(ids), base[weight][1]))
                if not all(0 <= row < base[weight][0] for row in ids) or len(set(ids)) != len(ids):
                    raise self._wrong(
                        name, f"has the rows {ids[:3]}… of {base[weight][0]:,}", "each once, and there"
                    )
                self.tokens[weight], self._names[weight] = ids, name
                continue
            other = stem + (B if name.endswith(A) else A)
            if other not in self.tensors:
                raise self._wrong(name, f"stands without {other.removeprefix(PREFIX)}", "both A and B")
            outputs, inputs = base[weight]
            self._check_shape(name, (self.config.r, inputs) if name.endswith(A) else (outputs, self.config.r))
            self.linears.add(weight)
        if not self.linears and not self.tokens:
            raise UserError(f"{self.folder / WEIGHTS}: has no tensors, expected adapters; {EXPORT_AGAIN}")
        for key in rows:
            if not any(f".{weight.removesuffix('.weight')}".endswith(f".{key}") for weight in self.tokens):
                raise UserError(
                    f"{self.folder / WEIGHTS}: has no rows for {key}, which {CONFIG} speaks of under "
                    f"trainable_token_indices; {EXPORT_AGAIN}"
                )

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self.tensors.tensors[name].shape
        if found != expected:
            raise self._wrong(
                name,
                f"has shape {list(found)}",
                f"{list(expected)} for {self.base_folder}; it is of another model",
            )

    def _wrong(self, name: str, found: str, expected: str) -> UserError:
        return UserError(f"{self.folder / WEIGHTS}: {name} {found}, expected {expected}")

    def matrices(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) for a weight of the base, in fp32, as PEFT loads them."""
        stem = PREFIX + weight.removesuffix(".weight")
        return self._read(stem + A), self._read(stem + B)

    def rows(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers (tokens,) and values (tokens, hidden), in fp32, of the rows of `weight` that are replaced."""
        return torch.tensor(self.tokens[weight]), self._read(self._names[weight])

    def _read(self, name: str) -> torch.Tensor:
        values = self.tensors.read(name).float()
        if not values.isfinite().all():
            raise self._wrong(name, "has NaN or infinite values", f"numbers; {EXPORT_AGAIN}")
        return values

    def identity(self) -> list[Any]:
        """What changes when what is merged does."""
        return [self.weight, sha256_of(self.folder / CONFIG), sha256_of(self.folder / WEIGHTS)]


def _unused(field: dataclasses.Field) -> Any:
    """What a setting of LoraConfig is where it is not used."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _rows_by_module(indices: list[int] | dict[str, list[int]] | None) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: a mere list is of the embedding."""
    if not indices:
        return {}
    return dict(indices) if isinstance(indices, dict) else {"embed_tokens": list(indices)}
