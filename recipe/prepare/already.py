"""Is a checkpoint that says it is NF4 what the loader takes? Found from the headers and the small JSON tensors alone.

Hub checkpoints differ: FP4 under an `nf4` config, other block sizes, weights whose constants were lost by a conversion. The
loader would find that late, or compute nonsense.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from recipe.errors import UserError
from recipe.files import read_json
from recipe.prepare.header import Stored, read_header
from recipe.prepare.nf4 import BLOCK, NESTED_BLOCK
from recipe.prepare.source import shard_files
from recipe.settings import ATTENTION_PROJECTIONS, MLP_PROJECTIONS

STATE = "quant_state.bitsandbytes__"
ANOTHER = "take another checkpoint, or the unquantised one"


def check_said(folder: Path, quantization: dict[str, Any]) -> None:
    """Raises UserError unless config.json's `quantization_config` says bitsandbytes NF4; no weights are needed."""
    method = quantization.get("quant_method", "unknown")
    if not (quantization.get("load_in_4bit") and quantization.get("bnb_4bit_quant_type") == "nf4"):
        raise UserError(
            f"{folder}/config.json: the weights are quantised already ({method}), expected an unquantised "
            "checkpoint or bitsandbytes NF4"
        )


def check_quantised(folder: Path) -> None:
    """Raises UserError unless the weights in `folder` are whole bitsandbytes NF4 in blocks of 64.

    The second level (double quantisation) may be there or not.
    """
    stored: dict[str, tuple[Path, Stored]] = {}
    for file in shard_files(folder):
        stored.update({tensor.name: (file, tensor) for tensor in read_header(file)})
    states = [name for name in stored if f".{STATE}" in name]
    if not states:
        raise UserError(
            f"{folder}: config.json says NF4, but no weight has a `{STATE}nf4`, expected one beside each; {ANOTHER}"
        )
    for name in states:
        _check_weight(name.partition(f".{STATE}")[0], name, stored)
    known = {name.partition(f".{STATE}")[0] for name in states}
    for name, (file, _) in stored.items():
        owner = name.rpartition(".")[0]
        if name.endswith(".absmax") and owner not in known:
            raise UserError(f"{file}: {owner} has absmax but no `{STATE}nf4`; {ANOTHER}")
    missing = sorted(_projections(folder) - set(stored))
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}; fetch the checkpoint again or "
            + ANOTHER
        )
    for name, (file, tensor) in stored.items():
        if name.endswith("_proj.weight") and name not in known:
            raise UserError(
                f"{file}: {name} ({tensor.bytes / 2**20:.0f} MiB) is not quantised, expected NF4; {ANOTHER}"
            )


def _projections(folder: Path) -> set[str]:
    """The weights that must be quantised: seven in each layer, in all the families that are supported."""
    layers = int(read_json(folder / "config.json").get("num_hidden_layers") or 0)
    attention = {f"self_attn.{name}" for name in ATTENTION_PROJECTIONS}
    names = attention | {f"mlp.{name}" for name in MLP_PROJECTIONS}
    return {f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in names}


def _check_weight(weight: str, name: str, stored: dict[str, tuple[Path, Stored]]) -> None:
    file, tensor = stored[name]

    def wrong(what: str, found: object, expected: object) -> UserError:
        return UserError(f"{file}: {weight}: {what} is {found}, expected {expected}; {ANOTHER}")

    if not name.endswith("nf4"):
        raise wrong("the quant state", name.rpartition("__")[2], "nf4")
    try:
        with open(file, "rb") as content:
            content.seek(tensor.start)
            state = json.loads(content.read(tensor.bytes))
        shape = torch.Size(state["shape"])
        quant_type, block = state["quant_type"], state["blocksize"]
    except (ValueError, KeyError, TypeError):
        raise wrong("the quant state", "not readable", "JSON with shape, quant_type and blocksize") from None
    if quant_type != "nf4":
        raise wrong("quant_type", quant_type, "nf4")
    if block != BLOCK:
        raise wrong("blocksize", block, BLOCK)
    blocks = -(-shape.numel() // BLOCK)
    nested = "nested_blocksize" in state
    if nested and state["nested_blocksize"] != NESTED_BLOCK:
        raise wrong("nested_blocksize", state["nested_blocksize"], NESTED_BLOCK)
    expected = {"": shape.numel() // 2, ".absmax": blocks * (1 if nested else 4), ".quant_map": 64}
    if nested:
        expected |= {".nested_absmax": -(-blocks // NESTED_BLOCK) * 4, ".nested_quant_map": 1024}
    for suffix, size in expected.items():
        part = stored.get(weight + suffix)
        if part is None:
            raise wrong(suffix.removeprefix(".") or "the packed weight", "missing", f"{size} bytes")
        if part[1].bytes != size:
            raise wrong(suffix.removeprefix(".") or "the packed weight", f"{part[1].bytes} bytes", size)
