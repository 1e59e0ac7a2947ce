"""A prepared checkpoint of a model's true shape without the model: random bytes in the true layout, with checksums.

For 70B it has 37 GiB. What reads it cannot tell it from one of `recipe prepare`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from recipe.checksums import BlockChecksums, sidecar
from recipe.engine.checkpoint import INDEX
from recipe.engine.layout import BLOCK, MODULES, NESTED_BLOCK
from recipe.engine.load import STATE
from recipe.engine.random import DEVIATION, NF4_DEVIATION, random_config
from recipe.errors import UserError
from recipe.files import require_space, write_bytes, write_json
from recipe.plan.shapes import ModelShape, shape_from_config

LAYERS_PER_FILE = 4
REPEATED_BYTES = 64 * 2**20  # of randomness, written over and over
DISK_PIECE = 8 * 2**20


def ensure_checkpoint(folder: Path, shape: ModelShape) -> None:
    """One of that shape in `folder`, made unless it is there. Raises UserError where something else is."""
    config = folder / "config.json"
    if not config.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--checkpoint: {folder} has no config.json, expected a prepared checkpoint, or a new folder to make one in"
            )
        # Made aside: a folder that has its name is whole.
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        write_random_checkpoint(aside, shape)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    found = shape_from_config(json.loads(config.read_text()), str(config))
    if found != shape:
        raise UserError(
            f"--checkpoint: {folder} holds a model of {found.layers} layers of {found.hidden}, expected {shape.layers} "
            f"of {shape.hidden} as --model-shape says; name another folder"
        )


def write_random_checkpoint(folder: Path, shape: ModelShape, deviation: float = DEVIATION) -> None:
    """An NF4 checkpoint as `recipe prepare` leaves it, of random values; deviation: of the decoder layers' weights."""
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
        tensors = [
            tensor for layer in files[number - 1] for tensor in _layer_tensors(shape, layer, deviation)
        ]
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


def _layer_tensors(shape: ModelShape, layer: int, deviation: float) -> Iterator[Tensor]:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    offset = deviation / NF4_DEVIATION
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
    """So that the next read of its files comes from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(folder: Path, size: int, readers: int) -> float:
    """Bytes a second that the disk gives to so many readers of the largest files in `folder`, past the cache."""
    drop_from_cache(folder)
    files = sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_size)[:readers]

    def read(path: Path) -> int:
        done = 0
        with open(path, "rb", buffering=0) as file:
            while done < size // len(files) and (piece := file.read(DISK_PIECE)):
                done += len(piece)
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(len(files)) as pool:
        total = sum(pool.map(read, files))
    rate = total / (time.perf_counter() - started)
    drop_from_cache(folder)
    return rate
