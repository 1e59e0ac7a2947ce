"""The archive for an issue report says what happened, and holds nothing that is private."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from recipe.cli import main
from tests.train.tiny_run import ROOT

SECRETS = {
    "HF_TOKEN": "hf_" + "AbCdEfGhIjKlMnOpQr",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "MY_PASSWORD": "correct horse battery",
}
PRIVATE = [
    *SECRETS.values(),
    "hf_" + "ZyXwVuTsRqPoNmLkJi",
    "someone@example.org",
    "patient seven",
    "question of nobody's business",
    "/home/somebody",
    "10.20.30.40",
    "proxyuser:proxypass",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "node-of-somebody",
    "second-node",
    "signed-by-the-store",
    "diary.jsonl",
]
COMMIT = "0123456789" * 4


METRICS = '{"step": 1, "loss": 2.5, "tokens": 8123, "tokens_per_second": 512.25}\n'


@pytest.fixture
def runs(tmp_path):
    """A failed run with secrets in every file that it has."""
    run = tmp_path / "runs" / "private"
    (run / "data" / "train").mkdir(parents=True)
    (run / "data" / "train" / "rows.arrow").write_text("patient seven")
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"id": "/home/somebody/models/llama"},
                "data": {"path": "/home/somebody/diary.jsonl", "max_length": 64},
                "train": {"learning_rate": 0.001, "micro_batch_tokens": "auto"},
            }
        )
    )
    (run / "manifest.json").write_text(
        json.dumps(
            {
                "git_commit": COMMIT,
                "gpus": ["NVIDIA GeForce RTX 3090"],
                "versions": {"torch": "2.13.0"},
                "data": {"path": "patient seven", "system": "question of nobody's business"},
                "model": {"folder": "/home/somebody/models"},
            }
        )
    )
    error = f"GPU memory is full on rank 0 ({PRIVATE[3]}, {Path.home()}/x)"
    events = [
        {"time": 1.0, "kind": "begun", "message": "training to step 9"},
        {
            "time": 2.0,
            "kind": "error",
            "message": error,
            "cause": "out_of_memory",
            "exit_code": 1,
            "rank": 0,
            "host": "node-of-somebody",
        },
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.jsonl").write_text(METRICS)
    (run / "train.log").write_text(
        "\n".join(
            [
                f"HF_TOKEN={SECRETS['HF_TOKEN']} and {PRIVATE[3]}",
                "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
                f"wandb: logged in with {SECRETS['WANDB_API_KEY']}; {SECRETS['MY_PASSWORD']}",
                "  row 1 (12 tokens): patient seven, someone@example.org",
                '{"prompt": "question of nobody\'s business", "completion": "patient seven"}',
                "mail someone@example.org, host 10.20.30.40, http://proxyuser:proxypass@proxy:3128",
                '  File "/home/somebody/train.py", line 3, in main',
                "rank 0 on node-of-somebody; [c10d] The IPv6 network addresses of (second-node, 29500) cannot be retrieved",
                "  host      : second-node",
                "GET https://store.example/model?Policy=e30&Signature=signed-by-the-store~x_&Key-Pair-Id=K2",
                "data/diary.jsonl: 3 rows",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.",
            ]
        )
    )
    return run.parent


def bundle(runs, path, *more):
    command = ["doctor", "--run", "private", "--set", f"paths.runs={runs}", "--bundle", str(path), *more]
    return subprocess.run(
        [sys.executable, "-m", "recipe", *command],
        cwd=ROOT,
        env=os.environ | SECRETS,
        capture_output=True,
        text=True,
    )


def contents(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive}


def test_it_holds_what_helps_and_nothing_private(runs, tmp_path):
    path = tmp_path / "report.tar.gz"
    done = bundle(runs, path)
    assert done.returncode == 0, done.stderr
    held = contents(path)
    whole = "\n".join(held.values())
    for secret in [*PRIVATE, str(Path.home()) + "/", str(tmp_path)]:
        assert secret not in whole, secret
    assert set(held) == {
        f"doctor/{name}"
        for name in (
            "diagnosis.json",
            "manifest.json",
            "settings.json",
            "train.log",
            "events.jsonl",
            "metrics.jsonl",
        )
    }
    assert "CUDA out of memory. Tried to allocate 1.00 GiB" in held["doctor/train.log"]
    assert json.loads(held["doctor/settings.json"])["train"] == {
        "learning_rate": 0.001,
        "micro_batch_tokens": "auto",
    }
    manifest = json.loads(held["doctor/manifest.json"])
    assert (manifest["versions"], manifest["git_commit"]) == ({"torch": "2.13.0"}, COMMIT)
    assert held["doctor/metrics.jsonl"] == METRICS, "what was measured is no secret, whatever its name"
    assert json.loads(held["doctor/diagnosis.json"])["diagnoses"][0]["rule"].startswith(
        ("cuda_out", "out_of")
    )


def test_it_says_what_it_holds(runs, tmp_path):
    path = tmp_path / "report.tar.gz"
    done = bundle(runs, path, "--json")
    assert json.loads(done.stdout)["state"] == "failed", "standard output has the result alone"
    for name in contents(path):
        assert name.removeprefix("doctor/") in done.stderr


def test_a_file_is_never_overwritten(runs, tmp_path):
    path = tmp_path / "report.tar.gz"
    path.write_text("mine")
    done = bundle(runs, path)
    assert done.returncode == 2 and "exists already" in done.stderr and path.read_text() == "mine"
    done = bundle(runs, tmp_path / "report.zip")
    assert done.returncode == 2 and ".tar.gz" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_line_without_an_end_is_cleaned_in_no_time(runs, tmp_path):
    """Progress bars and encoded bytes make lines of megabytes; no pattern may look at the rest of one from each of its letters."""
    (runs / "private" / "train.log").write_text(
        "a" * 300_000 + "\n" + "a-" * 100_000 + "\n" + "ab.@token-" * 20_000
    )
    started = time.process_time()
    assert (
        main(
            ["doctor", "--run", "private", "--set", f"paths.runs={runs}", "--bundle", str(tmp_path / "x.tgz")]
        )
        == 0
    )
    assert time.process_time() - started < 5
