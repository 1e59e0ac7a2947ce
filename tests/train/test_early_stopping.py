"""Early stopping ends a run for good and alike on all ranks, and looking at held-out rows changes nothing of training."""

import json
import shutil

import pytest
import yaml

from recipe.errors import UserError
from recipe.settings import from_dict
from recipe.train.checkpoint import read_state
from tests.train.tiny_run import jsonl, make_place, train

STEPS, PATIENCE = 30, 2
ALIKE = {"learning_rate": 2e-2, "scheduler": "constant"}  # so that the number of steps changes no step


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config whose held-out rows get harder with each step, the run `early` that stopped, and where."""
    root = tmp_path_factory.mktemp("place")
    config = make_place(root, STEPS, eval_every=1, early_stopping=PATIENCE, deterministic=True, **ALIKE)
    row = [{"role": "user", "content": "number 1"}, {"role": "assistant", "content": "Ω≠ß QZ"}]
    (root / "eval.jsonl").write_text((json.dumps({"messages": row}) + "\n") * 4)
    values = yaml.safe_load(config.read_text())
    values["data"]["eval_path"] = str(root / "eval.jsonl")
    config.write_text(yaml.safe_dump(values))
    code, out, err = train(config, "early")
    assert code == 0, err
    return config, root / "runs" / "early", out, err


def end(run):
    return json.loads((run / "summary.json").read_text())


def evaluations(run):
    return [
        (event["step"], event["loss"])
        for event in jsonl(run / "events.jsonl")
        if event["kind"] == "evaluation"
    ]


def test_it_stops_after_that_many_evaluations_without_improvement(place):
    _, run, out, err = place
    summary = end(run)
    stopped = summary["steps"]
    assert summary["stopped_early"] is True and PATIENCE < stopped < STEPS
    inside = [loss for step, loss in evaluations(run) if step][:-1]  # the last one is that of the end
    best = inside.index(min(inside)) + 1
    assert stopped == best + PATIENCE == len(jsonl(run / "metrics.jsonl"))
    (event,) = [event for event in jsonl(run / "events.jsonl") if event["kind"] == "early_stop"]
    assert (event["step"], event["evaluations"], event["best_loss"]) == (stopped, PATIENCE, min(inside))
    assert event["message"] in err and "train.early_stopping" in event["message"]
    assert summary["checkpoint"] == f"step-{stopped:06d}"
    assert out.startswith(f"run early: {stopped} steps")
    assert summary["held_out_perplexity"] == pytest.approx(2.718281828459045 ** summary["held_out_loss"])
    saved = read_state(run / "checkpoints" / summary["checkpoint"])
    assert summary["adapters_sha256"] == saved["sha256"]["adapters.safetensors"]


@pytest.mark.parametrize("back", [0, 1], ids=["killed after the decision", "killed one step before"])
def test_the_count_survives_a_resume(back, place):
    """A run that was killed before its summary ends at the same step with the same bytes, and trains no step more."""
    config, early, _, _ = place
    stopped = end(early)["steps"]
    copy = early.with_name(f"resumed-{back}")
    shutil.copytree(early, copy)
    (copy / "summary.json").unlink()
    for step in range(stopped - back + 1, stopped + 1):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:06d}")
    code, _, err = train(config, copy.name)
    assert code == 0, err
    assert f"goes on from step-{stopped - back:06d}" in err
    assert end(copy) == end(early)


def test_evaluations_change_no_byte_of_training(place):
    """Without any on the way, without kernels that are deterministic by name, dropout on: the same adapters."""
    config, early, _, _ = place
    steps = end(early)["steps"]
    settings = [
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.early_stopping=0",
        "train.deterministic=false",
    ]
    code, _, err = train(config, "blind", *(word for one in settings for word in ("--set", one)))
    assert code == 0, err
    blind = early.with_name("blind")
    assert len(evaluations(blind)) == 2 < len(evaluations(early))
    assert end(blind)["adapters_sha256"] == end(early)["adapters_sha256"]
    assert end(blind)["stopped_early"] is False


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"train": {"early_stopping": 2}},
            ["train.early_stopping is 2", "train.eval_every is 0", "eval_every: 25"],
        ),
        (
            {
                "train": {"early_stopping": 2, "eval_every": 5},
                "data": {"path": "a.jsonl", "eval_fraction": 0},
            },
            ["train.early_stopping is 2", "no rows are held out", "data.eval_path"],
        ),
        ({"train": {"early_stopping": -1}}, ["train.early_stopping is `-1`", "from 0 to 1,000,000"]),
    ],
)
def test_settings_that_could_never_stop_are_refused(values, parts):
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert all(part in str(error.value) for part in parts)
