"""Shapes are exact, and what the recipe cannot train is refused by name."""

import json

import pytest

from recipe.errors import UserError
from recipe.plan.shapes import check_supported, shape_from_config, shape_of
from recipe.settings import PROJECTIONS

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("model_id", "parameters"),
    [
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("demo", 134_515_008),
    ],
)
def test_parameter_counts_are_those_of_the_model_cards(model_id, parameters):
    assert shape_of(model_id).parameters == parameters


def test_a_config_gives_the_shape_of_the_table(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert shape_of(str(tmp_path)) == shape_of("meta-llama/Llama-3.1-70B")
    assert shape_of("somebody/unknown", [tmp_path]).parameters == 70_553_706_496


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_transformers(family, tied):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=128,
        tie_word_embeddings=tied,
        # Llama's biases are on o_proj too, Qwen2's are always there and never on o_proj.
        **({"attention_bias": True} if family == "llama" else {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(config.to_dict() | {"architectures": [type(model).__name__]}, "config.json")
    assert shape.parameters == model.num_parameters()


def test_lora_parameters_of_70b():
    shape = shape_of("meta-llama/Llama-3.1-70B")
    assert shape.lora_parameters(16, PROJECTIONS) == 207_093_760
    assert shape.lora_parameters(32, PROJECTIONS) == 2 * 207_093_760
    assert shape.lora_parameters(16, ["q_proj"]) == 80 * 16 * 2 * 8192


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
            ["MixtralForCausalLM is a mixture of experts (num_local_experts 8)", "silently"],
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128},
            ["mixture of experts (num_experts 128)"],
        ),
        (
            {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "n_routed_experts": 256,
            },
            ["mixture of experts (n_routed_experts 256)"],
        ),
        (
            {"architectures": ["GptOssMoeForCausalLM"], "model_type": "gpt_moe"},
            ["GptOssMoeForCausalLM is a mixture of experts, expected"],
        ),
        (
            {
                "architectures": ["Qwen2VLForConditionalGeneration"],
                "model_type": "qwen2_vl",
                "vision_config": {"a": 1},
            },
            ["Qwen2VLForConditionalGeneration", "vision or multimodal", "vision_config"],
        ),
        (
            {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"},
            ["MllamaForConditionalGeneration", "vision or multimodal"],
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
            ["Phi3ForCausalLM (model_type `phi3`)", "a dense Llama, Mistral, Qwen2 or Qwen3"],
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["expected LlamaForCausalLM"]),
        ({"architectures": None, "model_type": None}, ["unknown", "is not supported"]),
    ],
)
def test_unsupported_models_are_refused_by_name(changes, parts):
    with pytest.raises(UserError) as caught:
        check_supported(LLAMA_70B | changes, "models/x/config.json")
    message = str(caught.value)
    assert message.startswith("models/x/config.json: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_dense_models_with_one_expert_entry_pass():
    check_supported(LLAMA_70B | {"num_local_experts": 0}, "config.json")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "config.json:1: not valid JSON"),
        ("[]", "is no JSON object"),
        (json.dumps(LLAMA_70B | {"hidden_size": "8192"}), "hidden_size is `8192`, expected a whole number"),
        (json.dumps({k: v for k, v in LLAMA_70B.items() if k != "vocab_size"}), "vocab_size is `None`"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, text, part):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        shape_of(str(tmp_path))
    assert part in str(caught.value) and "config.json" in str(caught.value)


def test_an_unknown_model_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"`some/model`.*expected one of demo, .*recipe prepare"):
        shape_of("some/model")
    with pytest.raises(UserError, match=r"has no config\.json"):
        shape_of(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.id is empty"):
        shape_of(None)
