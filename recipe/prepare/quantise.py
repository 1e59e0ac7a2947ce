"""Streaming NF4: a Hugging Face checkpoint becomes a 4-bit one, a tensor at a time, in bitsandbytes' standard format.

What is written is what transformers writes for `load_in_4bit` (packed bytes as uint8, double-quantised absmax), so
plain `from_pretrained` loads it and gives, to the bit, the logits of the model that transformers quantises itself.
The bytes get the dtype that FSDP2 gathers in when they are loaded (recipe/engine/load.py), by view, never by a cast.

Memory: one output shard (1 GiB) and one tensor. An interrupted run goes on at the output shard that it was writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from recipe.errors import UserError
from recipe.files import publish, read_json, require_space, sha256_of, write_json
from recipe.prepare.source import INDEX, Source
from recipe.settings import Quantization

RECORD = "prepare.json"
SHARD_BYTES = 2**30
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*")
BLOCK = 64  # weights per absmax constant


@dataclass(frozen=True)
class Entry:
    """One tensor of the source checkpoint."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantised: bool

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


def quantise(
    source: Source, target: Path, quantization: Quantization, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `source` as NF4 to the folder `target`, which appears only when it is complete.

    Raises UserError where the checkpoint is damaged, does not fit its config, or the disk is too small.
    """
    bnb_config = _bnb_config(quantization)
    entries = list(_entries(source, bnb_config))
    _refuse_surprises(entries, source)
    shards = _split(entries, shard_bytes)
    partial = target.with_name(f".{target.name}.partial")
    require_space(
        target,
        sum(entry.target_bytes for entry in entries) - _bytes_in(partial),
        f"the NF4 model {target.name}",
    )
    progress = _resume(partial, _fingerprint(entries, quantization))
    for pattern in COPIED:
        for path in source.folder.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, partial / path.name)
    weight_map: dict[str, str] = progress["weight_map"]
    done_shards: dict[str, dict] = progress["files"]
    with tqdm(
        total=sum(e.source_bytes for e in entries),
        unit="B",
        unit_scale=True,
        desc="quantise",
        leave=False,
        disable=None,
    ) as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if name not in done_shards:
                tensors = {}
                for entry in shard:
                    tensors.update(_prepared(entry, quantization))
                    bar.update(entry.source_bytes)
                aside = partial / f".{name}"
                save_file(tensors, aside, metadata={"format": "pt"})
                digest = sha256_of(aside)
                os.replace(aside, partial / name)
                weight_map.update(dict.fromkeys(tensors, name))
                done_shards[name] = {"sha256": digest, "bytes": (partial / name).stat().st_size}
                write_json(partial / RECORD, progress)
            else:
                bar.update(sum(entry.source_bytes for entry in shard))
    _finish(partial, source, entries, progress, bnb_config)
    publish(partial, target)


def _bnb_config(quantization: Quantization):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _entries(source: Source, bnb_config) -> Iterator[Entry]:
    """Every tensor that the model needs, in the order of the files."""
    wanted, quantised = _model_tensors(source, bnb_config)
    found: dict[str, Path] = {}
    for file in source.shards:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in found:
                        raise UserError(
                            f"{file}: {name} is in {found[name].name} too, expected each tensor once"
                        )
                    if name not in wanted:
                        continue
                    found[name] = file
                    piece = tensors.get_slice(name)
                    shape, dtype = tuple(piece.get_shape()), tensors.get_slice(name)[:0].dtype
                    if shape != wanted[name]:
                        raise UserError(
                            f"{file}: {name} has shape {list(shape)}, expected {list(wanted[name])} from config.json; "
                            "weights and config are of different models"
                        )
                    yield Entry(name, file, shape, dtype, name in quantised)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: is cut short or damaged ({error}); fetch it again") from None
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(
            f"{source.folder}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the checkpoint again"
        )


def _model_tensors(source: Source, bnb_config) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes by name of all tensors of the model, and the names of those that transformers itself would quantise."""
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers import AutoHfQuantizer

    config = AutoConfig.from_pretrained(source.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    quantizer = AutoHfQuantizer.from_config(bnb_config)
    skipped = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replaced = replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=bnb_config)
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


def _split(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.target_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.target_bytes
    return shards


def _prepared(entry: Entry, quantization: Quantization) -> dict[str, torch.Tensor]:
    """The tensors that stand for `entry` in the NF4 checkpoint, on the CPU."""
    from bitsandbytes.nn import Params4bit

    with safe_open(entry.file, framework="pt") as tensors:
        value = tensors.get_tensor(entry.name)
    if not entry.quantised:
        return {entry.name: value}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = Params4bit(
        value,
        requires_grad=False,
        quant_type=quantization.type,
        compress_statistics=quantization.double_quant,
    ).to(device)
    state = weight.quant_state.as_dict(packed=True)
    tensors_out = {entry.name: weight.data} | {f"{entry.name}.{key}": part for key, part in state.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_out.items()}


def _fingerprint(entries: list[Entry], quantization: Quantization) -> str:
    """Tells whether a half-written result belongs to this source: names, shapes, file sizes and times."""
    files = {e.file: e.file.stat() for e in entries}
    text = json.dumps(
        [
            [str(quantization)],
            [[e.name, e.shape, str(e.dtype), e.quantised] for e in entries],
            [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in files.items()],
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(partial: Path, fingerprint: str) -> dict:
    """The record of a half-written result, after its files were checked; else an empty one in an empty folder."""
    record = partial / RECORD
    if record.exists():
        progress = read_json(record)
        shards = {name: entry for name, entry in progress["files"].items() if name.endswith(".safetensors")}
        if progress.get("fingerprint") == fingerprint and all(
            (partial / name).exists() and (partial / name).stat().st_size == entry["bytes"]
            for name, entry in shards.items()
        ):
            # What _finish had begun is made again, and nothing half-written may end in the record.
            for path in partial.iterdir():
                if path.name != RECORD and path.name not in shards:
                    path.unlink()
            return {"fingerprint": fingerprint, "weight_map": progress["weight_map"], "files": shards}
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {"fingerprint": fingerprint, "weight_map": {}, "files": {}}


def _finish(partial: Path, source: Source, entries: list[Entry], progress: dict, bnb_config) -> None:
    """config.json with the quantisation, the index, and the record with a hash for each file."""
    config = read_json(source.folder / "config.json")
    config["quantization_config"] = json.loads(bnb_config.to_json_string(use_diff=False))
    write_json(partial / "config.json", config)
    total = sum(entry["bytes"] for entry in progress["files"].values())
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": progress["weight_map"]})
    for path in sorted(partial.iterdir()):
        if path.name != RECORD and path.name not in progress["files"]:
            progress["files"][path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    unquantised = [entry for entry in entries if not entry.quantised]
    write_json(
        partial / RECORD,
        {
            "source": {"name": source.name, "revision": source.revision},
            "quantised_bytes": total - sum(e.source_bytes for e in unquantised),
            "unquantised_bytes": sum(e.source_bytes for e in unquantised),
            "unquantised": {e.name: list(e.shape) for e in unquantised if len(e.shape) > 1},
            **progress,
        },
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
