"""A model that cannot be prepared is refused in one line that names what, where and what was expected."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.errors import UserError
from recipe.prepare import prepare
from recipe.prepare.entries import Entry, _refuse_surprises
from recipe.prepare.source import Source
from recipe.settings import from_dict
from tests.models import tiny_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("sound") / "tiny")


@pytest.fixture(scope="module")
def sound_shards(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("sound") / "tiny", shard_size="200KB")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def narrower(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :32].contiguous()


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
VISION = {
    "model_type": "mllama",
    "architectures": ["MllamaForConditionalGeneration"],
    "vision_config": {"model_type": "mllama_vision_model"},
}
REFUSED = {
    "mixture of experts": (
        lambda f: change_config(f, **MIXTRAL),
        "MixtralForCausalLM is a mixture of experts",
    ),
    "vision model": (lambda f: change_config(f, **VISION), "MllamaForConditionalGeneration is a vision"),
    "another family": (
        lambda f: change_config(f, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "gpt2",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors or .*index\.json is missing",
    ),
    "weights as pickles": (only_pickles, r"found pytorch_model\.bin.*expected weights as safetensors"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "has 0 bytes"),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 100), "cut short or damaged"),
    "weights cut in the data": (lambda f: cut(f / "model.safetensors", 200_000), "cut short or damaged"),
    "a tensor of another shape": (
        lambda f: change_weights(f, narrower),
        r"layers\.1\.mlp\.up_proj\.weight has shape \[128, 32\], expected \[128, 64\] from config\.json",
    ),
    "config of a wider model": (
        lambda f: change_config(f, intermediate_size=256),
        r"has shape \[\d+, \d+\], expected \[\d+, \d+\]",
    ),
    "a tensor that is missing": (
        lambda f: change_weights(f, lambda tensors: tensors.pop("model.norm.weight")),
        r"1 tensors are missing, the first is model\.norm\.weight",
    ),
    "GPTQ": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised already \(gptq\)",
    ),
    "8-bit bitsandbytes": (
        lambda f: change_config(
            f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
        r"quantised already \(bitsandbytes\).*expected.*NF4",
    ),
    "FP4": (
        lambda f: change_config(
            f,
            quantization_config={
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
            },
        ),
        "expected.*NF4",
    ),
}
REFUSED_IN_SHARDS = {
    "a shard that is missing": (
        lambda f: next(f.glob("model-00002-*")).unlink(),
        r"model-00002-of-\d+\.safetensors: is missing, but model\.safetensors\.index\.json names it",
    ),
    "a shard that is cut": (
        lambda f: cut(next(f.glob("model-00002-*")), 5000),
        r"model-00002-of-\d+\.safetensors: is cut short",
    ),
    "a tensor in two shards": (
        lambda f: shutil.copyfile(next(f.glob("model-00001-*")), next(f.glob("model-00002-*"))),
        r"is in model-00001-of-\d+\.safetensors too, expected each tensor once",
    ),
}


def refusal(folder, models):
    with pytest.raises(UserError) as caught:
        prepare(from_dict({"model": {"id": str(folder)}, "paths": {"models": str(models)}}))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list(models.rglob("*.safetensors"))
    return str(caught.value)


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(sound, tmp_path, what):
    damage, expected = REFUSED[what]
    folder = shutil.copytree(sound, tmp_path / "tiny")
    damage(folder)
    assert re.search(expected, refusal(folder, tmp_path / "models"))


@pytest.mark.parametrize("what", REFUSED_IN_SHARDS)
def test_shards_refused_in_one_line(sound_shards, tmp_path, what):
    damage, expected = REFUSED_IN_SHARDS[what]
    folder = shutil.copytree(sound_shards, tmp_path / "tiny")
    damage(folder)
    assert re.search(expected, refusal(folder, tmp_path / "models"))


def test_a_large_matrix_that_would_stay_unquantised_is_refused(sound):
    source = Source(sound, "tiny", None)
    file = sound / "model.safetensors"
    expected = [
        Entry("model.embed_tokens.weight", file, (512, 64), torch.bfloat16, False),
        Entry("lm_head.weight", file, (512, 64), torch.bfloat16, False),
        Entry("model.norm.weight", file, (64,), torch.bfloat16, False),
        Entry("model.layers.0.mlp.up_proj.weight", file, (128, 64), torch.bfloat16, True),
    ]
    _refuse_surprises(expected, source)
    experts = Entry("model.layers.0.mlp.experts.gate_up_proj", file, (8, 2048, 1024), torch.bfloat16, False)
    with pytest.raises(
        UserError, match=r"experts\.gate_up_proj \[8, 2048, 1024\] would stay unquantised \(32 MiB\)"
    ):
        _refuse_surprises([*expected, experts], source)


def test_a_weight_that_does_not_fill_its_blocks_is_refused(sound):
    odd = Entry(
        "model.layers.0.mlp.up_proj.weight", sound / "model.safetensors", (10, 10), torch.bfloat16, True
    )
    with pytest.raises(UserError, match="has 100 values, expected a multiple of 64"):
        _refuse_surprises([odd], Source(sound, "tiny", None))


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_prepared_folder_that_lost_something_is_said_and_not_used(sound, tmp_path, damage):
    settings = from_dict({"model": {"id": str(sound)}, "paths": {"models": str(tmp_path)}})
    weights = next(prepare(settings).folder.glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        cut(weights, 1000)
    with pytest.raises(
        UserError, match=rf"{weights.name}: (is missing|has 1000 bytes, expected \d+); remove"
    ):
        prepare(settings)


def test_a_model_that_is_not_there(tmp_path):
    settings = from_dict({"model": {"id": "./no/such/folder"}, "paths": {"models": str(tmp_path)}})
    with pytest.raises(UserError, match="no such folder; expected a hub id"):
        prepare(settings)
