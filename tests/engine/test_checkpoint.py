"""Loading reads each byte of a checkpoint once over all ranks, and says in one line what is wrong with it.

Damage is found before any training: what is missing, cut short, flipped, or of another model.
"""

import json
import random
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe import checksums
from recipe.checksums import BLOCK_BYTES, BlockChecksums, block_checksums, sidecar
from recipe.engine import checkpoint as engine_checkpoint
from recipe.engine.checkpoint import Checkpoint
from recipe.errors import UserError
from recipe.plan.placement import Placement
from tests.engine.steps import sharded_model
from tests.models import run_ranks, tiny_nf4

LAYERS = 2
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def write_checksums(file: Path) -> None:
    """What `recipe prepare` leaves beside a file."""
    collected = BlockChecksums()
    collected.update(file.read_bytes())
    sidecar(file).write_bytes(collected.to_bytes())


def weight_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def place_of(file: Path, name: str) -> tuple[int, int]:
    """First byte and end of a tensor in a file, by the format's own description."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    start, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + end


# -- the checksums themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5])
def test_a_checksum_per_block_however_the_bytes_come(size, tmp_path):
    data = random.Random(size).randbytes(size)
    expected = [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, size, BLOCK_BYTES)]
    for step in (1_000_003, BLOCK_BYTES, BLOCK_BYTES + 1, 77_777, max(size, 1)):
        collected = BlockChecksums()
        collected.update(b"")
        for start in range(0, size, step):
            collected.update(memoryview(data)[start : start + step])
        assert collected.to_bytes() == struct.pack(f"<{len(expected)}I", *expected)
    file = tmp_path / "model.safetensors"
    sidecar(file).write_bytes(collected.to_bytes())
    assert sidecar(file).name == "model.safetensors.crc32"
    found = block_checksums(file)
    assert found is not None and found.tolist() == expected


def test_a_buffer_of_numbers_counts_by_its_bytes():
    numbers = torch.arange(100_000, dtype=torch.int32)
    collected = BlockChecksums()
    collected.update(numbers.numpy())
    assert collected.to_bytes()[:4] == struct.pack("<I", zlib.crc32(numbers.numpy().tobytes()[:BLOCK_BYTES]))


def test_without_a_file_beside_it_there_are_none(tmp_path):
    assert block_checksums(tmp_path / "model.safetensors") is None


# -- what is read -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Large enough that headers and Python's own files do not count: about 20 MB."""
    return tiny_nf4(
        tmp_path_factory.mktemp("large"),
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        head_dim=128,
        num_hidden_layers=LAYERS,
        dtype=torch.bfloat16,
    )


def read_so_far() -> int:
    """Bytes that this process's system calls have read, from disk or from cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def bytes_read(mesh, folder, block_bytes):
    sharded_model(mesh, folder, Placement(LAYERS))  # what Python itself reads at the first use
    before = read_so_far()
    with (
        mock.patch.object(checksums, "BLOCK_BYTES", block_bytes),
        mock.patch.object(engine_checkpoint, "BLOCK_BYTES", block_bytes),
    ):
        if mesh.get_local_rank() == 0 and block_bytes != BLOCK_BYTES:
            file = weight_file(folder)
            collected = BlockChecksums()
            collected.update(file.read_bytes())
            before += file.stat().st_size
            sidecar(file).write_bytes(collected.to_bytes())
        torch.distributed.barrier()
        sharded_model(mesh, folder, Placement(LAYERS))
        return read_so_far() - before


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("checked", [False, True])
def test_all_ranks_together_read_the_checkpoint_once(large, tmp_path, world, checked):
    """Checked, blocks of 1 KiB stand to these 20 MB as 512 KiB to the 40 GB of a 70B: whole blocks are read."""
    folder = tmp_path / "copy"
    shutil.copytree(large, folder)
    file = weight_file(folder)
    sidecar(file).unlink(missing_ok=True)
    size = file.stat().st_size
    assert size > 15e6
    read = sum(run_ranks(world, bytes_read, folder, 1024 if checked else BLOCK_BYTES))
    embedding = 512 * 1024 * 2  # mapped, and not read before its tokens are met
    assert size - embedding <= read <= 1.1 * size


# -- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(nf4_model):
    return nf4_model(num_hidden_layers=LAYERS)


def cut_short(folder):
    file = weight_file(folder)
    file.write_bytes(file.read_bytes()[:-100])
    return [file.name, "bytes, its header speaks of"]


def empty(folder):
    weight_file(folder).write_bytes(b"")
    return [weight_file(folder).name, "cut short"]


def missing_file(folder):
    name = weight_file(folder).name
    weight_file(folder).unlink()
    return [name, "missing"]


def no_file_at_all(folder):
    for file in (weight_file(folder), folder / engine_checkpoint.INDEX):
        file.unlink(missing_ok=True)
    return ["model.safetensors", "missing"]


def damaged_index(folder):
    (folder / engine_checkpoint.INDEX).write_text('{"weight_map": {"a": "mod')
    return [engine_checkpoint.INDEX, "damaged"]


def index_without_map(folder):
    (folder / engine_checkpoint.INDEX).write_text('{"metadata": {}}')
    return [engine_checkpoint.INDEX, "weight_map"]


def damaged_header(folder):
    file = weight_file(folder)
    raw = bytearray(file.read_bytes())
    raw[8] = ord("x")
    file.write_bytes(raw)
    return [file.name, "damaged"]


def checksums_of_another_file(folder):
    sidecar(weight_file(folder)).write_bytes(b"1234" * 3000)
    return [weight_file(folder).name, "checksums"]


def changed(change):
    """The same tensors but for what `change` does to them, in the same file."""

    def rewrite(folder):
        file = weight_file(folder)
        sidecar(file).unlink(missing_ok=True)
        tensors = load_file(file)
        expected = change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return expected

    rewrite.__name__ = change.__name__
    return rewrite


@changed
def weight_of_another_shape(tensors):
    tensors[UP] = tensors[UP][:-64].contiguous()
    return [".safetensors", UP, "expected"]


@changed
def norm_of_another_shape(tensors):
    tensors[NORM] = tensors[NORM][:-1].contiguous()
    return [".safetensors", NORM, "[63]", "[64]"]


@changed
def head_of_another_shape(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-2].contiguous()
    return [".safetensors", "lm_head.weight", "[510, 64]", "[512, 64]"]


@changed
def embedding_of_another_shape(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:, :-2].contiguous()
    return [".safetensors", name, "[512, 62]", "[512, 64]"]


@changed
def absmax_missing(tensors):
    del tensors[f"{UP}.absmax"]
    return [f"{UP}.absmax"]


@changed
def nested_absmax_missing(tensors):
    del tensors[f"{UP}.nested_absmax"]
    return [f"{UP}.nested_absmax"]


@changed
def nested_code_missing(tensors):
    del tensors[f"{UP}.nested_quant_map"]
    return [UP, "nested_quant_map"]


@changed
def weight_missing(tensors):
    del tensors[UP]
    return [UP]


@changed
def norm_missing(tensors):
    del tensors["model.norm.weight"]
    return ["model.norm.weight"]


def fp4(layer):
    def rename(tensors):
        for name in [name for name in tensors if f"layers.{layer}." in name and name.endswith("__nf4")]:
            tensors[name.replace("__nf4", "__fp4")] = tensors.pop(name)
        return [f"model.layers.{layer}.", "NF4"]

    rename.__name__ = f"fp4 in layer {layer}"
    return changed(rename)


def described(change):
    """The quant state of one matrix, changed."""

    def rewrite(tensors):
        name = f"{UP}.quant_state.bitsandbytes__nf4"
        raw = change(bytes(tensors[name].tolist()))
        tensors[name] = torch.tensor(list(raw), dtype=torch.uint8)
        return [UP]

    rewrite.__name__ = change.__name__
    return changed(rewrite)


@described
def other_block_size(raw):
    return json.dumps({**json.loads(raw), "blocksize": 128}).encode()


@described
def quant_state_no_json(raw):
    return raw[:-3]


@described
def quant_state_without_offset(raw):
    return json.dumps({key: v for key, v in json.loads(raw).items() if key != "nested_offset"}).encode()


DAMAGE = [
    cut_short,
    empty,
    missing_file,
    no_file_at_all,
    damaged_index,
    index_without_map,
    damaged_header,
    checksums_of_another_file,
    weight_of_another_shape,
    norm_of_another_shape,
    head_of_another_shape,
    embedding_of_another_shape,
    absmax_missing,
    nested_absmax_missing,
    weight_missing,
    norm_missing,
    fp4(0),
    fp4(1),
    other_block_size,
    nested_code_missing,
    quant_state_no_json,
    quant_state_without_offset,
]


def errors_of(mesh, folders):
    """What loading each folder says, or None where it says nothing."""
    found: list[str | Exception | None] = []
    for folder in folders:
        try:
            sharded_model(mesh, folder, Placement(LAYERS))
            found.append(None)
        except UserError as error:
            found.append(str(error))
        except Exception as error:
            found.append(error)
    return found


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory):
    """For each damage: the folder, what the error must name, and what one rank said."""
    root = tmp_path_factory.mktemp("damaged")
    kinds = [getattr(damage, "values", (damage,))[0] for damage in DAMAGE]
    folders, expected = [], []
    for number, damage in enumerate(kinds):
        folder = root / str(number)
        shutil.copytree(whole, folder)
        sidecar(weight_file(folder)).unlink(missing_ok=True)
        expected.append(damage(folder))
        folders.append(folder)
    (said,) = run_ranks(1, errors_of, folders)
    return dict(zip(kinds, zip(folders, expected, said, strict=True), strict=True))


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_ends_in_one_line_that_names_file_and_tensor(damaged, damage):
    folder, expected, message = damaged[damage]
    assert isinstance(message, str), message
    assert "\n" not in message
    assert message.startswith(str(folder)), message
    assert all(part in message for part in expected), message


FLIPPED: list[Any] = [
    (UP, 0.3),
    (UP, 0.7),
    (f"{UP}.absmax", 0.5),
    (f"{UP}.nested_absmax", 0.5),
    (f"{UP}.nested_quant_map", 0.5),
    (f"{UP}.quant_state.bitsandbytes__nf4", 0.0),
    (NORM, 0.99),
    ("model.norm.weight", 0.0),
    ("lm_head.weight", 0.99),
    ("model.embed_tokens.weight", 0.5),
]


def errors_of_flips(mesh, folder, flips):
    """What loading says of `folder` with one byte after another flipped, and whole again in between."""
    said = []
    for offset in flips:
        for rank_flips in (True, False):
            if mesh.get_local_rank() == 0:
                flip(weight_file(folder), offset)
            torch.distributed.barrier()
            if rank_flips:
                said += errors_of(mesh, [folder])
            torch.distributed.barrier()
    return said + errors_of(mesh, [folder])


def flip(file: Path, offset: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def flips(large, tmp_path_factory):
    """For each flipped byte: its place, and what each of two ranks said; and the folder."""
    folder = tmp_path_factory.mktemp("flipped") / "model"
    shutil.copytree(large, folder)
    file = weight_file(folder)
    write_checksums(file)
    cases = [getattr(case, "values", (case,))[0] for case in FLIPPED]
    offsets = [
        int(start + (end - start) * part) for name, part in cases for start, end in [place_of(file, name)]
    ]
    ranks = run_ranks(2, errors_of_flips, folder, offsets)
    assert [rank[-1] for rank in ranks] == [None, None]  # whole again, nothing is said
    return file, dict(zip(cases, zip(offsets, *ranks, strict=False), strict=True))


@pytest.mark.parametrize("case", FLIPPED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_flipped_byte_is_found_by_the_rank_that_reads_it(flips, case):
    file, found = flips
    offset, *said = found[case]
    messages = [message for message in said if message is not None]
    assert messages
    for message in messages:
        assert isinstance(message, str) and "\n" not in message
        at = re.fullmatch(
            rf"{re.escape(str(file))}: is damaged \(bytes (\d+) to (\d+) .* while reading (\S+)\); .*",
            message,
        )
        assert at, message
        block = range(int(at[1]), int(at[2]))
        assert offset in block and len(block) <= BLOCK_BYTES
        # The tensor named is one that lies in the damaged block: the very one, where it fills the block.
        start, end = place_of(file, at[3])
        assert start < block.stop and end > block.start
    if case[0] == UP:
        assert len(messages) == 1 and UP in messages[0]


def test_a_sound_checkpoint_loads_with_and_without_checksums(whole, tmp_path):
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder in folders:
        shutil.copytree(whole, folder)
        sidecar(weight_file(folder)).unlink(missing_ok=True)
    write_checksums(weight_file(folders[0]))
    assert run_ranks(2, errors_of, folders) == [[None, None]] * 2


@pytest.mark.parametrize("start", [0, 5, BLOCK_BYTES - 3, BLOCK_BYTES])
@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 9, 2 * BLOCK_BYTES])
def test_any_piece_is_read_whole_and_checked(tmp_path, start, size):
    """Pieces that begin and end within blocks, at their borders, and over several."""
    data = torch.randint(0, 256, (3 * BLOCK_BYTES + 1000,), dtype=torch.uint8)
    file = tmp_path / "model.safetensors"
    save_file({"other": torch.zeros(3), "data": data}, file)
    for checked in (False, True):
        if checked:
            write_checksums(file)
        with Checkpoint(tmp_path) as checkpoint:
            out = torch.empty(size, dtype=torch.uint8)
            checkpoint.read_bytes("data", start, out)
            assert torch.equal(out, data[start : start + size])
