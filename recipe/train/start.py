"""`lora.start`: adapters to begin with, out of a PEFT folder or another run, checked before anything is prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from recipe.errors import UserError
from recipe.files import sha256_of
from recipe.settings import Settings

if TYPE_CHECKING:
    from recipe.engine.lora import Adapters
    from recipe.engine.tokens import NewTokens

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENS = "trainable_token_indices"
# What PEFT can do and we do not train, and the value that stands for "not used".
NOT_OURS: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    TOKENS: None,
}


def find(settings: Settings) -> Path | None:
    """The folder of `lora.start`, its configuration found to be that of the run. Raises UserError."""
    start = settings.lora.start
    if start is None:
        return None
    folder = Path(start)
    if not (folder / CONFIG).is_file():
        folder = Path(settings.paths.runs) / start / "adapters"
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"lora.start is `{start}`: neither a folder with {CONFIG} nor a run in {settings.paths.runs} with exported "
            f"adapters, expected one of them (`make export-adapters RUN={start}`)"
        )
    _check(folder, settings)
    return folder.resolve()


def _check(folder: Path, settings: Settings) -> None:
    lora, path = settings.lora, folder / CONFIG
    try:
        config = json.loads(path.read_text())
        targets = config["target_modules"]
        found = {
            "lora.rank": config["r"],
            "lora.alpha": config["lora_alpha"],
            "lora.rslora": bool(config.get("use_rslora")),
            "lora.target_modules": sorted(targets) if isinstance(targets, list) else targets,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no configuration of LoRA ({error}), expected what PEFT writes") from None
    expected = {
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.rslora": lora.rslora,
        "lora.target_modules": sorted(lora.target_modules),
    }
    for key, value in expected.items():
        if found[key] != value:
            raise UserError(
                f"{path}: {key.removeprefix('lora.')} is {_shown(found[key])}, expected {_shown(value)} as the run has it; "
                f"set {key} to the former, or leave lora.start out"
            )
    for key, unused in NOT_OURS.items():
        if key == TOKENS and lora.new_tokens:  # whether they are the same ones the model's tokenizer tells
            continue
        if (config.get(key, unused) or unused) != unused:
            raise UserError(
                f"{path}: {key} is {config[key]}, expected {unused}: other adapters cannot be trained here"
            )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: has no {WEIGHTS}, expected the adapters' weights beside {CONFIG}")


def _shown(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else f"{value}"


def described(folder: Path | None) -> dict[str, str] | None:
    """For the manifest."""
    return {"folder": str(folder), "sha256": sha256_of(folder / WEIGHTS)} if folder is not None else None


def load(start: dict[str, str], adapters: Adapters) -> None:
    """Each rank reads its own slice. Raises UserError where the file is not what the manifest says, or does not fit."""
    from recipe.engine.layout import MODULES
    from recipe.engine.rows import rows_of_rank

    path = Path(start["folder"]) / WEIGHTS
    if not path.is_file() or sha256_of(path) != start["sha256"]:
        raise UserError(
            f"{path}: is {'changed' if path.is_file() else 'missing'}, expected the adapters that the run began with "
            f"(sha256 {start['sha256'][:16]}…); bring them back, or begin a new run"
        )
    try:
        with safe_open(path, framework="pt") as tensors, torch.no_grad():
            names = set(tensors.keys())
            for (layer, module, kind), parameter in adapters.parameters.items():
                name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{kind}.weight"
                piece = tensors.get_slice(name) if name in names else None
                if piece is None or tuple(piece.get_shape()) != tuple(parameter.shape):
                    found = "missing" if piece is None else f"of shape {piece.get_shape()}"
                    raise UserError(
                        f"{path}: {name} is {found}, expected shape {list(parameter.shape)}; it is of another model"
                    )
                first, last = rows_of_rank(parameter.shape[0], adapters.world, adapters.place)
                parameter.to_local().copy_(piece[first:last])
                names.remove(name)
            if adapters.tokens is not None and (
                rows := {name for name in names if ".token_adapter." in name}
            ):
                _load_tokens(path, tensors, rows, adapters.tokens)
                names -= rows
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}), expected safetensors") from None
    if names:
        raise UserError(f"{path}: has {min(names)}, expected adapters of this model's layers only")


def _load_tokens(path: Path, tensors: Any, names: set[str], tokens: NewTokens) -> None:
    """Rows of new tokens that were trained before. Raises UserError where they are other tokens'."""
    from recipe.engine.tokens import token_indices

    expected = token_indices(tokens.ids.tolist(), tied=len(tokens.parameters) == 1)
    found = json.loads((path.parent / CONFIG).read_text()).get(TOKENS)
    if found != expected:
        raise UserError(
            f"{path.parent / CONFIG}: {TOKENS} is {found}, expected {expected}, the rows of lora.new_tokens; set that to the "
            "tokens that the adapters were trained with"
        )
    for module, parameter in tokens.parameters.items():
        name = next((name for name in names if f".{module}.token_adapter." in name), None)
        piece = tensors.get_tensor(name) if name else None
        if piece is None or piece.shape != parameter.shape:
            raise UserError(
                f"{path}: the trained rows of {module} are missing or of another shape, expected {list(parameter.shape)}; "
                "it is of another model"
            )
        parameter.copy_(piece)
