"""A GGUF file is the model: llama.cpp finds in it the same tokens, the same losses and the same chat template."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, TokenType, quants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from recipe.errors import UserError
from recipe.export import llamacpp
from recipe.export.gguf import file_bytes, write_gguf
from recipe.export.gguf_lora import write_gguf_lora
from recipe.export.gguf_types import summary
from recipe.export.tensors import Stored
from tests.export.gguf_parts import MODELS, TRICKY, documents, load, plain_scores, small_model
from tests.models import CHAT_TEMPLATE, VOCAB


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name, made on first use: the checkpoint's folder and its GGUF file in fp32."""
    made = {}

    def model(name):
        if name not in made:
            folder = small_model(tmp_path_factory.mktemp(name), name)
            assert write_gguf(Stored(folder), folder, folder / "f32.gguf", "f32") == []
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
    # Two things that llama.cpp has no setting for: it composes no characters, and doubles a space that begins a text.
    change = {"qwen2": lambda t: unicodedata.normalize("NFC", t), "mistral": str.lstrip}.get(name, str)
    texts = [change(text) for text in TRICKY]
    for text, found in zip(texts, llamacpp.tokenise(file, texts), strict=True):
        assert found == tokenizer(text)["input_ids"], text


def test_the_file_says_what_it_is(models, tmp_path):
    folder, _ = models("llama-3")
    file = tmp_path / "named.gguf"
    write_gguf(Stored(folder), folder, file, "bf16", name="A name", licence="apache-2.0")
    said = llamacpp.metadata(file)
    assert (said["general.name"], said["general.license"], said["general.file_type"]) == (
        "A name",
        "apache-2.0",
        "32",
    )
    assert said["llama.context_length"] == "512" and said["llama.attention.head_count_kv"] == "2"
    assert said["tokenizer.ggml.pre"] == "llama-bpe" and said["tokenizer.ggml.add_bos_token"] == "true"
    assert llamacpp.chat_template(file) == CHAT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds = {field.name: field.contents() for field in GGUFReader(file).fields.values()}
    types = kinds["tokenizer.ggml.token_type"]
    assert len(types) == VOCAB and types[len(tokenizer)] == TokenType.UNUSED
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == TokenType.USER_DEFINED
    assert types[tokenizer.eos_token_id] == TokenType.CONTROL
    # What the plan says a file takes is what it takes, but for a vocabulary of at most 16 MiB.
    assert 0 < file_bytes(Stored(folder), "bf16") - file.stat().st_size < 2**24


def test_a_window_is_the_longest_context(tmp_path):
    folder = small_model(tmp_path / "windowed", "mistral", sliding_window=128)
    write_gguf(Stored(folder), folder, tmp_path / "w.gguf", "f16")
    assert llamacpp.metadata(tmp_path / "w.gguf")["llama.context_length"] == "128"


def test_greedy_answers_are_those_of_transformers(models):
    folder, file = models("qwen3")
    model, prompts = load(folder), [ids for ids, _ in documents()]
    for prompt, found in zip(prompts, llamacpp.greedy(file, prompts, 12), strict=True):
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected = answer[0, len(prompt) :].tolist()
        assert found == expected[: len(found)] and (len(found) == 12 or expected[len(found)] == 0)
    assert len({tuple(found) for found in llamacpp.greedy(file, prompts, 12)}) == len(prompts)


def test_the_mix_of_q4_k_m(tmp_path):
    """Rows of 256: more bits where llama.cpp gives more; rows of 64: the next better types, and they are named."""
    wide = small_model(
        tmp_path / "wide",
        "llama",
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    file = tmp_path / "wide.gguf"
    assert write_gguf(Stored(wide), wide, file, "q4_k_m") == []
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    more = [
        n for n in range(8) if types[f"blk.{n}.ffn_down.weight"] == types[f"blk.{n}.attn_v.weight"] == "Q6_K"
    ]
    assert more == [0, 3, 6, 7]  # the first and the last eighth, and every third between
    assert (
        types["output.weight"] == "Q6_K"
        and types["token_embd.weight"] == types["blk.3.attn_q.weight"] == "Q4_K"
    )
    assert types["blk.0.attn_norm.weight"] == "F32" and set(types.values()) == {"Q4_K", "Q6_K", "F32"}
    write_gguf(Stored(wide), wide, tmp_path / "exact.gguf", "f32")
    exact = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "exact.gguf").tensors}
    for tensor in GGUFReader(file).tensors:
        lost = quants.dequantize(tensor.data, tensor.tensor_type) - exact[tensor.name]
        most = {"Q4_K": 0.1, "Q6_K": 0.02, "F32": 0}[tensor.tensor_type.name]
        assert np.square(lost).mean() ** 0.5 <= most * np.square(exact[tensor.name]).mean() ** 0.5
    narrow = small_model(tmp_path / "narrow", "llama")
    fallbacks = write_gguf(Stored(narrow), narrow, file, "q4_k_m")
    assert {(f.got, f.wanted) for f in fallbacks} == {("Q5_0", "Q4_K"), ("Q8_0", "Q6_K")}
    assert (
        summary(fallbacks)[0]
        == "Q8_0 instead of Q6_K (rows of 64, no multiple of 256): 1 output.weight, 1 attn_v.weight"
    )
    llamacpp.token_scores(file, documents())


def test_quantising_is_what_the_gguf_package_does(models, tmp_path):
    folder, plain = models("llama")
    write_gguf(Stored(folder), folder, tmp_path / "q8.gguf", "q8_0")
    exact = {tensor.name: tensor.data for tensor in GGUFReader(plain).tensors}
    quantised = GGUFReader(tmp_path / "q8.gguf").tensors
    assert sum(tensor.tensor_type == Type.Q8_0 for tensor in quantised) == 2 + 2 * 7
    for tensor in quantised:
        if tensor.tensor_type == Type.Q8_0:
            assert np.array_equal(tensor.data, quants.quantize(exact[tensor.name], Type.Q8_0))


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split_otherwise(folder):
    text = (folder / "tokenizer.json").read_text()
    described = json.loads(text)
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(described))


def too_large(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "kind": (lambda folder: None, "q3_k", ["`q3_k`", "q4_k_m"]),
    "longrope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "longrope"}),
        "f16",
        ["`longrope`", "yarn"],
    ),
    "another activation": (
        lambda f: change_config(f, hidden_act="gelu"),
        "f16",
        ["hidden_act is `gelu`", "silu"],
    ),
    "another family": (lambda f: change_config(f, model_type="gemma"), "f16", ["gemma", "not supported"]),
    "splits texts otherwise": (split_otherwise, "f16", ["Whitespace", "llama-bpe"]),
    "a value that F16 has not": (too_large, "f16", ["model.layers.1.mlp.up_proj", "1e+05", "65504", "bf16"]),
}


@pytest.mark.parametrize(("spoil", "kind", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_another_model_is_refused_in_one_line(spoil, kind, parts, models, tmp_path):
    folder = tmp_path / "spoiled"
    shutil.copytree(models("llama")[0], folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        write_gguf(Stored(folder), folder, tmp_path / "no.gguf", kind)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert not (tmp_path / "no.gguf").exists()


def test_a_file_that_is_cut_short_is_refused(models, tmp_path):
    file = tmp_path / "short.gguf"
    file.write_bytes(models("llama")[1].read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"short\.gguf: llama.cpp cannot load it"):
        llamacpp.token_scores(file, documents())


class Repeated(Stored):
    """A checkpoint with its first layer many times over: nothing lies on the disk for it."""

    def __init__(self, folder, layers):
        super().__init__(folder)
        first = [name for name in super().names() if ".layers.0." in name]
        self.all = [name.replace(".0.", f".{n}.", 1) for n in range(layers) for name in first]

    def names(self):
        return self.all + [name for name in super().names() if ".layers." not in name]

    def shape(self, name):
        return super().shape(re.sub(r"layers\.\d+", "layers.0", name))

    def read(self, name):
        return super().read(re.sub(r"layers\.\d+", "layers.0", name))


def peak_mib(write):
    """By how much the resident memory of this process rose while it ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    write()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def test_the_memory_needed_does_not_grow_with_the_layers(tmp_path):
    """Layers of 11 MiB in bf16: 16 more of them are 176 MiB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1, "head_dim": 64}
    folder = small_model(tmp_path, "llama", dtype=torch.bfloat16, **sizes)
    peaks = []
    for layers in (2, 18):
        change_config(folder, num_hidden_layers=layers)
        source, target = Repeated(folder, layers), tmp_path / "m.gguf"
        peaks.append(
            peak_mib(lambda source=source, target=target: write_gguf(source, tmp_path, target, "q8_0"))
        )
        assert len(GGUFReader(target).tensors) == 9 * layers + 3
    assert peaks[1] < peaks[0] + 40


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """A folder of PEFT adapters with large values on the `llama` model, and PEFT's scores with them."""
    folder, _ = models("llama")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        load(folder), LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=linears)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
    adapters = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(adapters)
    return adapters, plain_scores(model, documents())


def furthest(scores, expected):
    return max(
        abs(score.loss - loss) / score.tokens for score, (loss, _) in zip(scores, expected, strict=True)
    )


def test_a_gguf_adapter_is_what_peft_computes(adapted, models, tmp_path):
    adapters, expected = adapted
    folder, file = models("llama")
    lora = tmp_path / "lora.gguf"
    write_gguf_lora(adapters, folder, lora)
    assert furthest(llamacpp.token_scores(file, documents(), lora), expected) < 1e-3
    f16 = tmp_path / "f16.gguf"
    write_gguf(Stored(folder), folder, f16, "f16")
    assert furthest(llamacpp.token_scores(f16, documents(), lora), expected) < 1e-3
    assert furthest(llamacpp.token_scores(file, documents()), expected) > 0.1


def without_rank_scaling(monkeypatch, adapters):
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))


def without_permutation(monkeypatch, adapters):
    monkeypatch.setattr("recipe.export.gguf_lora.permuted", lambda tensor, *_: tensor)


def a_and_b_swapped(monkeypatch, adapters):
    path = adapters / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "q_proj.lora_A" in name or "o_proj.lora_A" in name]:
        b = name.replace("lora_A", "lora_B")
        tensors[name], tensors[b] = tensors[b].T.contiguous(), tensors[name].T.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("fault", [without_rank_scaling, without_permutation, a_and_b_swapped])
def test_a_faulty_adapter_is_seen_in_the_loss(fault, adapted, models, tmp_path, monkeypatch):
    folder, file = models("llama")
    shutil.copytree(adapted[0], tmp_path / "copy")
    fault(monkeypatch, tmp_path / "copy")
    write_gguf_lora(tmp_path / "copy", folder, tmp_path / "lora.gguf")
    assert furthest(llamacpp.token_scores(file, documents(), tmp_path / "lora.gguf"), adapted[1]) > 0.01


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
    ],
)
def test_more_than_plain_lora_is_refused(said, part, adapted, models, tmp_path):
    shutil.copytree(adapted[0], tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(UserError, match=part):
        write_gguf_lora(tmp_path / "copy", models("llama")[0], tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_adapters_of_another_model_are_refused(adapted, models, tmp_path):
    with pytest.raises(UserError, match=r"expected .* it is of another model"):
        write_gguf_lora(adapted[0], models("mistral")[0], tmp_path / "no.gguf")
    write_gguf_lora(adapted[0], models("llama")[0], tmp_path / "lora.gguf")
    with pytest.raises(UserError, match=r"lora\.gguf: llama.cpp cannot load it on f32\.gguf"):
        llamacpp.token_scores(models("mistral")[1], documents(), tmp_path / "lora.gguf")
