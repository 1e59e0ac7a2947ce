"""The loss of a step is the mean over all its tokens, however unevenly ranks and micro-batches have them: by the trainer."""

import os

import pytest

from recipe.train.run import Run
from tests.engine.steps import LAYERS, ROWS
from tests.models import run_ranks
from tests.train.small_trainer import all_rows, small_trainer

STEPS = 4
TOKENS = 32
TRAIN = {
    "steps": STEPS,
    "global_batch_tokens": TOKENS * len(ROWS),
    "learning_rate": 0.02,
    "scheduler": "constant",
    "max_grad_norm": 0.0,
}


def trained(mesh, folder, place, together):
    """The losses of a training whose rows have 8 to 31 tokens, and of which one has none in the loss.

    together: all of them are one row.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(mesh.size())  # as a launcher sets it
    tokens = TOKENS * (len(ROWS) if together else 1)
    packed = all_rows()
    if together:
        packed = [{key: [value for row in packed for value in row[key]] for key in packed[0]}]
    values = {"data": {"max_length": TOKENS}, "train": TRAIN | {"micro_batch_tokens": tokens}}
    trainer = small_trainer(mesh, folder, Run(place), packed, values)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_ranks_and_micro_batches_lose_as_one_process_with_one_row(nf4_model, tmp_path):
    """A step of 6 uneven micro-batches, 3 on each of two ranks or 2 on each of three: a mean of means would be another."""
    folder = nf4_model(num_hidden_layers=LAYERS)
    (expected,) = run_ranks(1, trained, folder, tmp_path, True)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.01, "each step counts"
    for world in (2, 3):
        assert run_ranks(world, trained, folder, tmp_path, False)[0] == pytest.approx(expected, abs=1e-4), (
            world
        )
