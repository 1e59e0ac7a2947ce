"""A run repeats itself from its manifest, byte for byte on a CPU; where it cannot, `recipe reproduce` says what differs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe import reproduce
from recipe.cli import main
from recipe.files import sha256_of
from recipe.train.checkpoint import _state_hash
from recipe.train.run import Run
from tests.train.tiny_run import PLAIN_STEPS, plain_run

LAST = f"step-{PLAIN_STEPS:06d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(plain_run(), folder / "plain")
    return folder


def call(runs, name, *more):
    return main(["reproduce", "--run", name, "--set", f"paths.runs={runs}", *more])


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def edit(run, change):
    values = manifest(run)
    change(values)
    (run / "manifest.json").write_text(json.dumps(values))


def test_a_run_is_repeated_to_the_byte(runs, capsys):
    assert call(runs, "plain", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err.startswith("nothing differs from what the run was made of\n")
    assert result["identical"] and result["identity_promised"] and result["differences"] == []
    assert result["steps"] == [PLAIN_STEPS, PLAIN_STEPS]
    assert result["weights"]["largest_difference"] == result["loss"]["largest_difference"] == 0
    files = [runs / name / "checkpoints" / LAST / "adapters.safetensors" for name in ("plain", "plain-again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert result["adapters_sha256"] == [sha256_of(file) for file in files]
    summary = json.loads((runs / "plain-again" / "summary.json").read_text())
    assert summary["adapters_sha256"] == result["adapters_sha256"][0]
    assert call(runs, "plain") == 0, "what was repeated is compared again, not trained again"
    out, err = capsys.readouterr()
    assert out.startswith("plain and plain-again: the same adapters, byte for byte")
    assert err == "run plain-again is finished: compared as it is\n"


DECIDING = {
    "data": (lambda m: m["data"].update(sha256="0" * 64), "data"),
    "model": (lambda m: m["model"]["sha256"].update({"config.json": "0" * 64}), "config.json"),
    "torch": (lambda m: m["versions"].update(torch="1.0"), "torch"),
    "ranks": (lambda m: m.update(world_size=3), "ranks"),
    "sources": (lambda m: m.update(sources_sha256="0" * 64), "sources"),
    "GPUs": (lambda m: m.update(gpus=["NVIDIA GeForce RTX 3090"]), "GPUs"),
    "threads": (lambda m: m.update(threads=99), "threads per rank"),
    "an old manifest": (lambda m: (m.pop("sources_sha256"), m.update(git_commit="0" * 40)), "git commit"),
}


@pytest.mark.parametrize(("change", "named"), DECIDING.values(), ids=DECIDING.keys())
def test_what_decides_the_result_is_refused(change, named, runs, capsys):
    run = runs / "other"
    shutil.copytree(plain_run(), run)
    try:
        edit(run, change)
        before = sorted(runs.rglob("*"))
        assert call(runs, "other") == 1
        out, err = capsys.readouterr()
        assert out == "" and sorted(runs.rglob("*")) == before
        table, error = err.splitlines()[:-1], err.splitlines()[-1]
        assert error.startswith(f"error: RUN=other: {named} differs from") and "--anyway" in error
        assert [line for line in table if line.endswith("(decides the result)")] == [table[1]]
        assert table[1].startswith(named)
    finally:
        shutil.rmtree(run)


def test_what_decides_nothing_is_only_said():
    then = manifest(plain_run())
    now = json.loads(json.dumps(then)) | {
        "kernel": "other",
        "git_commit": "1" * 40,
        "image_digest": "sha256:abc",
    }
    now["lock_sha256"] = dict.fromkeys(then["lock_sha256"], "0" * 64)
    now["model"]["folder"] = str(plain_run())
    found = reproduce.differences(then, now)
    assert {difference.what for difference in found} == {
        "kernel",
        "git commit",
        "image",
        *then["lock_sha256"],
    }
    assert not any(difference.decides for difference in found)
    reproduce.require_same(Run(plain_run()), found, anyway=False)
    table = reproduce.table(found).splitlines()
    assert len(table) == len(found) + 1 and "  1111111" in "".join(table) and "decides" not in "".join(table)


def test_adapters_that_differ_are_measured(runs, capsys, tmp_path):
    """On a CPU one bit is a failure; on GPUs, which promise none, it is stated, and losses must lie near each other."""
    for name in ("left", "left-again"):
        shutil.copytree(plain_run(), tmp_path / name)
    checkpoint = tmp_path / "left-again" / "checkpoints" / LAST
    tensors = load_file(checkpoint / "adapters.safetensors")
    name = sorted(tensors)[3]
    tensors[name][0, 0] += 0.25
    save_file(tensors, checkpoint / "adapters.safetensors", metadata={"format": "pt"})
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("state_sha256")
    state["sha256"]["adapters.safetensors"] = sha256_of(checkpoint / "adapters.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state | {"state_sha256": _state_hash(state)}))
    metrics = tmp_path / "left-again" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[6]["loss"] += 0.5
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(tmp_path, "left", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    norm = torch.cat(
        [t.flatten() for t in load_file(plain_run() / "checkpoints" / LAST / "adapters.safetensors").values()]
    )
    assert result["weights"]["tensor"] == name
    assert result["weights"]["largest_difference"] == pytest.approx(0.25, abs=1e-6)
    assert result["weights"]["relative_difference"] == pytest.approx(0.25 / norm.norm().item(), rel=1e-4)
    assert result["loss"] == {"largest_difference": pytest.approx(0.5), "first_differing_step": 7}
    assert call(tmp_path, "left") == 1
    out = capsys.readouterr().out
    assert "which should be the same bytes" in out and "from step 7 on" in out and name in out
    for run in ("left", "left-again"):
        edit(tmp_path / run, lambda m: m.update(gpus=["NVIDIA H200"]))
    assert call(tmp_path, "left") == 0, "held-out losses are the same"
    assert "as runs on GPUs do" in capsys.readouterr().out
    summary = tmp_path / "left-again" / "summary.json"
    values = json.loads(summary.read_text())
    summary.write_text(json.dumps(values | {"held_out_loss": values["held_out_loss"] * 1.1}))
    assert call(tmp_path, "left") == 1
    assert "by more than 1%" in capsys.readouterr().out


def test_an_unfinished_run_cannot_be_repeated(tmp_path, capsys):
    shutil.copytree(plain_run(), tmp_path / "plain")
    (tmp_path / "plain" / "summary.json").unlink()
    assert call(tmp_path, "plain") == 2
    assert "RUN=plain: is not finished" in capsys.readouterr().err
