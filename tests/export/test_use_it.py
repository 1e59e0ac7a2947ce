"""The README's "Use it", command by command, on a run that was really trained."""

import io
import itertools
import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch

from recipe.cli import main
from recipe.export import plain
from recipe.export.plain import held_out_documents, load_plain, mean_loss
from recipe.files import sha256_of
from recipe.train.run import Run
from tests.train.tiny_run import ROOT, plain_run

COMMANDS = {"export-adapters": "export", "chat": "chat"}


def readme_commands():
    """(target, words of ARGS) of each line of the section's block."""
    section = (ROOT / "README.md").read_text().split("\n## Use it\n")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    found = []
    for line in block.splitlines():
        make, target, *words = shlex.split(line, comments=True)
        assert make == "make" and words[0] == "RUN=first"
        options = dict(word.split("=", 1) for word in words)
        found.append((target, shlex.split(options.get("ARGS", ""))))
    return found


def named(command):
    return " ".join([command[0], *command[1]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run `first`, which the commands are given in, in the README's order."""
    folder = tmp_path_factory.mktemp("use-it")
    shutil.copytree(plain_run(), folder / "runs" / "first")
    return folder


@pytest.mark.parametrize("command", [c for c in readme_commands() if c[0] in COMMANDS], ids=named)
def test_it_does_what_it_says(command, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("number 7\n/quit\n"))
    target, options = command
    words = [COMMANDS[target], "--run", "first", "--set", f"paths.runs={place / 'runs'}", *options]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "Traceback" not in err
    for option, value in itertools.pairwise([*options, ""]):
        if option == "--archive":
            file = place / value
            check = ["sha256sum", "-c", f"{file.name}.sha256"]
            subprocess.run(check, cwd=file.parent, check=True, capture_output=True)
        if option == "--ollama":
            assert f"ollama create {value}" in out
        if option == "--dry-run":
            assert "nothing was sent" in out


# What the commands above have left.


@pytest.fixture(scope="module")
def proofs(place):
    run = place / "runs" / "first"
    return {path.parent.name: json.loads(path.read_text()) for path in run.rglob("export.json")}


def test_each_export_has_a_proof(place, proofs):
    """Its tool's word, a hash for each of its files, a card."""
    run = place / "runs" / "first"
    assert proofs.keys() == {
        "adapters",
        "merged-nf4",
        "gguf-q4_k_m",
        "gguf-q8_0",
        "gguf-base-q8_0",
        "gguf-lora",
    }
    for name, proof in proofs.items():
        folder = run / name if name == "adapters" else run / "exports" / name
        assert proof["verified_by"].endswith("fresh process")
        assert {path.name for path in folder.iterdir()} == {*proof["sha256"], "export.json"}
        assert all(sha256_of(folder / file) == digest for file, digest in proof["sha256"].items())
        assert (folder / "README.md").read_text().startswith("---\n")


def test_the_merged_model_is_what_was_trained(place, proofs, monkeypatch):
    run, proof = Run(place / "runs" / "first"), proofs["merged-nf4"]
    loss, answers = proof["held_out_loss"], proof["answers"]
    assert abs(loss["export"] - loss["trainer"]) <= 1e-3
    assert loss["tolerance"] == pytest.approx(1e-3 * loss["reference"]), "a share of a loss above 1"
    assert answers["equal"] == answers["of"] == 10
    # Once more by hand, with nothing of the export's.
    folder = run.folder / "exports" / "merged-nf4"
    found = mean_loss(load_plain(folder, torch.float32, None), held_out_documents(run), 0)
    assert found == pytest.approx(loss["export"], abs=1e-6)
    # Where memory is too small its layers are read from the disk as they are needed: that changes nothing.
    monkeypatch.setattr(plain, "RAM_SHARE", 1e-9)
    read = load_plain(folder, torch.float32, None)
    assert read.hf_device_map == {"": "disk"}
    assert mean_loss(read, held_out_documents(run), 0) == found
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= proof["sha256"].keys()


def test_the_gguf_files_are_read_by_llama_cpp(proofs):
    assert {proofs[name]["verified_by"] for name in proofs if "gguf" in name} == {"llama.cpp, fresh process"}
    losses = {name: proof["held_out_loss"] for name, proof in proofs.items()}
    assert abs(losses["gguf-q8_0"]["export"] - losses["gguf-q8_0"]["trainer"]) <= 1e-2
    assert abs(losses["gguf-lora"]["export"] - losses["gguf-lora"]["trainer"]) <= 1e-2
    assert losses["gguf-base-q8_0"]["export"] > losses["gguf-lora"]["export"] + 1
    assert "Modelfile" in proofs["gguf-lora"]["sha256"]
    assert any("Q5_0 instead of Q4_K" in note for note in proofs["gguf-q4_k_m"]["notes"])


def test_the_section_leaves_out_no_target():
    assert {target for target, _ in readme_commands()} == {*COMMANDS, "serve"}  # serve: tests/serve
