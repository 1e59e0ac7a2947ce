"""A wrong request ends with exit code 2 and one line that says what, where and what was expected; nothing is touched."""

import platform
import shlex
import shutil
from types import SimpleNamespace

import pytest

from recipe.cli import main
from tests.models import tiny_checkpoint, tiny_nf4
from tests.spoiled import (
    ANSWER,
    USER,
    Place,
    a_nonsense_model_folder,
    broken_template,
    config,
    config_bytes,
    cut_weights,
    data_bytes,
    index_of_a_missing_shard,
    model_json,
    no_chat_template,
    nothing,
    prepared_file_cut,
    prepared_file_gone,
    rows,
    settings,
    strict_template,
    tensor_gone,
    tokenizer_without_eos,
    too_little_data,
    weights_of_another_model,
    without,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small unquantised checkpoint, to be copied."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    return tiny_nf4(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, checkpoint, quantised, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # it would try again for half a minute
    return Place(tmp_path, checkpoint, quantised)


TRAIN = "train --config config.yaml"
PREPARE = "prepare --config config.yaml"
PLAN = "plan --config config.yaml"

# name: (what is spoilt, command line, what the line must have)
CASES = {
    # the command line
    "no command": (nothing, "", ["COMMAND", "recipe --help"]),
    "unknown command": (nothing, "trian", ["recipe: ", "trian", "train", "recipe --help"]),
    "no config": (nothing, "train", ["recipe train: ", "--config", "required"]),
    "unknown flag": (nothing, f"{TRAIN} --fast", ["--fast", "--help"]),
    "flag without a value": (nothing, "train --config", ["--config", "expected one argument"]),
    "text for a number of GPUs": (nothing, f"{PLAN} --gpus two", ["--gpus", "'two'", "int"]),
    "--set without a value": (
        nothing,
        f"{TRAIN} --set train.steps",
        ["--set train.steps", "section.key=value"],
    ),
    "--set of an unknown key": (
        nothing,
        f"{TRAIN} --set train.stepz=1",
        ["--set train.stepz=1", "`train.stepz`", "`train.steps`"],
    ),
    "--set on a run": (
        nothing,
        "export --run finished --set lora.rank=4",
        ["--set lora.rank=4", "config.yaml"],
    ),
    # the config
    "config missing": (
        nothing,
        "train --config llama-3.1-8.yaml",
        ["llama-3.1-8.yaml", "no such", "llama-3.1-8b"],
    ),
    "config is a folder": (nothing, "train --config tiny", ["tiny: is a folder", "YAML file"]),
    "config is no YAML": (config("train: [1\n"), TRAIN, ["config.yaml:", "not valid YAML", "key: value"]),
    "config is not UTF-8": (config_bytes, TRAIN, ["config.yaml", "not UTF-8", "byte 8"]),
    "unknown section": (config("modle:\n  id: demo\n"), TRAIN, ["config.yaml:1", "`modle`", "`model`"]),
    "unknown key": (
        config("train:\n  learning_rte: 1\n"),
        TRAIN,
        ["config.yaml:2", "`train.learning_rte`", "`train.learning_rate`"],
    ),
    "wrong type": (
        config("lora:\n  rank: big\n"),
        TRAIN,
        ["config.yaml:2", "lora.rank is `big`", "whole number"],
    ),
    "out of range": (
        config("lora:\n  dropout: 2\n"),
        TRAIN,
        ["config.yaml:2", "lora.dropout is `2`", "0 to 0.9"],
    ),
    "key twice": (
        config("lora:\n  rank: 1\n  rank: 2\n"),
        TRAIN,
        ["config.yaml:3", "`lora.rank`", "twice", "line 2"],
    ),
    "batch that two ranks cannot share": (
        settings(train__global_batch_tokens=96),
        TRAIN,
        ["train.global_batch_tokens is 96", "multiple of 64", "2 ranks"],
    ),
    "fp16 on a CPU": (
        settings(compute__dtype="fp16"),
        TRAIN,
        ["compute.dtype is `fp16`", "auto, fp32 or bf16"],
    ),
    "attention that this CPU has not": (
        settings(compute__attention="varlen"),
        TRAIN,
        ["compute.attention is `varlen`", "needs a GPU", "sdpa"],
    ),
    "sums in fp16 of products that are not": (
        settings(compute__accumulate="fp16", compute__dtype="bf16"),
        TRAIN,
        ["compute.accumulate is `fp16`", "computes in bfloat16", "compute.dtype: fp16"],
    ),
    "more layers offloaded than there are": (
        settings(compute__offload_layers=99),
        PLAN,
        ["compute.offload_layers is 99", "the model has 2 layers", "0 to 2, or auto"],
    ),
    "more layers kept than there are": (
        settings(compute__keep_layers=99),
        TRAIN,
        ["compute.keep_layers is 99", "the model has 2 layers", "0 to 2, or auto"],
    ),
    # the data
    "data not set": (settings(data__path=None), TRAIN, ["data.path is not set", "DATA="]),
    "data missing": (
        settings(data__path="no.jsonl"),
        TRAIN,
        ["data.path is `no.jsonl`", "no such file", "JSONL"],
    ),
    "data given with --data missing": (
        nothing,
        f"{TRAIN} --data ünd😀.jsonl",
        ["`ünd😀.jsonl`", "no such file"],
    ),
    "data is a folder": (nothing, f"{TRAIN} --data tiny", ["`tiny`", "is a folder", "JSONL file"]),
    "data empty": (lambda place: place.data.write_text("\n\n"), TRAIN, ["data.jsonl", "has no rows"]),
    "data not UTF-8": (data_bytes, TRAIN, ["data.jsonl", "not UTF-8", "byte 11"]),
    "held-out data missing": (
        settings(data__eval_path="no.jsonl"),
        TRAIN,
        ["data.eval_path is `no.jsonl`", "no such"],
    ),
    "data set on a hub out of reach": (
        settings(data__path="nobody/nothing"),
        TRAIN,
        ["data.path is `nobody/nothing`", "hub", "network"],
    ),
    "row that is no JSON": (
        lambda place: place.data.write_text('{"text": "a"}\n{"text": \n'),
        TRAIN,
        ["data.jsonl:2", "not valid JSON", "column"],
    ),
    "row that is a list": (rows([1]), TRAIN, ["data.jsonl:2", "is list", "JSON object"]),
    "row of an unknown shape": (
        rows({"input": "a"}),
        TRAIN,
        ["data.jsonl:2", "keys input", "`messages`", "`text`"],
    ),
    "row without text": (rows({"text": " "}), TRAIN, ["data.jsonl:2", "text is empty", "expected text"]),
    "row with a number for text": (
        rows({"text": 5}),
        TRAIN,
        ["data.jsonl:2", "text is int", "expected text"],
    ),
    "row without an answer": (
        rows({"prompt": "a", "completion": ""}),
        TRAIN,
        ["data.jsonl:2", "completion is empty"],
    ),
    "row with half a character": (rows({"text": "a\ud800"}), TRAIN, ["data.jsonl:2", "surrogate", "Unicode"]),
    "no messages": (rows({"messages": []}), TRAIN, ["data.jsonl:2", "messages", "list of messages"]),
    "messages with a wrong role": (
        rows({"messages": [{"role": "human", "content": "a"}, ANSWER]}),
        TRAIN,
        ["data.jsonl:2", "messages[0]", "role `human`", "user, assistant"],
    ),
    "messages without content": (
        rows({"messages": [{"role": "user"}, ANSWER]}),
        TRAIN,
        ["data.jsonl:2", "`content`"],
    ),
    "messages without an answer": (
        rows({"messages": [USER]}),
        TRAIN,
        ["data.jsonl:2", "ends with the role `user`", "assistant"],
    ),
    "an answer to nothing": (
        rows({"messages": [ANSWER]}),
        TRAIN,
        ["data.jsonl:2", "messages[0]", "expected a user"],
    ),
    "row longer than max_length": (
        rows({"text": "x" * 99}, {"text": "y" * 50}),
        f"{TRAIN} --set data.eval_fraction=0",
        ["data.jsonl:2", "100 tokens", "2 of 3 rows", "data.max_length (32)", "data.overlong"],
    ),
    "less data than one step": (too_little_data, TRAIN, ["data.jsonl", "2 tokens in 1 rows", "64 tokens"]),
    "messages without a chat template": (
        no_chat_template,
        TRAIN,
        ["data.jsonl:1", "no chat template", "data.chat_template"],
    ),
    "chat template missing": (
        settings(data__chat_template="no.jinja"),
        TRAIN,
        ["data.chat_template is `no.jinja`", "no such file", "Jinja"],
    ),
    "chat template broken": (broken_template, TRAIN, ["data.jsonl:1", "chat template", "endfor"]),
    "chat template that refuses": (
        strict_template,
        TRAIN,
        ["data.jsonl:1", "chat template", "no system turns"],
    ),
    "tokenizer without EOS": (tokenizer_without_eos, TRAIN, ["tiny-nf4", "no EOS token", "`eos_token`"]),
    # the model
    "model not set": (settings(model__id=None), PREPARE, ["model.id", "hub id", "`demo`"]),
    "model folder missing": (
        settings(model__id="./no"),
        PREPARE,
        ["model.id is `./no`", "no such folder", "hub id"],
    ),
    "model folder empty": (a_nonsense_model_folder, PREPARE, ["tiny", "config.json is missing"]),
    "model without tokenizer": (without("tokenizer.json"), PREPARE, ["tiny", "tokenizer.json is missing"]),
    "model without weights": (
        without("model.safetensors"),
        PREPARE,
        ["tiny", "model.safetensors", "no weight files"],
    ),
    "model without a shard": (
        index_of_a_missing_shard,
        PREPARE,
        ["model-00002-of-00002.safetensors", "is missing"],
    ),
    "model cut short": (cut_weights, PREPARE, ["model.safetensors", "cut short or damaged", "again"]),
    "model without a tensor": (tensor_gone, PREPARE, ["tiny", "1 tensors are missing", "model.norm.weight"]),
    "weights of another model": (
        weights_of_another_model,
        PREPARE,
        ["has shape [", "expected [", "config.json"],
    ),
    "config.json is no JSON": (
        lambda place: (place.model / "config.json").write_text("{"),
        PREPARE,
        ["config.json", "not valid JSON"],
    ),
    "config.json is a list": (
        lambda place: (place.model / "config.json").write_text("[]"),
        PREPARE,
        ["config.json", "JSON object"],
    ),
    "prepared model without a file": (
        prepared_file_gone,
        TRAIN,
        ["tokenizer.json", "is missing", "make prepare"],
    ),
    "prepared model cut short": (
        prepared_file_cut,
        TRAIN,
        [".safetensors", "bytes, expected", "make prepare"],
    ),
    "mixture of experts": (
        model_json(
            "config.json", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8
        ),
        PREPARE,
        ["config.json", "MixtralForCausalLM", "mixture of experts", "dense"],
    ),
    "vision model": (
        model_json("config.json", model_type="mllama", architectures=["MllamaForConditionalGeneration"]),
        PREPARE,
        ["config.json", "MllamaForConditionalGeneration", "vision", "text model"],
    ),
    "another architecture": (
        model_json("config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        PREPARE,
        ["config.json", "GPT2LMHeadModel", "not supported", "Llama"],
    ),
    "quantised by another method": (
        model_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        PREPARE,
        ["config.json", "gptq", "unquantised"],
    ),
    "hub without network": (
        settings(model__id="nobody/llama-3.1-8b"),
        PREPARE,
        ["model.id is `nobody/llama-3.1-8b`", "hub could not be reached", "network"],
    ),
    # the run
    "run name that is a path": (nothing, f"{TRAIN} --run ../x", ["RUN=../x", "letters, digits"]),
    "run is finished": (nothing, f"{TRAIN} --run finished", ["RUN=finished", "finished already", "new name"]),
    "run has other settings": (
        nothing,
        f"{TRAIN} --run unfinished --set lora.rank=4",
        ["RUN=unfinished", "lora.rank was 16, is 4", "CONFIG="],
    ),
    "run name is something else's": (nothing, f"{TRAIN} --run no-run", ["no-run", "is no run", "new name"]),
    "export of no run": (nothing, "export", ["RUN= is not set", "finished", "unfinished"]),
    "eval of no run": (nothing, "eval", ["RUN= is not set", "finished"]),
    "chat with no run": (nothing, "chat", ["RUN= is not set", "finished"]),
    "export of an unknown run": (
        nothing,
        "export --run finnished",
        ["RUN=finnished", "no such run", "finished"],
    ),
    "export of a run from elsewhere": (
        nothing,
        "export --run finished --set paths.runs=nowhere",
        ["RUN=finished", "no such run in nowhere", "make train"],
    ),
    "export of an unfinished run": (
        nothing,
        "export --run unfinished",
        ["RUN=unfinished", "not finished", "make train"],
    ),
    "eval of an unfinished run": (nothing, "eval --run unfinished", ["RUN=unfinished", "no"]),
    "chat with an unfinished run": (
        nothing,
        "chat --run unfinished --once hi",
        ["RUN=unfinished", "not finished"],
    ),
    "export without its checkpoint": (
        nothing,
        "export --run finished",
        ["step-000002", "state.json", "damaged"],
    ),
    "chat with an empty question": (nothing, "chat --run finished --once ''", ["--once", "is empty"]),
}


@pytest.mark.parametrize(("spoil", "command", "parts"), CASES.values(), ids=CASES.keys())
def test_bad_input(spoil, command, parts, place, capsys):
    spoil(place)
    check(command, parts, place, capsys)


def check(command, parts, place, capsys):
    before = place.everything()
    code = main(shlex.split(command))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert place.everything() == before


def test_no_disk_space_for_the_model(place, capsys, monkeypatch):
    full = SimpleNamespace(total=2**40, used=2**40, free=2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    check(PREPARE, ["models/tiny-nf4", "0.0 GiB free", "expected", "paths.models"], place, capsys)


@pytest.mark.parametrize("command", [TRAIN, PREPARE, PLAN, "preflight --config config.yaml"])
@pytest.mark.parametrize(
    ("system", "machine", "parts"),
    [
        ("Darwin", "arm64", ["unsupported platform: macOS", "Linux or WSL2"]),
        ("Windows", "AMD64", ["unsupported platform: native Windows", "WSL2"]),
        ("FreeBSD", "amd64", ["unsupported platform: FreeBSD", "Linux"]),
        ("Linux", "riscv64", ["riscv64", "x86_64 or aarch64"]),
    ],
)
def test_unsupported_platform(system, machine, parts, command, place, capsys, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    check(command, parts, place, capsys)


def test_the_hub_switched_off(place, capsys, monkeypatch):
    """HF_HUB_OFFLINE is read when the library is imported: here its constant is set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place.set(model__id="nobody/llama-3.1-8b")
    check(PREPARE, ["model.id is `nobody/llama-3.1-8b`", "hub", "folder"], place, capsys)


def test_the_first_error_of_a_config_is_told_before_the_model_is_touched(place, capsys):
    """Quantising 70B takes an hour: what is wrong with the data is found before."""
    place.data.write_text("[]\n")
    check(TRAIN, ["data.jsonl:1", "is list"], place, capsys)
    assert not (place.root / "models").exists()
