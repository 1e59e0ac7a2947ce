"""What `recipe prepare` writes is what plain transformers would have quantised itself, to the bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from recipe.files import read_json, sha256_of
from recipe.prepare import RECORD, prepare, verify
from recipe.settings import from_dict
from tests.models import source_of, tiny_checkpoint

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512
DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # where prepare quantises; the kernels differ in last bits
MODELS = [
    {"family": "llama", "tied": True},
    {"family": "llama", "tied": False},
    {"family": "qwen2", "tied": False},
    {"family": "qwen3", "tied": True},
    {"family": "mistral", "tied": False},
]


def settings_for(source, models):
    return from_dict({"model": {"id": str(source)}, "paths": {"models": str(models)}})


def nf4_config(double_quant=True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": DEVICE}, **options
    ).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS.to(DEVICE)).logits


@pytest.mark.parametrize(
    "options", MODELS, ids=lambda o: f"{o['family']}-{'tied' if o['tied'] else 'untied'}"
)
def test_plain_transformers_gives_the_logits_of_the_model_it_quantises_itself(nf4_model, options):
    prepared = nf4_model(**options)
    ours = load(prepared)
    theirs = load(source_of(prepared), quantization_config=nf4_config())

    linears = [name for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 14 and linears == [
        name for name, m in ours.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    ]
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(load(source_of(prepared))))  # quantisation is not nothing


@pytest.mark.parametrize(("dtype", "double_quant"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_same_for_bf16_weights_and_for_single_quantisation(tmp_path, dtype, double_quant):
    source = tiny_checkpoint(tmp_path / "source", dtype=dtype)
    settings = from_dict(
        {
            "model": {"id": str(source)},
            "paths": {"models": str(tmp_path / "models")},
            "quantization": {"double_quant": double_quant},
        }
    )
    ours = load(prepare(settings).folder, dtype)
    theirs = load(source, dtype, quantization_config=nf4_config(double_quant))
    assert ours.model.layers[0].mlp.up_proj.weight.quant_state.nested == double_quant
    assert torch.equal(logits(ours), logits(theirs))


def test_the_tokenizer_comes_along(nf4_model):
    prepared = nf4_model(family="llama")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (prepared, source_of(prepared)))
    text = "hello ünïcode <|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token == "<|im_end|>" and ours.chat_template == theirs.chat_template


def test_every_file_has_its_hash_and_a_changed_byte_is_found(tmp_path):
    prepared = prepare(settings_for(tiny_checkpoint(tmp_path / "source"), tmp_path / "models"))
    assert prepared.fresh
    files = {path.name for path in prepared.folder.iterdir()}
    assert set(prepared.hashes) == files - {RECORD}
    assert {name: sha256_of(prepared.folder / name) for name in prepared.hashes} == prepared.hashes
    assert verify(prepared) == []

    weights = next(prepared.folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert verify(prepared) == [weights.name]


def test_the_bytes_left_unquantised_are_counted(tmp_path):
    prepared = prepare(settings_for(tiny_checkpoint(tmp_path / "source"), tmp_path / "models"))
    record = read_json(prepared.folder / RECORD)
    matrices = {"model.embed_tokens.weight": [512, 64], "lm_head.weight": [512, 64]}
    norms = 2 * 2 + 1  # two layers and the last one, 64 values each
    assert record["unquantised"] == matrices
    assert record["unquantised_bytes"] == 4 * (2 * 512 * 64 + norms * 64)
    stored = 0
    with safe_open(next(prepared.folder.glob("*.safetensors")), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            tensor = tensors.get_tensor(name)
            if tensor.dtype != torch.uint8 and ".weight." not in name:
                stored += tensor.nbytes
    assert record["unquantised_bytes"] == stored


def test_a_second_call_does_nothing(tmp_path):
    settings = settings_for(tiny_checkpoint(tmp_path / "source"), tmp_path / "models")
    first = prepare(settings)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.folder.iterdir()}
    second = prepare(settings)
    assert not second.fresh and second.folder == first.folder and second.hashes == first.hashes
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.folder.iterdir()}
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.folder.name]


def test_a_checkpoint_that_is_nf4_already_is_taken_as_it_is(nf4_model, tmp_path):
    elsewhere = nf4_model(family="llama")
    found = prepare(settings_for(elsewhere, tmp_path / "models"))
    assert found.folder == elsewhere and not found.fresh
    assert not (tmp_path / "models").exists()


def test_what_transformers_saved_as_nf4_itself_is_taken_too(nf4_model, tmp_path):
    theirs = load(source_of(nf4_model(family="llama")), quantization_config=nf4_config())
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(nf4_model(family="llama")).save_pretrained(tmp_path / "theirs")
    found = prepare(settings_for(tmp_path / "theirs", tmp_path / "models"))
    assert found.folder == tmp_path / "theirs" and found.hashes == {}
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"][
        "load_in_4bit"
    ]
