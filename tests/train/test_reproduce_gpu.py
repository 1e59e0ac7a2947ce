"""On an NVIDIA GPU: train.deterministic gives the same bytes again, and how far two runs without it lie apart.

make test ARGS="-m gpu tests/train/test_reproduce_gpu.py"

It writes what it measured to reproduce-gpu.json in $OUT, or beside the runs: the spread, and the cost of determinism.
The model has the demo's shape with random weights, so that no hub and no package is asked for it.
"""

import json
import os
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from recipe import reproduce
from recipe.cli import main
from recipe.train.run import Run
from tests.models import tiny_checkpoint
from tests.train.tiny_run import jsonl, make_place, train

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
STEPS = 20
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
PHRASE = "the answer is yes or no, and hello world "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    config = make_place(root, STEPS, save_every=STEPS, global_batch_tokens=8192, micro_batch_tokens=4096)
    tiny_checkpoint(root / "demo-shaped", **SHAPE)
    rows = [
        # Documents so long go to cuDNN on a data-centre card, unless they must be deterministic.
        {"prompt": f"number {n}: " + PHRASE * (60 + n % 60), "completion": PHRASE * 20}
        for n in range(300)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = yaml.safe_load(config.read_text())
    values["model"]["id"] = str(root / "demo-shaped")
    values["data"]["max_length"] = 4096
    values["lora"] = {"rank": 16, "alpha": 16, "dropout": 0.05}
    config.write_text(yaml.safe_dump(values))
    return config


def trained(config, name, deterministic):
    code, _, err = train(config, name, "--set", f"train.deterministic={str(deterministic).lower()}")
    assert code == 0, err
    return Run(config.parent / "runs" / name)


def seconds(run):
    """Of a step, without the first ones, which compile."""
    return statistics.median(line["step_seconds"] for line in jsonl(run.metrics)[STEPS // 2 :])


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_the_same_bytes_again(attention, place, capsys):
    settings = yaml.safe_load(place.read_text())
    settings["compute"] = {"attention": attention}
    place.write_text(yaml.safe_dump(settings))
    found = {"gpu": torch.cuda.get_device_name(), "attention": attention, "torch": torch.__version__}
    for deterministic in (True, False):
        name = f"{attention}-{'deterministic' if deterministic else 'free'}"
        runs = [trained(place, name, deterministic), trained(place, f"{name}-again", deterministic)]
        result = reproduce.compare(*runs)
        found["deterministic" if deterministic else "free"] = {
            "identical": result["identical"],
            "largest_loss_difference": result["loss"]["largest_difference"],
            "first_differing_step": result["loss"]["first_differing_step"],
            "held_out_loss": result["held_out_loss"],
            "weights": result["weights"],
            "step_seconds": [seconds(run) for run in runs],
        }
    cost = min(found["deterministic"]["step_seconds"]) / min(found["free"]["step_seconds"]) - 1
    found["cost_of_determinism"] = round(cost, 4)
    out = Path(os.environ.get("OUT") or place.parent) / f"reproduce-gpu-{attention}.json"
    out.write_text(json.dumps(found, indent=2) + "\n")
    with capsys.disabled():
        print(f"\n{json.dumps(found)}\n", flush=True)
    assert found["deterministic"]["identical"], found
    losses = found["free"]["held_out_loss"]
    assert abs(losses[0] - losses[1]) <= reproduce.GPU_TOLERANCE * losses[0], found


def test_recipe_reproduce_on_a_gpu(place, capsys):
    """The command, on a run that promises its bytes."""
    run = trained(place, "promised", True)
    capsys.readouterr()
    assert main(["reproduce", "--run", run.name, "--set", f"paths.runs={run.folder.parent}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
