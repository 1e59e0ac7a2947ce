"""A GGUF file is the model: llama.cpp finds in it the same tokens, the same losses and the same chat template."""

import pytest
from transformers import AutoTokenizer

from recipe.export import llamacpp
from recipe.export.gguf import write_gguf
from tests.export.gguf_parts import MODELS, TRICKY, Folder, documents, load, plain_scores, small_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name, made on first use: the checkpoint's folder and its GGUF file in fp32."""
    made = {}

    def model(name):
        if name not in made:
            folder = small_model(tmp_path_factory.mktemp(name), name)
            assert write_gguf(Folder(folder), folder, folder / "f32.gguf", "f32") == []
            made[name] = folder, folder / "f32.gguf"
        return made[name]

    return model


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_finds_the_losses_of_transformers(name, models):
    folder, file = models(name)
    given = documents()
    scores, expected = llamacpp.token_scores(file, given), plain_scores(load(folder), given)
    for score, (loss, gap), (_, labels) in zip(scores, expected, given, strict=True):
        assert score.tokens == sum(label != -100 for label in labels)
        assert score.loss / score.tokens == pytest.approx(loss / score.tokens, abs=1e-3)
        assert score.gap == pytest.approx(gap, abs=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_tokenises_as_transformers_does(name, models):
    folder, file = models(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, found in zip(TRICKY, llamacpp.tokenise(file, TRICKY), strict=True):
        assert found == tokenizer(text)["input_ids"], text
