"""Build on the meta device, shard with FSDP2, then let each rank read only the bytes of its own slices.

No rank ever holds the model: what is sharded is meta tensors, and each slice goes from the file to its place. Stock
accelerate loads the whole 4-bit model on every rank first, which neither a 24 GB card nor a 64 GB host can hold.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.engine.nf4 import NF4Linear, quant_state
from recipe.errors import UserError
from recipe.settings import Lora

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_sharded(
    folder: Path,
    lora: Lora,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    seed: int,
) -> PeftModel:
    """The NF4 checkpoint in `folder` with fresh LoRA adapters, sharded over `mesh`.

    LoRA parameters are fp32 masters, computed in `dtype` and reduced in fp32. Their start does not depend on the
    number of ranks. Raises UserError where the checkpoint is damaged or does not fit its config.
    """
    with Checkpoint(folder) as checkpoint:
        model = build(folder, lora, dtype, attention, checkpoint)
        shard(model, mesh, dtype)
        fill(model, checkpoint, mesh, device, seed)
    return model


def build(folder: Path, lora: Lora, dtype: torch.dtype, attention: str, checkpoint: Checkpoint) -> PeftModel:
    """The model on the meta device: NF4 linears where the checkpoint has absmax constants, LoRA around them."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and f"{name}.weight.absmax" in checkpoint.files:
                new = NF4Linear(module.in_features, module.out_features, module.bias is not None, dtype)
                if module.bias is not None:
                    new.bias = nn.Parameter(module.bias.to(dtype))
                model.set_submodule(name, new)
        model.tie_weights()
        model.requires_grad_(False)
        model.config.use_cache = False
        peft_model = get_peft_model(
            model, peft_config(lora), low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
        for name, module in peft_model.named_modules():
            if ".lora_A." in name or ".lora_B." in name:
                module.float()
    # transformers' Trainer then leaves placement and gradient reduction to FSDP2 (is_distributed_loading_by_transformers).
    model._is_distributed_loading_by_transformers = True
    return peft_model


def peft_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def shard(model: PeftModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Each decoder layer is one FSDP2 unit, and so is the rest.

    The root must be sharded too: else every layer is its own root with its own streams and nothing is prefetched
    (0.43 GiB stayed reserved per layer in the prototype). An untied embedding and head are units of their own, so
    that they do not stay gathered through the step.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    core = model.get_base_model()
    units: list[nn.Module] = list(core.model.layers)
    if not core.config.tie_word_embeddings:
        units += [core.get_input_embeddings(), core.get_output_embeddings()]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def fill(model: PeftModel, checkpoint: Checkpoint, mesh: DeviceMesh, device: torch.device, seed: int) -> None:
    """Give every meta parameter its slice on `device`, a parameter at a time."""
    core = model.get_base_model()
    tied_head = core.get_output_embeddings() if core.config.tie_word_embeddings else None
    for prefix, module in model.named_modules():
        if module is tied_head:
            continue
        name = checkpoint_name(prefix)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if ".lora_" in prefix:
                local = local_rows(initial_lora(prefix, parameter, seed), mesh).to(device)
            elif isinstance(module, NF4Linear) and key == "weight":
                local = checkpoint.read_packed(f"{name}.weight", parameter, mesh).to(device)
                module.quant_state = quant_state(
                    checkpoint.constants(f"{name}.weight"), device, parameter.dtype
                )
            else:
                local = checkpoint.read_rows(f"{name}.{key}", parameter, mesh).to(device, parameter.dtype)
            sharded = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            module.load_state_dict({key: sharded}, assign=True, strict=False)
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _rebuild_buffers(module, core.config, device)
    if tied_head is not None:
        tied_head.weight = core.get_input_embeddings().weight


def checkpoint_name(module_name: str) -> str:
    """The name that a module of the PEFT model has in the checkpoint."""
    return module_name.removeprefix("base_model.model.").removesuffix(".base_layer")


def initial_lora(name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """PEFT's start (A uniform in +-1/sqrt(in), B zero), drawn from the name, so that it is the same on any world size."""
    if ".lora_B." in name:
        return torch.zeros(parameter.shape, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(parameter.shape[1])
    return torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def local_range(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """The rows of dimension 0 that FSDP2 gives to this rank (torch.chunk: the last ranks may get fewer, or none)."""
    size = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * size, rows)
    return start, min(start + size, rows)


def local_rows(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    start, end = local_range(tensor.shape[0], mesh)
    return tensor[start:end].clone()


def _rebuild_buffers(module: nn.Module, config, device: torch.device) -> None:
    """Rotary frequencies are computed, not stored: build the module again on the device and take its buffers."""
    with torch.device(device):
        fresh = type(module)(config)
    for key, buffer in fresh.named_buffers(recurse=False):
        module.register_buffer(key, buffer, persistent=False)


class Checkpoint:
    """Random access to the tensors of a safetensors checkpoint; reads only the rows asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[Path, safe_open] = {}
        self._stack = ExitStack()
        if (folder / INDEX).exists():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            self.files = {name: folder / file for name, file in weight_map.items()}
        else:
            self.files = dict.fromkeys(self._file(folder / SINGLE).keys(), folder / SINGLE)
        self._constants: dict[str, list[str]] = {}
        for name in self.files:
            weight, dot, key = name.partition(".weight.")
            if dot:
                self._constants.setdefault(f"{weight}.weight", []).append(key)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _file(self, path: Path):
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: is missing, cut short or damaged ({error}); run `make prepare` again"
                ) from None
        return self._open[path]

    def _slice(self, name: str):
        if name not in self.files:
            raise UserError(
                f"{self.folder}: has no tensor {name}, which its config.json asks for; prepare it again"
            )
        return self._file(self.files[name]).get_slice(name)

    def constants(self, name: str) -> dict[str, torch.Tensor]:
        """What bitsandbytes stores beside the packed weight `name`: absmax, code and their quantisation."""
        return {key: self._slice(f"{name}.{key}")[:] for key in self._constants[name]}

    def read_rows(self, name: str, parameter: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        piece = self._slice(name)
        self._check(name, tuple(piece.get_shape()), tuple(parameter.shape))
        start, end = local_range(parameter.shape[0], mesh)
        return piece[start:end]

    def read_packed(self, name: str, parameter: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        """This rank's rows of the packed NF4 bytes, viewed as the parameter's dtype, whatever they are stored as."""
        piece = self._slice(name)
        stored = piece[:0].dtype.itemsize
        self._check(
            name,
            (torch.Size(piece.get_shape()).numel() * stored,),
            (parameter.numel() * parameter.dtype.itemsize,),
        )
        start, end = (row * parameter.dtype.itemsize for row in local_range(parameter.shape[0], mesh))
        first = start // stored
        raw = piece[first : -(-end // stored)].contiguous().view(torch.uint8).flatten()
        raw = raw[start - first * stored : end - first * stored].clone()
        return raw.view(parameter.dtype).view(-1, 1)

    def _check(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise UserError(
                f"{self.files[name]}: {name} has shape {list(found)}, expected {list(expected)} from config.json"
            )
