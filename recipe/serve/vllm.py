"""What vLLM is asked to do with a run: the words of its command line, for the service `vllm` of compose.yaml.

    python -m recipe.serve.vllm --run NAME      (prints them with port and key as JSON, for scripts/serving.py; any Python)

vLLM cannot split a base that is already quantised by bitsandbytes between GPUs by tensor (issue 13122; its loader says
so), so each GPU takes some of the layers: pipeline parallel. The bitsandbytes loader has left vLLM with 0.28; it is the
package vllm-bnb-plugin now, which compose.yaml adds to vLLM's image.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from recipe import hardware
from recipe.errors import UserError
from recipe.files import GIB, read_json
from recipe.serve.server import chosen_key

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
CONTEXT_TOKENS = 4096
GPU_SHARE = 0.9  # of a GPU's memory that vLLM takes, weights and KV cache
BESIDE_GIB = (
    2.0  # what a GPU needs beside its part of the weights: KV cache of one context, LoRA, activations, CUDA
)
PORT = 8000  # in the container


@dataclass(frozen=True)
class Facts:
    """What of a run decides how vLLM is called."""

    name: str
    model: Path  # prepared NF4 checkpoint
    adapters: Path
    rank: int
    context_tokens: int
    dtype: str
    weights_gib: float


def facts(folder: Path) -> Facts:
    """Raises UserError where the run cannot be served by vLLM."""
    name = folder.name
    if not (folder / "config.yaml").exists():
        raise UserError(f"RUN={name}: no such run in {folder.parent}")
    if not (folder / "summary.json").exists():
        raise UserError(f"RUN={name}: is not finished; go on with `make train RUN={name}` first")
    adapters = folder / "adapters"
    if not (adapters / "adapter_config.json").exists():
        raise UserError(f"RUN={name}: has no adapters; `make export-adapters RUN={name}` first")
    lora = read_json(adapters / "adapter_config.json")
    if lora.get("trainable_token_indices") or lora.get("modules_to_save"):
        raise UserError(
            f"RUN={name}: has learnt new tokens, which vLLM takes only in a merged model; RUNTIME=host"
        )
    model = Path(read_json(folder / "manifest.json")["model"]["folder"])
    if not (model / "config.json").exists():
        raise UserError(f"{model}: the base model of RUN={name} is not there; `make prepare` brings it")
    dtype = read_json(folder / "summary.json")["compute_dtype"]
    positions = read_json(model / "config.json").get("max_position_embeddings") or CONTEXT_TOKENS
    return Facts(
        name=name,
        model=model.resolve(),
        adapters=adapters.resolve(),
        rank=max([lora["r"], *(lora.get("rank_pattern") or {}).values()]),
        context_tokens=min(positions, CONTEXT_TOKENS),
        # In fp32 the loader takes the packed weights for half as many as they are.
        dtype=dtype if dtype in ("bfloat16", "float16") else "bfloat16",
        weights_gib=sum(file.stat().st_size for file in model.glob("*.safetensors")) / GIB,
    )


def arguments(run: Facts, gpus: int) -> list[str]:
    """The words after `vllm serve`. The key is not among them: other users can read a command line."""
    rank = next((rank for rank in RANKS if rank >= run.rank), None)
    if rank is None:
        raise UserError(
            f"RUN={run.name}: has adapters of rank {run.rank}, expected at most {RANKS[-1]} for vLLM"
        )
    words = {
        "--served-model-name": "base",
        "--lora-modules": f"{run.name}={run.adapters}",
        "--max-lora-rank": rank,
        "--max-model-len": run.context_tokens,
        "--dtype": run.dtype,
        "--quantization": "bitsandbytes",
        "--load-format": "bitsandbytes",
        "--tensor-parallel-size": 1,
        "--pipeline-parallel-size": gpus,
        "--gpu-memory-utilization": GPU_SHARE,
        "--host": "0.0.0.0",  # of the container; compose.yaml publishes it on 127.0.0.1 alone
        "--port": PORT,
    }
    return [str(run.model), "--enable-lora", *(str(word) for pair in words.items() for word in pair)]


def require_memory(run: Facts, gpus_gib: list[float]) -> None:
    """Raises UserError where the weights do not fit into these GPUs' memory."""
    if not gpus_gib:
        raise UserError("vLLM: there is no NVIDIA GPU here")
    needed = run.weights_gib / len(gpus_gib) + BESIDE_GIB
    if needed > (there := min(gpus_gib) * GPU_SHARE):
        raise UserError(
            f"RUN={run.name}: {len(gpus_gib)} GPUs with {there:.1f} GiB for vLLM each, expected {needed:.1f} GiB; "
            "RUNTIME=host serves it on the CPU"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="recipe serve")
    parser.add_argument("--run", required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    asked, _ = parser.parse_known_args(argv)
    runs = [word.removeprefix("paths.runs=") for word in asked.overrides if word.startswith("paths.runs=")]
    try:
        run = facts(Path(runs[-1] if runs else "runs") / asked.run)
        gpus = [gpu.memory_total_gib for gpu in hardware.probe().gpus]
        require_memory(run, gpus)
        print(json.dumps({"words": arguments(run, len(gpus)), "port": asked.port, "key": chosen_key()}))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
