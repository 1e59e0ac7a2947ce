"""A config says what is wrong with it in one line: file, line, key, what was found, what was expected."""

from pathlib import Path

import pytest

from recipe import settings as settings_module
from recipe.errors import UserError
from recipe.settings import PROJECTIONS, Settings, from_dict, load

CONFIGS = sorted((Path(settings_module.__file__).parent / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_the_promised_configs_are_there():
    assert {path.stem for path in CONFIGS} == {
        "llama-3.1-70b",
        "llama-3.3-70b",
        "qwen2.5-72b",
        "llama-3.1-8b",
        "smollm2-135m",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is_for(path):
    settings = load(path)
    assert settings.model.id
    assert settings.accumulation(2) >= 1
    if settings.model.id != "demo":
        assert [settings.accumulation(gpus) for gpus in (1, 2, 4)] == [4, 2, 1]
    comment = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "Needs:" in comment and "Command:" in comment


def test_the_70b_config_has_the_articles_values():
    settings = load(next(path for path in CONFIGS if path.stem == "llama-3.1-70b"))
    assert (settings.lora.rank, settings.lora.alpha, settings.lora.dropout) == (16, 16.0, 0.05)
    assert settings.lora.target_modules == list(PROJECTIONS)
    assert settings.quantization.double_quant and settings.quantization.type == "nf4"
    assert (settings.train.learning_rate, settings.train.steps, settings.train.log_every) == (1e-4, 100, 10)
    assert (settings.data.max_length, settings.data.eval_fraction) == (1024, 0.1)
    assert settings.train.global_batch_tokens == 16 * 1024
    assert settings.accumulation(2) == 2  # of 4,096 tokens: the article's 8 rows of a card, packed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_written_settings_load_as_they_were(path, tmp_path):
    settings = load(path, ["train.steps=null", "train.epochs=1.5", "data.path=a b.jsonl"])
    assert load(write(tmp_path, settings.to_yaml())) == settings


def test_defaults_are_valid():
    assert from_dict({}) == Settings()


def test_a_model_may_be_named_alone(tmp_path):
    assert load(write(tmp_path, "model: demo\n")).model.id == "demo"


def test_overrides_win_and_keep_their_type(tmp_path):
    path = write(tmp_path, "train:\n  steps: 5\n")
    settings = load(path, ["train.steps=7", "lora.dropout=0", "train.learning_rate=2e-4", "train.steps=8"])
    assert (settings.train.steps, settings.lora.dropout, settings.train.learning_rate) == (8, 0.0, 2e-4)


def test_micro_batch_auto_is_the_row_length():
    assert from_dict({"data": {"max_length": 512}}).micro_batch_tokens == 512


def test_a_global_batch_that_the_ranks_do_not_divide_is_named_with_one_that_they_do():
    with pytest.raises(UserError, match=r"16384, expected a multiple of 3072 .* set it to 15360"):
        Settings().accumulation(3)


# name: config text, then every part that the message must have.
BAD = {
    "unknown section": ("modle:\n  id: demo\n", ["c.yaml:1:", "unknown section `modle`", "`model`"]),
    "unknown key": (
        "model: demo\ntrain:\n  learning_rte: 1\n",
        ["c.yaml:3:", "`train.learning_rte`", "`train.learning_rate`"],
    ),
    "key of another section": ("train:\n  rank: 8\n", ["c.yaml:2:", "`train.rank`", "`lora.rank`"]),
    "unlike anything": ("train:\n  zzz: 8\n", ["c.yaml:2:", "`train.zzz`", "known: learning_rate"]),
    "text for a number": (
        "lora:\n  rank: big\n",
        ["c.yaml:2:", "lora.rank is `big`", "a whole number from 1"],
    ),
    "half a step": ("train:\n  steps: 1.5\n", ["c.yaml:2:", "train.steps is 1.5", "a whole number"]),
    "below its range": ("lora:\n  rank: 0\n", ["c.yaml:2:", "lora.rank is `0`", "from 1 to 1,024"]),
    "above its range": ("lora:\n  dropout: 0.95\n", ["c.yaml:2:", "lora.dropout is 0.95", "from 0 to 0.9"]),
    "at an open end": ("train:\n  learning_rate: 0\n", ["c.yaml:2:", "learning_rate", "above 0"]),
    "not finite": ("train:\n  learning_rate: .nan\n", ["c.yaml:2:", "learning_rate is nan", "a number"]),
    "infinite": ("train:\n  max_grad_norm: .inf\n", ["c.yaml:2:", "max_grad_norm is inf", "at least 0"]),
    "true for a number": ("train:\n  seed: true\n", ["c.yaml:2:", "train.seed is `true`", "a whole number"]),
    "number for a flag": (
        "quantization:\n  double_quant: 1\n",
        ["c.yaml:2:", "double_quant is `1`", "true or false"],
    ),
    "unknown choice": (
        "compute:\n  dtype: bf61\n",
        ["c.yaml:2:", "compute.dtype is `bf61`", "bf16, fp16", "did you mean `bf16`"],
    ),
    "unknown kernels": (
        "compute:\n  kernels: triton\n",
        ["c.yaml:2:", "compute.kernels is `triton`", "one of fused, plain"],
    ),
    "attention of yesterday": (
        "compute:\n  attention: flash_attention_2\n",
        ["c.yaml:2:", "`flash_attention_2`", "one of auto, varlen, sdpa"],
    ),
    "fewer layers than none": (
        "compute:\n  offload_layers: -1\n",
        ["c.yaml:2:", "compute.offload_layers is `-1`", "a whole number from 0", "or `auto`"],
    ),
    "half a layer": (
        "compute:\n  keep_layers: 1.5\n",
        ["c.yaml:2:", "compute.keep_layers is 1.5", "a whole number from 0", "or `auto`"],
    ),
    "unknown sums": (
        "compute:\n  accumulate: bf16\n",
        ["c.yaml:2:", "compute.accumulate is `bf16`", "one of fp32, fp16"],
    ),
    "a setting that is gone": (
        "compute:\n  activation_checkpointing: true\n",
        ["c.yaml:2:", "unknown key `compute.activation_checkpointing`"],
    ),
    "unknown optimizer": ("train:\n  optimizer: adamw8bit\n", ["c.yaml:2:", "`adamw8bit`", "one of adamw"]),
    "8-bit Adam, with the reason": (
        "train:\n  optimizer: adamw_8bit\n",
        [
            "c.yaml:2:",
            "train.optimizer",
            "`adamw_8bit`",
            "blocks that sharding cuts otherwise",
            "32-bit states take",
        ],
    ),
    "other quantisation": ("quantization:\n  type: fp4\n", ["c.yaml:2:", "`fp4`", "one of nf4"]),
    "unknown word": ("compute:\n  processes: many\n", ["c.yaml:2:", "`many`", "or `auto`"]),
    "text for a list": (
        "lora:\n  target_modules: q_proj\n",
        ["c.yaml:2:", "target_modules is `q_proj`", "a list of q_proj"],
    ),
    "empty list": ("lora:\n  target_modules: []\n", ["c.yaml:2:", "target_modules", "a list of"]),
    "unknown projection": (
        "lora:\n  target_modules: [q_proj, qkv_proj]\n",
        ["c.yaml:2:", "`qkv_proj`", "some of q_proj"],
    ),
    "projection twice": ("lora:\n  target_modules: [q_proj, q_proj]\n", ["c.yaml:2:", "`q_proj` twice"]),
    "null where a value must be": ("lora:\n  rank:\n", ["c.yaml:2:", "lora.rank is empty", "a whole number"]),
    "list for a text": ("data:\n  path: [a, b]\n", ["c.yaml:2:", "data.path is", "expected text"]),
    "empty text": ("model:\n  id: ' '\n", ["c.yaml:2:", "model.id is", "hub id"]),
    "section without keys": ("lora: 16\n", ["c.yaml:1:", "lora is `16`", "a section of `key: value` lines"]),
    "a list of sections": ("- model: demo\n", ["c.yaml: is", "expected sections"]),
    "key twice": ("train:\n  steps: 1\n  steps: 2\n", ["c.yaml:3:", "`train.steps` is set twice", "line 2"]),
    "broken YAML": ("train:\n  steps: [1\n", ["c.yaml:", "not valid YAML"]),
    "tab": ("train:\n\tsteps: 1\n", ["c.yaml:2:", "not valid YAML"]),
    "Python object": ("model: !!python/object:os.system {}\n", ["c.yaml:1:", "not valid YAML"]),
    "micro-batch shorter than a row": (
        "data:\n  max_length: 1024\ntrain:\n  micro_batch_tokens: 512\n",
        ["c.yaml:4:", "micro_batch_tokens is 512", "at least data.max_length (1024)"],
    ),
    "batch smaller than a micro-batch": (
        "train:\n  global_batch_tokens: 512\n",
        ["c.yaml:2:", "global_batch_tokens is 512", "1024 tokens"],
    ),
    "neither steps nor epochs": (
        "train:\n  steps: null\n",
        ["c.yaml:2:", "train.steps is empty and train.epochs is empty"],
    ),
    "steps and epochs": (
        "train:\n  epochs: 2\n",
        ["c.yaml:2:", "train.steps is `100`", "exactly one of them"],
    ),
    "a key that is no text": ("1: 2\n", ["unknown section `1`"]),
    "not a date": ("train:\n  steps: 2020-13-45\n", ["c.yaml", "not valid YAML"]),
    "warm-up longer than the run": (
        "train:\n  steps: 5\n  warmup_steps: 9\n",
        ["c.yaml:3:", "warmup_steps is 9", "train.steps (5)"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=BAD.keys())
def test_bad_config(text, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


BAD_OVERRIDES = {
    "no value": ("train.steps", ["--set train.steps", "section.key=value"]),
    "no section": ("steps=5", ["--set steps=5", "section.key=value"]),
    "unknown key": ("train.stepz=5", ["--set train.stepz=5:", "`train.steps`"]),
    "unknown section": ("trian.steps=5", ["--set trian.steps=5:", "`train`"]),
    "out of range": ("train.steps=0", ["--set train.steps=0:", "from 1 to"]),
    "not YAML": ("train.steps=[1", ["--set train.steps=[1:", "not valid YAML"]),
}


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_bad_override(override, parts, tmp_path):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, "model: demo\n"), [override])
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_config_names_the_nearest_one(tmp_path):
    with pytest.raises(UserError, match=r"no such config file; .*recipe/configs/llama-3\.1-70b\.yaml"):
        load(tmp_path / "llama-31-70b.yaml")


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match="is a folder, expected a YAML file"):
        load(tmp_path)


def test_text_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("model: dämo".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        load(path)
