"""What a checkpoint holds and what becomes of it: the tensors in the order of their files, and which are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recipe.errors import UserError
from recipe.prepare.nf4 import BLOCK, QUANTISABLE
from recipe.prepare.source import Source
from recipe.settings import Quantization


@dataclass(frozen=True)
class Entry:
    """One tensor of the source checkpoint; its bytes begin `start` bytes into `file`."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantised: bool
    start: int = 0

    @property
    def source_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def target_bytes(self) -> int:
        """Bytes after preparation, absmax constants included (upper bound: not double-quantised)."""
        return self.numel // 2 + self.numel // BLOCK * 4 if self.quantised else self.source_bytes


def find_entries(source: Source, quantization: Quantization) -> list[Entry]:
    """Every tensor that the model needs, in the order of the files and of the bytes in them.

    Raises UserError where a file is damaged, or the tensors are not those of config.json, or cannot be quantised.
    """
    wanted, quantised = _model_tensors(source, quantization)
    found: dict[str, Path] = {}
    entries = []
    for file in source.shards:
        for stored in source.header(file):
            if stored.name in found:
                raise UserError(
                    f"{file}: {stored.name} is in {found[stored.name].name} too, expected each tensor once"
                )
            if stored.name not in wanted:
                continue
            found[stored.name] = file
            if stored.shape != wanted[stored.name]:
                raise UserError(
                    f"{file}: {stored.name} has shape {list(stored.shape)}, expected {list(wanted[stored.name])} "
                    "from config.json; weights and config are of different models"
                )
            entries.append(
                Entry(stored.name, file, stored.shape, stored.dtype, stored.name in quantised, stored.start)
            )
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(
            f"{source.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the checkpoint again"
        )
    _refuse_surprises(entries, source)
    return entries


def bnb_config(quantization: Quantization):
    """The `quantization_config` that transformers reads beside such a checkpoint."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def split(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Output shards of at most `shard_bytes` (or one tensor), none of which needs more than one source file.

    So a source file can go as soon as the shards that it fills are on the disk.
    """
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        same_file = bool(shards) and shards[-1][0].file == entry.file
        if not same_file or size + entry.target_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.target_bytes
    return shards


def _model_tensors(source: Source, quantization: Quantization) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes by name of all tensors of the model, and the names of those that transformers itself would quantise."""
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    settings = bnb_config(quantization)
    config = AutoConfig.from_pretrained(source.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    quantizer = AutoHfQuantizer.from_config(settings)
    skipped = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replaced = replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=settings)
    quantised = {f"{name}.weight" for name, m in replaced.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return shapes, quantised


def _refuse_surprises(entries: list[Entry], source: Source) -> None:
    """A large matrix that stays unquantised would be found only when the GPU is full."""
    expected = ("model.embed_tokens.weight", "lm_head.weight")
    for entry in entries:
        if not entry.quantised and len(entry.shape) > 1 and entry.name not in expected:
            raise UserError(
                f"{source.folder}: {entry.name} {list(entry.shape)} would stay unquantised "
                f"({entry.source_bytes / 2**20:.0f} MiB), expected only embeddings, head and norms to; "
                "this architecture is not supported"
            )
        if entry.quantised and entry.numel % BLOCK:
            raise UserError(
                f"{entry.file}: {entry.name} has {entry.numel} values, expected a multiple of {BLOCK}"
            )
        if entry.quantised and entry.dtype not in QUANTISABLE:
            raise UserError(
                f"{entry.file}: {entry.name} is {str(entry.dtype).removeprefix('torch.')}, expected bfloat16, float16 "
                "or float32; take the unquantised checkpoint"
            )
