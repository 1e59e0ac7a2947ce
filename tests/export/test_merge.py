"""A merge is what PEFT's own is, to the bit; into the NF4 base it is one rounding off; nothing half-written, nothing wrong."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from recipe.export.tensors import Dequantised, Merged, Stored, Weighted
from tests.models import tiny_checkpoint, tiny_nf4

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_folder(base, folder, seed=0, **config):
    """What PEFT writes for a model that was trained: every matrix random, rows of tokens too."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, *adapters):
    """(folder, weight) each; the state dict of a plain bf16 model after PEFT's merge_and_unload."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = [str(number) for number in range(len(adapters))]
    model = PeftModel.from_pretrained(model, adapters[0][0], adapter_name="0")
    for name, (folder, _) in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(folder, adapter_name=name)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            for name, (_, weight) in zip(names, adapters, strict=True):
                module.set_scale(name, weight)
    return model.merge_and_unload(adapter_names=names)


def same_bits(tensors, model):
    """Every tensor of the source is the model's, to the bit, and none is left over but a tied head."""
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert set(tensors.names()) == set(expected)
    return all(torch.equal(tensors.read(name), expected[name]) for name in tensors.names())


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("bf16") / "tiny", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {}),
        ({"tied": True}, {"lora_dropout": 0.1}),
        ({"family": "qwen2"}, {"use_rslora": True, "r": 8}),
        ({"tied": True}, {"trainable_token_indices": [3, 7, 500], "use_rslora": True}),
        ({}, {"trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 4]}}),
        ({}, {"trainable_token_indices": [5]}),
    ],
    ids=["llama", "tied", "qwen2 with biases, rsLoRA", "tied, new tokens", "new tokens", "embedding only"],
)
def test_a_merge_is_pefts_to_the_bit(model, lora, tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **model)
    adapters = peft_folder(base, tmp_path / "adapters", **lora)
    expected = merged_by_peft(base, (adapters, 1.0))
    assert same_bits(Merged(Stored(base), [Weighted(adapters)]), expected)
    assert not same_bits(Merged(Stored(base), [Weighted(adapters, 1.01)]), expected)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """Prepared from bf16, with double quantisation."""
    return tiny_nf4(tmp_path_factory.mktemp("nf4"), dtype=torch.bfloat16)


def test_the_nf4_base_is_what_bitsandbytes_dequantises(nf4):
    model = AutoModelForCausalLM.from_pretrained(nf4, device_map={"": "cpu"})
    tensors = Dequantised(nf4)
    for name, parameter in model.named_parameters():
        if tensors.quantised(name):
            parameter.quant_state.dtype = torch.float32
            exact = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            rows = len(exact) // 64 * 64
            found = torch.cat(
                [
                    tensors.exact(tensors.fetch(name), 0, rows),
                    tensors.exact(tensors.fetch(name), rows, len(exact)),
                ]
            )
            assert torch.equal(found, exact) and not torch.equal(found, exact.bfloat16().float())
            assert torch.equal(tensors.read(name), exact.to(torch.bfloat16))
        else:
            assert torch.equal(tensors.read(name), parameter)
    assert set(tensors.names()) == {name for name, _ in model.named_parameters()}
    assert sum(tensors.quantised(name) for name in tensors.names()) == 14
