"""Tensors go through in pieces and threads, and come out as bitsandbytes makes them of the whole tensor at once."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file

from recipe.errors import UserError
from recipe.files import read_json
from recipe.prepare import nf4, pipeline, prepare, rates
from recipe.prepare.entries import Entry
from recipe.prepare.header import read_header
from recipe.prepare.quantise import quantise
from recipe.prepare.shardfile import ShardFile
from recipe.prepare.source import Source
from recipe.settings import Quantization
from tests.models import tiny_checkpoint
from tests.prepare.fake_hub import settings_for


def whole(value, double_quant):
    """What the tensor becomes in one go, as transformers does it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=double_quant).to(
        device
    )
    state = {key: part.cpu() for key, part in weight.quant_state.as_dict(packed=True).items()}
    return {"": weight.data.cpu()} | {f".{key}": part for key, part in state.items()}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pieces_and_workers_change_no_bit(tmp_path, monkeypatch, dtype, double_quant):
    # Pieces in every order that four workers find; so many absmax that torch sums them in several threads.
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(nf4, "CPU_VALUES", 2**13)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    source = tiny_checkpoint(
        tmp_path / "tiny", dtype=dtype, hidden_size=512, intermediate_size=8192, num_hidden_layers=1
    )
    threads = torch.get_num_threads()
    quantise(Source(source, "tiny", None), tmp_path / "nf4", Quantization(double_quant=double_quant))
    assert torch.get_num_threads() == threads
    made = {k: v for path in (tmp_path / "nf4").glob("*.safetensors") for k, v in load_file(path).items()}
    checked = 0
    for name, value in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(made.pop(name), value)
            continue
        for suffix, expected in whole(value, double_quant).items():
            found = made.pop(name + suffix)
            assert found.dtype == expected.dtype and torch.equal(found, expected), name + suffix
        checked += 1
    assert checked == 7 and not made


def test_the_count_of_bounds_is_the_search_among_them():
    """Values on the bounds, beside them, tiny, zero and all of them: the code that bitsandbytes' CPU kernel finds."""
    code = get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    beside = [torch.nextafter(bounds, torch.full_like(bounds, far)) for far in (-2.0, 2.0)]
    special = torch.cat([bounds, *beside, code, torch.tensor([0.0, -0.0, 1.0])])[:64]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].float()
    every = every[: every.numel() // 64 * 64]
    random = torch.randn(2**20)
    tiny = torch.full((64,), 1e-45)
    for values in (special, special * 0.037, every, every.flip(0), random, random * 1e-30, tiny, tiny * 0):
        values = values[: values.numel() // 64 * 64].contiguous()
        packed, absmax = nf4.pack(values, Quantization())
        expected, state = quantize_4bit(values, blocksize=64, quant_type="nf4")
        assert torch.equal(packed, expected.reshape(-1)) and torch.equal(absmax, state.absmax)


def test_a_file_of_mixed_types_can_be_mapped_whatever_their_sizes(tmp_path):
    """Each tensor must begin at a multiple of its type's size, or torch refuses to view it."""
    values = {
        "c": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.arange(5, dtype=torch.float32),
        "a": torch.arange(7, dtype=torch.uint8),
        "d": torch.randn(3, 64),
    }
    entries = [Entry(name, tmp_path, tuple(v.shape), v.dtype, name == "d") for name, v in values.items()]
    file = ShardFile(tmp_path / "x.safetensors", entries, Quantization())
    for name in "abc":
        file.write(file.start_of(name), values[name])
    packed, absmax = nf4.pack(values["d"].reshape(-1), Quantization())
    file.write(file.start_of("d"), packed)
    state = nf4.state_of(absmax, (3, 64), torch.float32, Quantization())
    text = state.pop("quant_state.bitsandbytes__nf4").numpy().tobytes()
    for suffix, constant in state.items():
        file.write(file.start_of(f"d.{suffix}"), constant)
    size = file.close({"d.quant_state.bitsandbytes__nf4": text})
    assert size == (tmp_path / "x.safetensors").stat().st_size
    found = load_file(tmp_path / "x.safetensors")
    for name in "abc":
        assert torch.equal(found[name], values[name])
    assert all(t.start % t.dtype.itemsize == 0 for t in read_header(tmp_path / "x.safetensors"))
    assert set(found) == set(file.names())


def test_the_rates_are_recorded_and_said(tmp_path, capsys):
    from recipe.cli import main

    source = tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "c.yaml").write_text(f"model: {{id: {source}}}\npaths: {{models: {tmp_path / 'models'}}}\n")
    assert main(["prepare", "--config", str(tmp_path / "c.yaml")]) == 0
    total, stages = capsys.readouterr().out.splitlines()[-2:]
    assert total.startswith("quantised ") and "% of what the slowest stage, " in total
    assert stages.startswith("  per byte of the source: ") and "disk reads" in stages
    record = read_json(tmp_path / "models" / "tiny-nf4" / "prepare.json")["rates"]
    stages = record["stages"]
    assert set(stages) == {"disk reads", "quantisation", "second level", "writing", "hashing", "fsync"}
    tensors = load_file(source / "model.safetensors").values()
    assert record["source_bytes"] == stages["disk reads"]["bytes"] == sum(t.nbytes for t in tensors)
    slowest = stages[record["slowest"]]["busy_seconds"]
    assert slowest == max(stage["busy_seconds"] for stage in stages.values())
    assert record["share_of_slowest"] == pytest.approx(slowest / record["seconds"], abs=0.05)
    assert 0.1 < record["peak_ram_gib"] < 8
    assert main(["prepare", "--config", str(tmp_path / "c.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"] is None  # nothing was done


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, name, value):
    source = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[-7] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=f"{name} has NaN or infinite values, expected finite weights"
    ) as caught:
        prepare(settings_for(tmp_path, model=str(source)))
    assert str(source / "model.safetensors") in str(caught.value)
    assert not (tmp_path / "models" / "tiny-nf4").exists()


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    source = tiny_checkpoint(tmp_path / "tiny")
    real = os.pwrite

    def full(descriptor, content, start):
        if start > 100_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, content, start)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
        prepare(settings_for(tmp_path, model=str(source)))
    monkeypatch.setattr(os, "pwrite", real)
    assert prepare(settings_for(tmp_path, model=str(source))).fresh


def test_a_source_that_shrinks_meanwhile_is_said(tmp_path, monkeypatch):
    source = tiny_checkpoint(tmp_path / "tiny")
    real = Source.state_of

    def shrink(self, files):
        os.truncate(files[0], 300_000)
        return real(self, files)

    monkeypatch.setattr(Source, "state_of", shrink)
    with pytest.raises(UserError, match=r"model\.safetensors: is cut short in .*; fetch it again"):
        prepare(settings_for(tmp_path, model=str(source)))


def test_the_slowest_stage_is_the_one_that_works_longest():
    stages = [rates.Stage("read"), rates.Stage("quantise", "cpu", 2), rates.Stage("write")]
    for stage, busy, size in zip(stages, (1.0, 5.0, 0.5), (1000, 1000, 300), strict=True):
        stage.busy_seconds, stage.bytes = busy, size
    found = rates.summary(stages, 1000 * 2**20, 3.0, 2**30)
    assert found["slowest"] == "quantise" and found["share_of_slowest"] == pytest.approx(2.5 / 3, abs=1e-3)
    assert found["stages"]["quantise"]["source_mib_per_second"] == 400.0
    assert found["stages"]["write"]["source_mib_per_second"] == 2000.0  # per byte of the source
    assert "quantise 400 MiB/s (cpu)" in rates.render(found)


CHILD = """
    import json, os, sys, threading
    import torch, transformers, bitsandbytes
    from pathlib import Path
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # memory grows with the workers
    from recipe.prepare.quantise import quantise
    from recipe.hardware import resident_bytes
    from recipe.prepare.source import Source
    from recipe.settings import Quantization
    from transformers.models.llama import modeling_llama
    torch.randn(512, 512) @ torch.randn(512, 512)
    before, most, stop = resident_bytes(), 0, threading.Event()
    def sample():
        global most
        while not stop.wait(0.01):
            most = max(most, resident_bytes())
    thread = threading.Thread(target=sample); thread.start()
    rates = quantise(Source(Path(sys.argv[1]), "big", None), Path(sys.argv[2]), Quantization())
    stop.set(); thread.join()
    print(json.dumps({"grown": most - before, "peak": most, "share": rates["share_of_slowest"], "rates": rates}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_tensors_shards_or_the_model(tmp_path):
    """1.5 GB, a third of it the embedding: what is held at a time is pieces. One shard in memory would be 0.8 GB."""
    from safetensors.torch import save_file

    source = tiny_checkpoint(tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text())
    hidden, inter, vocab, layers = 2048, 8192, 65536, 6
    config |= {
        "hidden_size": hidden, "intermediate_size": inter, "vocab_size": vocab, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    block = torch.randn(2**20, dtype=torch.bfloat16) * 0.02
    tensors = {}

    def add(name, *shape):
        numel = torch.Size(shape).numel()
        tensors[name] = block.repeat(-(-numel // block.numel()))[:numel].reshape(shape)

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("gate_proj", "up_proj"):
            add(f"{prefix}.mlp.{name}.weight", inter, hidden)
        add(f"{prefix}.mlp.down_proj.weight", hidden, inter)
        for name, rows in (("q_proj", 2048), ("k_proj", 512), ("v_proj", 512), ("o_proj", 2048)):
            add(f"{prefix}.self_attn.{name}.weight", rows, hidden)
        add(f"{prefix}.input_layernorm.weight", hidden)
        add(f"{prefix}.post_attention_layernorm.weight", hidden)
    add("model.embed_tokens.weight", vocab, hidden)
    add("lm_head.weight", vocab, hidden)
    add("model.norm.weight", hidden)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert (source / "model.safetensors").stat().st_size > 1.2e9
    tensors.clear()

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(source), str(tmp_path / "nf4")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["grown"] < 300 * 2**20  # 840 with one output shard in memory
    assert found["peak"] < 4 * 2**30


def test_hashes_are_those_of_the_files(tmp_path):
    prepared = prepare(
        settings_for(tmp_path, model=str(tiny_checkpoint(tmp_path / "tiny", shard_size="200KB")))
    )
    for path in prepared.folder.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == prepared.hashes[path.name]
