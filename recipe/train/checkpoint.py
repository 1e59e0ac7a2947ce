"""Checkpoints hold what is trained: LoRA, optimizer, scheduler, random states, data position. Never the frozen base.

A folder `step-NNNNNN` with safetensors and JSON, nothing pickled; written aside, fsynced, renamed; a hash per file.
The tensors are whole, so another number of ranks can resume.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from recipe.engine.marks import Mark, unmarked
from recipe.engine.rows import rows_of_rank
from recipe.errors import UserError
from recipe.files import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from recipe.engine.lora import Adapters

ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
STATE = "state.json"
TRAINER_STATE = "trainer_state.json"  # transformers reads it from the checkpoint's folder by this name
MOMENTS = ("exp_avg", "exp_avg_sq")
WAIT = "wait for the checkpoint before"  # the mark of the one operation in which others write to the disk


def adapter_name(parameter_name: str) -> str:
    """The name that PEFT gives a LoRA parameter in its files."""
    return parameter_name.replace(".default", "")


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield adapter_name(name), parameter


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor on the CPU, from every rank's slice (a collective: all ranks must call it)."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def gather_adapters(model: nn.Module, mark: Mark = unmarked) -> dict[str, torch.Tensor]:
    """All LoRA parameters, whole, in fp32 (a collective)."""
    adapters = {}
    for name, parameter in trained_parameters(model):
        mark("gather adapters")
        adapters[name] = gather(parameter)
    return adapters


def write_state(aside: Path, state: dict[str, Any], hashes: dict[str, str]) -> None:
    """The file that makes a folder a checkpoint: its step and scheduler, the hash of each other file and its own."""
    whole = {**state, "sha256": hashes}
    write_json(aside / STATE, {**whole, "state_sha256": _state_hash(whole)})


def load_parameters(folder: Path, model: nn.Module) -> None:
    """Each rank reads its own slice of the LoRA parameters."""
    with _opened(folder / ADAPTERS) as tensors, torch.no_grad():
        for name, parameter in trained_parameters(model):
            _local(parameter).copy_(_slice(tensors, folder / ADAPTERS, name, parameter))


def load_optimizer(folder: Path, model: nn.Module, runs: Adapters, optimizer: torch.optim.Optimizer) -> None:
    """Each rank reads its own slice of AdamW's moments."""
    with _opened(folder / OPTIMIZER) as tensors:
        step = tensors.get_tensor("step")[0].to(runs.device)
        states: list[dict[str, Any]] = [{"step": step.clone()} for _ in runs.flats]
        for key in MOMENTS:
            moments = [torch.zeros_like(flat.detach()) for flat in runs.flats]
            for name, parameter in trained_parameters(model):
                mine = _slice(tensors, folder / OPTIMIZER, f"{name}.{key}", parameter)
                _local(runs.part_of_state(moments, parameter)).copy_(mine)
            for state, moment in zip(states, moments, strict=True):
                state[key] = moment
        for flat, state in zip(runs.flats, states, strict=True):
            optimizer.state[flat] = state


def load_random_state(folder: Path, rank: int) -> bool:
    """Restore this rank's random state; False where the checkpoint has none for it (fewer ranks wrote it)."""
    states = load_file(folder / RNG)
    if f"{rank}.cpu" not in states:
        return False
    torch.set_rng_state(states[f"{rank}.cpu"])
    if torch.cuda.is_available() and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
    return True


def read_state(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{STATE}"))


def newest_sound(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hashes hold, and a line for each one that was passed over."""
    notes: list[str] = []
    for folder in reversed(checkpoints(run)):
        damaged = damaged_files(folder)
        if not damaged:
            return folder, notes
        notes.append(f"{folder}: {', '.join(damaged)} is damaged; the checkpoint before it is used")
    return None, notes


def damaged_files(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / STATE).read_text())
        found, expected = state.pop("state_sha256"), state["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [STATE]
    if found != _state_hash(state):
        return [STATE]
    return [
        name
        for name, digest in expected.items()
        if not (folder / name).exists() or sha256_of(folder / name) != digest
    ]


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Keep the newest ones, and that of the step `best`."""
    for folder in checkpoints(run)[:-keep]:
        if best is None or folder.name != name_of(best):
            shutil.rmtree(folder)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def random_state() -> dict[str, torch.Tensor]:
    """torch's, of this rank, by device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is missing or damaged ({error}); remove that checkpoint to use the one before"
        ) from None


def _slice(tensors, path: Path, name: str, parameter: torch.Tensor) -> torch.Tensor:
    piece = tensors.get_slice(name) if name in tensors.keys() else None  # noqa: SIM118 (not a dict)
    if piece is None or tuple(piece.get_shape()) != tuple(parameter.shape):
        found = "missing" if piece is None else f"of shape {piece.get_shape()}"
        raise UserError(
            f"{path}: {name} is {found}, expected shape {list(parameter.shape)}; it is of another run"
        )
    if not isinstance(parameter, DTensor):
        return piece[:]
    mesh = parameter.device_mesh
    start, end = rows_of_rank(parameter.shape[0], mesh.size(), mesh.get_local_rank())
    return piece[start:end]
