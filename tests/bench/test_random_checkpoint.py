"""The random checkpoint of `recipe bench --checkpoint` is one that the engine can read like any other."""

import dataclasses
import json

import pytest
from safetensors import safe_open

from recipe import cli
from recipe.bench.checkpoint import disk_rate, ensure_checkpoint, write_random_checkpoint
from recipe.bench.spec import TINY
from recipe.checksums import BLOCK_BYTES, BlockChecksums, block_checksums
from recipe.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    write_random_checkpoint(folder, TINY)
    return folder


def test_its_files_are_sound(folder):
    (file,) = folder.glob("*.safetensors")
    sums = BlockChecksums()
    sums.update(file.read_bytes())
    assert block_checksums(file).tobytes() == sums.to_bytes()
    assert len(block_checksums(file)) == -(-file.stat().st_size // BLOCK_BYTES)
    with safe_open(file, framework="pt") as tensors:
        packed = tensors.get_tensor("model.layers.1.mlp.down_proj.weight")
        assert packed.shape == (64 * 128 // 2, 1) and len(packed.unique()) > 200
        assert (tensors.get_tensor("model.norm.weight") == 1).all()


@pytest.mark.slow
def test_it_is_loaded_and_trained_on(tmp_path, capsys):
    """`--checkpoint` makes it where there is none, and takes it where there is one."""
    folder = tmp_path / "made"
    command = [
        "bench",
        "--gpus",
        "0",
        "--model-shape",
        "tiny",
        "--only",
        "ours",
        "--tokens",
        "64",
        "--steps",
        "1",
    ]
    for said in ("a new one", "the same"):
        assert cli.main([*command, "--checkpoint", str(folder), "--json"]) == 0, said
        (row,) = json.loads(capsys.readouterr().out)["results"]
        assert row["checkpoint"] == "cold" and row["first_step_seconds"] > 0
        # Each of two ranks reads its half, and of small tensors a whole block.
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert row["read_gib"] * 2**30 > 0.5 * size
        assert 5.5 < row["loss_first"] < 8.5  # near the logarithm of 512 words


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for place, shape, said in (
        (tmp_path, TINY, "has no config.json"),
        (folder, dataclasses.replace(TINY, layers=1), "holds a model of 2 layers of 64, expected 1 of 64"),
    ):
        with pytest.raises(UserError, match=said):
            ensure_checkpoint(place, shape)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_the_disk_is_measured_past_the_cache(folder):
    assert 0 < disk_rate(folder, 2**20, 2) < 2**40
