"""What vLLM is asked to do with a run; tests/long/test_vllm.py gives the same words to a real vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from recipe.errors import UserError
from recipe.files import sha256_of
from recipe.serve import vllm
from recipe.serve.server import KEY_VARIABLE
from tests.train.tiny_run import ROOT, plain_run


@pytest.fixture
def run(tmp_path) -> Path:
    """A real finished run with an adapter's config beside it."""
    folder = tmp_path / "runs" / "first"
    shutil.copytree(plain_run(), folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "adapters").mkdir(exist_ok=True)
    change(folder / "adapters/adapter_config.json", r=12, rank_pattern={})
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def pairs(words: list[str]) -> dict[str, str]:
    return {word: value for word, value in pairwise(words) if word.startswith("--")}


def test_the_words_are_those_of_the_run(run):
    found = vllm.arguments(vllm.facts(run), gpus=2)
    model = Path(json.loads((run / "manifest.json").read_text())["model"]["folder"])
    assert found[0] == str(model.resolve()) and "--enable-lora" in found
    said = pairs(found)
    assert said["--lora-modules"] == f"first={run / 'adapters'}"
    assert said["--max-lora-rank"] == "16"  # the next that vLLM has
    assert said["--max-model-len"] == "512"  # all that the tiny model has
    assert (said["--tensor-parallel-size"], said["--pipeline-parallel-size"]) == ("1", "2")
    assert said["--quantization"] == said["--load-format"] == "bitsandbytes"
    assert said["--dtype"] == "bfloat16"  # the run's fp32 would halve the packed weights
    assert not [word for word in found if "key" in word]
    change(run / "adapters/adapter_config.json", rank_pattern={"q_proj": 40})
    assert pairs(vllm.arguments(vllm.facts(run), 1))["--max-lora-rank"] == "64"


def test_a_70b_fits_on_two_cards_of_24_gib_and_not_on_one(run):
    facts = vllm.Facts("x", run, run, 16, 4096, "bfloat16", weights_gib=37.1)
    vllm.require_memory(facts, [23.99, 23.99])
    for cards in ([23.99], [23.99, 15.7]):
        with pytest.raises(
            UserError, match=r"^RUN=x: \d GPUs with .* GiB for vLLM each, expected .* RUNTIME=host"
        ):
            vllm.require_memory(facts, cards)
    with pytest.raises(UserError, match="there is no NVIDIA GPU here"):
        vllm.require_memory(facts, [])


def test_what_vllm_cannot_serve_is_one_line(run):
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            vllm.arguments(vllm.facts(run), 1)
        return str(caught.value)

    config = run / "adapters/adapter_config.json"
    change(config, r=1024)
    assert refused() == "RUN=first: has adapters of rank 1024, expected at most 512 for vLLM"
    change(config, r=8, trainable_token_indices={"embed_tokens": [1]})
    assert "has learnt new tokens" in refused()
    config.unlink()
    assert refused() == "RUN=first: has no adapters; `make export-adapters RUN=first` first"
    (run / "summary.json").unlink()
    assert "is not finished" in refused()
    (run / "config.yaml").unlink()
    assert "no such run" in refused()


def test_any_python_can_ask_without_packages(run):
    """scripts/serving.py does, on a host that has only Docker."""
    command = [sys.executable, "-S", "-m", "recipe.serve.vllm", "--run", "first"]
    before = sha256_of(run / "config.yaml")
    done = subprocess.run(
        [*command, "--set", f"paths.runs={run.parent}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": ""},
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "vLLM: there is no NVIDIA GPU here\n")
    assert sha256_of(run / "config.yaml") == before


def test_the_key_is_the_environments_or_a_new_one(run, monkeypatch, capsys):
    monkeypatch.setattr(vllm, "require_memory", lambda *_: None)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    keys = set()
    for _ in range(2):
        assert vllm.main(["--run", "first", "--port", "8123", "--set", f"paths.runs={run.parent}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["port"] == 8123 and found["words"][1] == "--enable-lora" and len(found["key"]) >= 32
        keys.add(found["key"])
    assert len(keys) == 2
    monkeypatch.setenv(KEY_VARIABLE, "mine-mine")
    assert vllm.main(["--run", "first", "--set", f"paths.runs={run.parent}"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == "mine-mine"
