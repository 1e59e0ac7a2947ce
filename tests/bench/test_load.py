"""The random checkpoint of `python -m recipe.bench.load` is one that the engine and plain transformers can read."""

import json
import subprocess
import sys

import pytest
from safetensors import safe_open

from recipe.bench.load import write_random_checkpoint
from recipe.bench.spec import TINY
from recipe.checksums import BLOCK_BYTES, BlockChecksums, block_checksums
from tests.train.tiny_run import ROOT


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


def test_it_is_loaded_and_trained_on(folder):
    command = ["--model-shape", "tiny", "--folder", str(folder), "--gpus", "0", "--tokens", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "recipe.bench.load", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.5 * found["checkpoint_gib"] < found["read_gib"]  # a small tensor costs a block
    assert 5.5 < found["loss"] < 8.5  # near the logarithm of 512 words
    assert found["load_seconds"] > 0 and found["pinned_gib"] == 0
