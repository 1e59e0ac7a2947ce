"""A merge is what PEFT's own is, to the bit; into the NF4 base it is one rounding off; nothing half-written, nothing wrong."""

import json
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from recipe.errors import UserError
from recipe.export.base import check_base
from recipe.export.merge import RECORD, write_merged
from recipe.export.tensors import Dequantised, Merged, Stored, Weighted
from recipe.files import read_json, write_json
from recipe.prepare import prepare
from recipe.settings import from_dict
from tests.dying import die_before_replace
from tests.models import PRELOADED, source_of, tiny_checkpoint, tiny_nf4

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


@pytest.fixture(scope="module")
def adapters(bf16, tmp_path_factory):
    return peft_folder(bf16, tmp_path_factory.mktemp("adapters") / "one")


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """Prepared from bf16, with double quantisation; of the same sizes as `bf16`, and the same weights."""
    return tiny_nf4(tmp_path_factory.mktemp("nf4"), dtype=torch.bfloat16)


@pytest.fixture
def copy(adapters, tmp_path):
    """Of the adapters, to be spoilt."""
    return shutil.copytree(adapters, tmp_path / "copy")


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
def test_a_merge_is_pefts_to_the_bit(model, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "recipe.export.tensors.BLOCK_VALUES", 64 * 64
    )  # the larger weights go through in parts
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **model)
    adapters = peft_folder(base, tmp_path / "adapters", **lora)
    expected = merged_by_peft(base, (adapters, 1.0))
    assert same_bits(Merged(Stored(base), [Weighted(adapters)]), expected)
    assert not same_bits(Merged(Stored(base), [Weighted(adapters, 1.01)]), expected)


def test_several_adapters_with_weights_are_merged_as_peft_does(bf16, tmp_path):
    """Each with its scaling, layers and tokens."""
    one = peft_folder(bf16, tmp_path / "one", trainable_token_indices=[12, 3])
    targets = ["q_proj", "down_proj"]
    other = peft_folder(
        bf16,
        tmp_path / "other",
        1,
        r=2,
        use_rslora=True,
        target_modules=targets,
        trainable_token_indices=[11],
    )
    weighted = [Weighted(one, 0.3), Weighted(other, -1.7)]
    expected = merged_by_peft(bf16, *((each.folder, each.weight) for each in weighted))
    assert same_bits(Merged(Stored(bf16), weighted), expected)
    assert not same_bits(Merged(Stored(bf16), weighted[::-1]), expected)  # each is rounded on its own


@pytest.mark.parametrize("quantised_by", ["prepare", "transformers, FP4, single"])
def test_the_quantised_base_is_what_bitsandbytes_dequantises(quantised_by, bf16, nf4, tmp_path):
    folder = nf4
    if quantised_by != "prepare":
        folder, fp4 = tmp_path / "fp4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        AutoModelForCausalLM.from_pretrained(bf16, quantization_config=fp4).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    tensors = Dequantised(folder)
    for name, parameter in model.named_parameters():
        if tensors.quantised(name):
            parameter.quant_state.dtype = torch.float32
            exact = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            fetched, cut = tensors.fetch(name), len(exact) // 2
            parts = [tensors.exact(fetched, 0, cut), tensors.exact(fetched, cut, len(exact))]
            assert torch.equal(torch.cat(parts), exact) and not torch.equal(exact, exact.bfloat16().float())
            assert torch.equal(tensors.read(name), exact.to(torch.bfloat16))
        else:
            assert torch.equal(tensors.read(name), parameter)
    assert set(tensors.names()) == {name for name, _ in model.named_parameters()}
    assert sum(tensors.quantised(name) for name in tensors.names()) == 14


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merge_into_the_nf4_base_is_rounded_once(double_quant, bf16, adapters, nf4, tmp_path):
    """To the value of bf16 that is nearest to the sum in fp64, or one that is as near in fp32."""
    if not double_quant:
        settings = {"model": {"id": str(bf16)}, "quantization": {"double_quant": False}}
        nf4 = prepare(from_dict(settings | {"paths": {"models": str(tmp_path)}})).folder
    base, weights = Dequantised(nf4), load_file(adapters / "adapter_model.safetensors")
    merged = Merged(base, [Weighted(adapters, 0.5)])
    for name in base.names():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if not base.quantised(name):
            assert torch.equal(merged.read(name), base.read(name))
            continue
        fetched = base.fetch(name)
        exact = base.exact(fetched, 0, base.shape(name)[0]).double()
        a, b = weights[f"{stem}.lora_A.weight"], weights[f"{stem}.lora_B.weight"]
        whole = exact + 0.5 * 8 / 4 * (b.double() @ a.double())
        found = merged.read(name)
        assert found.dtype == torch.bfloat16
        error = (found.double() - whole).abs()
        nearest = (whole.to(torch.float32).to(torch.bfloat16).double() - whole).abs()
        assert (error <= nearest + 1e-6).all()
        twice = (exact.to(torch.bfloat16).double() + whole - exact).to(torch.bfloat16).double()
        assert ((twice - whole).abs() > nearest + 1e-6).any()  # what a second rounding would cost


def test_the_merged_model_loads_in_transformers_and_answers_as_peft_does(bf16, adapters, tmp_path):
    folder = tmp_path / "merged"
    found = write_merged(Merged(Stored(bf16), [Weighted(adapters)]), folder, shard_bytes=100_000)
    assert len(found["files"]) == 4 and found["rates"]["source_bytes"] > 250_000
    assert {path.name for path in folder.iterdir()} == {
        *(f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)),
        *("model.safetensors.index.json", "config.json", "generation_config.json", RECORD),
    }
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32), adapters
    ).float()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, plain = tuned(ids).logits, tuned.base_model.model
        with tuned.disable_adapter():
            assert (plain(ids).logits - expected).abs().max() > 1
        assert (merged.float()(ids).logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_tied_model_stays_tied_and_an_nf4_one_becomes_plain(tmp_path):
    nf4 = tiny_nf4(tmp_path, tied=True, dtype=torch.bfloat16)
    adapters = peft_folder(source_of(nf4), tmp_path / "adapters", trainable_token_indices=[3])
    write_merged(Merged(Dequantised(nf4), [Weighted(adapters)]), tmp_path / "merged")
    assert not {"quantization_config", "torch_dtype"} & read_json(tmp_path / "merged/config.json").keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    rows = load_file(adapters / "adapter_model.safetensors")
    (name,) = (name for name in rows if "token" in name)
    assert torch.equal(merged.lm_head.weight[3], rows[name][0].bfloat16())
    assert "lm_head.weight" not in read_json(tmp_path / "merged/model.safetensors.index.json")["weight_map"]


def merge_and_die(base, adapters, target, before_replace):
    """In a process of its own."""
    die_before_replace(before_replace)
    write_merged(Merged(Stored(base), [Weighted(adapters)]), target, 100_000)


def killed(*args):
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(target=merge_and_die, args=args)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def contents(folder):
    """Everything but how long it took."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {RECORD: {k: v for k, v in read_json(folder / RECORD).items() if k != "rates"}}


@pytest.mark.parametrize("moment", [1, 4, 6, 11])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(moment, bf16, adapters, tmp_path):
    """One os.replace for each of four shards and one for the record (1 to 8), then index, config.json, record (11)."""
    source, target = Merged(Stored(bf16), [Weighted(adapters)]), tmp_path / "partial"
    assert killed(bf16, adapters, target, moment)
    done = {path: path.stat().st_mtime_ns for path in target.glob("model-*.safetensors")}
    recorded = read_json(target / RECORD)["files"] if (target / RECORD).exists() else {}
    assert (moment > 5) <= len(recorded) <= len(done) and (len(recorded) == 4) == (moment == 11)
    write_merged(source, target, 100_000)
    assert all(path.stat().st_mtime_ns == done[path] for path in done if path.name in recorded)
    write_merged(source, tmp_path / "undisturbed", 100_000)
    assert contents(target) == contents(tmp_path / "undisturbed")


def test_another_merge_never_goes_on_in_what_one_has_left(bf16, adapters, copy, tmp_path):
    assert killed(bf16, adapters, tmp_path / "partial", 6)
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: -values for name, values in weights.items()}, copy / "adapter_model.safetensors")
    for sources in ([Weighted(copy)], [Weighted(adapters, 2.0)], [Weighted(adapters)] * 2):
        source = Merged(Stored(bf16), sources)
        found = write_merged(source, tmp_path / "partial", 100_000)
        assert found["rates"]["source_bytes"] == sum(
            2 * torch.Size(source.shape(n)).numel() for n in source.names()
        )
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "partial")
        assert same_bits(source, written)


def refused(action, *parts):
    """One line that says it all."""
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line
    return True


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.gate"]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("use_something_of_tomorrow", True),
    ],
)
def test_what_peft_can_and_this_cannot_is_refused_by_name(setting, value, bf16, copy):
    config = copy / "adapter_config.json"
    write_json(config, read_json(config) | {setting: value})
    said = value if isinstance(value, str) else json.dumps(value)
    assert refused(lambda: Merged(Stored(bf16), [Weighted(copy)]), str(config), setting, said)


def without(part):
    return lambda tensors: {name: values for name, values in tensors.items() if part not in name}


def with_tensor(name, *shape):
    return lambda tensors: tensors | {f"base_model.model.model.{name}": torch.zeros(*shape)}


def infinite(tensors):
    next(iter(tensors.values()))[0, 0] = float("inf")
    return tensors


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            without("layers.1.mlp.up_proj.lora_B"),
            ["layers.1.mlp.up_proj.lora_A.weight stands without", "lora_B"],
        ),
        (
            without("layers.1.mlp.up_proj.lora_A"),
            ["layers.1.mlp.up_proj.lora_B.weight stands without", "lora_A"],
        ),
        (
            with_tensor("layers.2.mlp.up_proj.lora_A.weight", 4, 64),
            ["layers.2.mlp", "has no place", "another"],
        ),
        (with_tensor("embed_tokens.lora_embedding_A", 4, 512), ["lora_embedding_A", "no matrix of LoRA"]),
        (
            with_tensor("embed_tokens.token_adapter.trainable_tokens_delta", 1, 64),
            ["rows", "does not number"],
        ),
        (lambda tensors: {}, ["has no tensors"]),
    ],
)
def test_adapters_that_do_not_fit_the_base_are_refused(change, parts, bf16, copy):
    path = copy / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    assert refused(lambda: Merged(Stored(bf16), [Weighted(copy)]), str(path), *parts)


def test_adapters_of_another_model_are_refused(bf16, adapters, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", dtype=torch.bfloat16, intermediate_size=192)
    merge = lambda: Merged(Stored(other), [Weighted(adapters)])  # noqa: E731
    assert refused(merge, "adapter_model.safetensors", "mlp", "has shape", "192", str(other), "another model")


def test_other_bad_requests_are_one_line(bf16, adapters, copy, tmp_path, monkeypatch):
    base = Stored(bf16)
    assert refused(lambda: Merged(base, []), "nothing to merge")
    assert refused(lambda: Merged(base, [Weighted(adapters, float("nan"))]), str(adapters), "weight is nan")
    assert refused(lambda: Merged(base, [Weighted(tmp_path)]), "adapter_config.json", "no such file")
    rows = peft_folder(bf16, tmp_path / "rows", trainable_token_indices=[5])
    assert refused(lambda: Merged(base, [Weighted(rows)] * 2), "row 5 of model.embed_tokens.weight")
    path = copy / "adapter_model.safetensors"
    save_file(infinite(load_file(path)), path)
    assert refused(
        lambda: write_merged(Merged(base, [Weighted(copy)]), tmp_path / "x"), str(path), "NaN or inf"
    )
    path.unlink()
    assert refused(lambda: Merged(base, [Weighted(copy)]), str(copy), "has no adapter_model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    assert refused(lambda: write_merged(base, tmp_path / "y"), "0.0 GiB free", "the merged model")
    assert not (tmp_path / "y").exists()


def test_a_damaged_base_is_named(bf16, nf4, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(bf16)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    folder = shutil.copytree(tmp_path / "sharded", tmp_path / "cut")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    index = read_json(folder / "model.safetensors.index.json")
    os.truncate(second, second.stat().st_size - 1)
    assert refused(lambda: Stored(folder), str(second), "cut short")
    second.unlink()
    assert refused(lambda: Stored(folder), str(second), "is missing")
    shutil.copyfile(tmp_path / "sharded" / second.name, second)
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = first.name
    write_json(folder / "model.safetensors.index.json", index)
    assert refused(lambda: Stored(folder), str(first), "has no model.layers.7.mlp.up_proj.weight")
    assert refused(lambda: Stored(nf4), "quantised", "unquantised")
    assert refused(lambda: Dequantised(bf16), str(bf16), "no quantised weights")


def change_a_tensor(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_right_base_is_recognised_and_every_wrong_one_is_named(nf4, tmp_path):
    source = source_of(nf4)
    check_base(Stored(source), nf4)
    made_from = read_json(nf4 / "prepare.json")["source"]["name"]
    reseeded = tiny_checkpoint(tmp_path / "reseeded", dtype=torch.bfloat16, seed=1)
    assert refused(
        lambda: check_base(Stored(reseeded), nf4), str(reseeded), "wrong base or revision", made_from
    )
    smaller = tiny_checkpoint(tmp_path / "smaller", dtype=torch.bfloat16, num_hidden_layers=1)
    assert refused(lambda: check_base(Stored(smaller), nf4), "model.layers.1.", "is missing")
    larger = tiny_checkpoint(tmp_path / "larger", dtype=torch.bfloat16, num_hidden_layers=3)
    assert refused(lambda: check_base(Stored(larger), nf4), "model.layers.2.", "is not in the NF4 model")
    for number, (name, change, said) in enumerate(
        [
            ("model.layers.1.mlp.down_proj.weight", lambda w: w * 2, "has other scales (2.00"),
            ("model.layers.1.self_attn.k_proj.weight", lambda w: w + 0.01 * w.flip(0), "gives other 4-bit codes"),
            ("model.norm.weight", lambda w: w + 0.01, "has other values"),
            ("lm_head.weight", lambda w: w.flip(0), "has other values"),
            ("model.layers.0.mlp.up_proj.weight", lambda w: w.T, "has shape [64, 128], in the NF4 model [128, 64]"),
        ]
    ):  # fmt: skip
        other = shutil.copytree(source, tmp_path / str(number))
        change_a_tensor(other, name, change)
        assert refused(lambda other=other: check_base(Stored(other), nf4), str(other), name, said)
