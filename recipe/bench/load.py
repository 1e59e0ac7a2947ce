"""From a prepared checkpoint on disk to the first step: seconds, bytes read, and host RAM.

    python -m recipe.bench.load --model-shape llama-3.1-70b --folder /scratch/random-70b --cap-gib 22.5

The checkpoint is made once, of random bytes in the true layout with checksums (37 GiB for 70B); its pages are dropped
from the cache before the measurement, which runs in this process: start it afresh for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from recipe.bench.ours import Ours
from recipe.bench.sample import Sampler
from recipe.bench.spec import GIB, TINY, Spec
from recipe.bench.worker import cap_allocator
from recipe.checksums import BlockChecksums, sidecar
from recipe.engine.checkpoint import INDEX
from recipe.engine.layout import BLOCK, MODULES, NESTED_BLOCK
from recipe.engine.load import STATE
from recipe.engine.random import DEVIATION, NF4_DEVIATION, random_config
from recipe.files import require_space, write_bytes, write_json
from recipe.plan.shapes import ModelShape, shape_of

LAYERS_PER_FILE = 4
REPEATED_BYTES = 64 * 2**20  # of randomness, written over and over


def write_random_checkpoint(folder: Path, shape: ModelShape) -> None:
    """An NF4 checkpoint as `recipe prepare` leaves it, of random values."""
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, shape.parameters * 0.6 + shape.embedding_parameters * 4, "the random checkpoint")
    random = torch.randint(0, 256, (REPEATED_BYTES,), dtype=torch.uint8).numpy().tobytes()
    weight_map: dict[str, str] = {}
    files = [
        range(first, min(first + LAYERS_PER_FILE, shape.layers))
        for first in range(0, shape.layers, LAYERS_PER_FILE)
    ]

    def write(number: int) -> dict[str, str]:
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = [tensor for layer in files[number - 1] for tensor in _layer_tensors(shape, layer)]
        if number == len(files):
            tensors += list(_other_tensors(shape))
        _write_file(folder / name, tensors, random)
        return {tensor[0]: name for tensor in tensors}

    with ThreadPoolExecutor() as pool:
        for part in pool.map(write, range(1, len(files) + 1)):
            weight_map |= part
    config = random_config(shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)  # last: its presence says that all is there


# name, dtype as safetensors calls it, shape, and the bytes that are repeated; None: random ones
Tensor = tuple[str, str, tuple[int, ...], bytes | None]


def _layer_tensors(shape: ModelShape, layer: int) -> Iterator[Tensor]:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    offset = DEVIATION / NF4_DEVIATION
    code = create_dynamic_map().float().numpy().tobytes()
    values = get_4bit_type("nf4", device="cpu").float().numpy().tobytes()
    for module, (outputs, inputs) in shape.linears.items():
        weight = f"model.layers.{layer}.{MODULES[module]}.weight"
        blocks = outputs * inputs // BLOCK
        described = {
            "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [outputs, inputs],
            "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset,
        }  # fmt: skip
        state = json.dumps(described).encode()
        scale = torch.tensor([offset / 4]).numpy().tobytes()
        yield f"{weight}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),), scale
        yield f"{weight}.nested_quant_map", "F32", (256,), code
        yield f"{weight}.quant_map", "F32", (16,), values
        yield weight, "U8", (outputs * inputs // 2, 1), None
        yield f"{weight}.absmax", "U8", (blocks,), None
        yield f"{weight}.{STATE}", "U8", (len(state),), state
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{layer}.{norm}.weight", "BF16", (shape.hidden,), one


def _other_tensors(shape: ModelShape) -> Iterator[Tensor]:
    numbers = (torch.randn(REPEATED_BYTES // 2) * DEVIATION).bfloat16().view(torch.uint8).numpy().tobytes()
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    yield "model.norm.weight", "BF16", (shape.hidden,), one
    yield "model.embed_tokens.weight", "BF16", (shape.vocab, shape.hidden), numbers
    if not shape.tied:
        yield "lm_head.weight", "BF16", (shape.vocab, shape.hidden), numbers


def _write_file(path: Path, tensors: list[Tensor], random: bytes) -> None:
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    header: dict[str, dict] = {}
    end = 0
    # 16- and 32-bit values first: they then begin at multiples of their size.
    tensors = sorted(tensors, key=lambda tensor: -sizes[tensor[1]])
    for name, dtype, shape, _ in tensors:
        size = torch.Size(shape).numel() * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 64 + 56)  # with the 8 bytes of the length, a multiple of 64
    sums = BlockChecksums()
    with open(path, "wb") as file:

        def write(content: bytes | memoryview) -> None:
            sums.update(content)
            file.write(content)

        write(len(raw).to_bytes(8, "little") + raw)
        for name, _, _, content in tensors:
            first, last = header[name]["data_offsets"]
            _repeat(write, content or random, last - first)
        file.flush()
        os.fsync(file.fileno())
    write_bytes(sidecar(path), sums.to_bytes())


def _repeat(write, content: bytes, size: int) -> None:
    if len(content) < 4096:
        content = content * min(-(-size // len(content)), 2**20 // len(content))
    view = memoryview(content)
    while size:
        piece = view[:size]
        write(piece)
        size -= len(piece)


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """That this process has asked the system for."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def measure(folder: Path, spec: Spec) -> dict:
    """Load as one rank and do one step of `spec.tokens`."""
    device = torch.device("cuda", 0) if spec.on_gpu else torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(device.type, (1,))
    cap_allocator(spec, device)
    started, before = time.perf_counter(), bytes_read()
    with Sampler(os.getpid(), []) as samples:
        program = Ours(spec, device, mesh, folder)
        if spec.on_gpu:
            torch.cuda.synchronize()
        loaded, read = time.perf_counter(), bytes_read() - before
        loss = program.step(torch.randint(0, spec.shape.vocab, (spec.tokens,)), spec.document_lengths).item()
        program.optimizer_step()
        ended = time.perf_counter()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    pools = program.engine.store.pool.nbytes + program.engine.activations.pool.nbytes
    dist.destroy_process_group()
    return {
        "load_seconds": loaded - started,
        "first_step_seconds": ended - loaded,
        "read_gib": read / GIB,
        "checkpoint_gib": stored / GIB,
        "gib_per_second": read / GIB / (loaded - started),
        "peak_host_ram_gib": samples.peak.total / GIB,
        "pinned_gib": pools / GIB,
        "offloaded_layers": program.placement.offload_layers,
        "loss": loss,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-shape", default="llama-3.1-70b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cap-gib", type=float, default=22.5)
    parser.add_argument("--ram-gib", type=float, default=42.0)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=int(torch.cuda.is_available()))
    arguments = parser.parse_args()
    name = arguments.model_shape
    spec = Spec(
        variant="ours", model_shape=name, shape=TINY if name == "tiny" else shape_of(name), tokens=arguments.tokens,
        document_tokens=None, cap_gib=arguments.cap_gib, gpus=arguments.gpus, ranks=1, offload="auto", dropout=0.05,
        steps=1, ram_gib=arguments.ram_gib,
    )  # fmt: skip
    if not (arguments.folder / "config.json").exists():
        started = time.perf_counter()
        write_random_checkpoint(arguments.folder, spec.shape)
        print(f"written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    drop_from_cache(arguments.folder)
    print(json.dumps(measure(arguments.folder, spec), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
