"""Merged models and GGUF files get their names only after another tool gave the same; what is wrong with them is caught."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from recipe.cli import main
from recipe.export import targets
from recipe.export.peftfolder import Weighted
from recipe.train.run import Run
from tests.export.finished import finished_run, tree
from tests.models import tiny_checkpoint


@pytest.fixture
def run(tmp_path):
    """A copy of the exported run to be used up."""
    shutil.copytree(finished_run(), tmp_path / "runs" / "good")
    return Run(tmp_path / "runs" / "good")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A copy that several tests export from, a kind each."""
    folder = tmp_path_factory.mktemp("runs") / "good"
    shutil.copytree(finished_run(), folder)
    return Run(folder)


def export(run, *options):
    return main(["export", "--run", run.name, "--set", f"paths.runs={run.folder.parent}", *options])


def exported(run, capsys, *options):
    assert export(run, *options, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(run, capsys, code, options, *parts):
    """One line, nothing printed, and nothing under a final name that was not there before."""
    before = {name: text for name, text in tree(run.folder).items() if "partial" not in name}
    assert export(run, *options) == code
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("error: ") and "Traceback" not in err
    assert all(part in line for part in parts), line
    assert tree(run.folder) == before


def test_into_the_unquantised_base_and_with_other_adapters(run, capsys):
    """Both are compared with plain PEFT doing the same, not with the trainer, whose loss is another."""
    shutil.copytree(run.folder, run.folder.with_name("other"))
    proof = exported(
        run, capsys, "--gguf", "f32", "--base", "bf16", "--weight", "0.5", "--with", "other=0.25"
    )
    loss = proof["held_out_loss"]
    assert Path(proof["folder"]).name == "gguf-f32-onto-bf16-weight-0.5-with-other-0.25"
    assert abs(loss["export"] - loss["reference"]) <= 1e-3
    assert loss["export"] > loss["trainer"] + 0.01, "three quarters of the update are not all of it"
    assert proof["answers"]["equal"] == 10
    assert "bf16 base" in loss["compared_with"]


def test_a_base_larger_than_memory_is_compared_less_closely_and_it_is_said(run, capsys, monkeypatch):
    monkeypatch.setattr(targets, "fits_in_memory", lambda folder, dtype: False)
    loss = exported(run, capsys, "--gguf", "f32", "--base", "bf16")["held_out_loss"]
    assert loss["reference"] == pytest.approx(loss["trainer"], abs=1e-4) and loss["tolerance"] > 0.1
    assert (
        1e-3 < abs(loss["export"] - loss["trainer"]) < 0.1 and "larger than memory" in loss["compared_with"]
    )


def without_rank_1(tensors, config):
    """accelerate PR 4206: all but rank 0's slice is lost."""
    for tensor in tensors.values():
        tensor[len(tensor) // 2 :] = 0


def a_and_b_swapped(tensors, config):
    for name in [name for name in tensors if "q_proj.lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()


def alpha_wrong(tensors, config):
    config["lora_alpha"] *= 2


@pytest.mark.parametrize("spoil", [without_rank_1, a_and_b_swapped, alpha_wrong])
def test_other_adapters_than_the_verified_ones_do_not_pass(spoil, run, tmp_path, capsys, monkeypatch):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(run.adapters, spoilt)
    tensors = load_file(spoilt / targets.WEIGHTS)
    config = json.loads((spoilt / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, spoilt / targets.WEIGHTS, metadata={"format": "pt"})
    (spoilt / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(targets.Job, "_adapters", lambda *_: Weighted(spoilt))
    refused(
        run, capsys, 1, ["--gguf", "f16"], "loaded with llama.cpp", "held-out loss", "nothing was exported"
    )


def test_a_lost_template_does_not_pass(run, tmp_path, capsys, monkeypatch):
    write = targets.write_gguf

    def without_template(source, tokenizer, *args, **kwargs):
        other = tmp_path / "tokenizer"
        shutil.copytree(tokenizer, other, ignore=shutil.ignore_patterns("*.jinja"))
        return write(source, other, *args, **kwargs)

    monkeypatch.setattr(targets, "write_gguf", without_template)
    refused(run, capsys, 1, ["--gguf", "f16"], "chat template is missing", "nothing was exported")


def test_a_truncated_shard_does_not_pass(run, capsys, monkeypatch):
    write = targets.write_merged

    def cut_off(source, partial):
        progress = write(source, partial)
        shard = next(partial.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1000])
        return progress

    monkeypatch.setattr(targets, "write_merged", cut_off)
    refused(run, capsys, 1, ["--merge"], "plain transformers cannot load it", "nothing was exported")


def test_a_base_of_another_revision_is_refused(run, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    refused(run, capsys, 2, ["--merge", "--base", str(other)], str(other), "has other values", "revision")


def test_damaged_adapters_or_those_of_another_model_are_refused(run, capsys):
    other = run.folder.with_name("other")
    shutil.copytree(run.folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["name"] = "another-model"
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(run, capsys, 2, ["--merge", "--with", "other"], "--with other", "another-model", "same model")
    weights = run.adapters / targets.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    refused(run, capsys, 2, ["--gguf", "f16"], str(weights), "hash differs", "--replace")


BAD = {
    "unknown quantisation": (["--gguf", "q3"], "--gguf q3", "expected one of", "q4_k_m"),
    "no such base": (["--merge", "--base", "/no/base"], "/no/base", "no such folder"),
    "weight of nothing": (["--weight", "2"], "--weight", "--merge or --gguf"),
    "weighted lora": (["--gguf-lora", "--gguf", "f16", "--weight", "2"], "--gguf-lora", "without --with"),
    "weight no number": (["--merge", "--with", "good=x"], "--with good=x", "no number"),
    "no such run": (["--merge", "--with", "nothing"], "RUN=nothing", "no such run"),
    "ollama without a file": (["--ollama"], "--ollama", "--gguf"),
    "public what": (["--public"], "--public", "--publish"),
    "exists": ([], "adapters", "exists already", "--replace"),
}


@pytest.mark.parametrize(("options", "parts"), [(o, p) for o, *p in BAD.values()], ids=BAD.keys())
def test_a_wrong_request_is_one_line(options, parts, shared, capsys):
    refused(shared, capsys, 2, options, *parts)


def test_no_room_and_what_is_there_already(run, capsys, monkeypatch):
    from types import SimpleNamespace

    (run.folder / "exports" / "merged-nf4").mkdir(parents=True)
    refused(run, capsys, 2, ["--merge"], "merged-nf4", "exists already", "--replace")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    refused(run, capsys, 2, ["--gguf", "q8_0"], "0.0 GiB free", "GGUF file good-Q8_0.gguf")


def test_a_model_that_is_not_the_one_trained_on_is_refused(run, capsys):
    manifest = json.loads(run.manifest.read_text())
    hashes = manifest["model"]["sha256"]
    hashes[next(name for name in hashes if name.endswith(".safetensors"))] = "0" * 64
    run.manifest.write_text(json.dumps(manifest))
    refused(run, capsys, 2, ["--merge"], "another than RUN=good was trained on", "hash differs")
