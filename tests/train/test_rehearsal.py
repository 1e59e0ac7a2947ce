"""A rehearsal on two real ranks leaves everything as it was, to the bit, whatever it did meanwhile."""

import dataclasses
import os
import random

import numpy
import pytest
import torch

from recipe.train.rehearsal import rehearse, worst_row
from recipe.train.run import Run
from tests.data.preparing import micro_batches
from tests.engine.steps import LAYERS, LORA, ROWS
from tests.models import run_ranks
from tests.train.small_trainer import all_rows, small_trainer
from tests.train.tiny_run import jsonl

RATE = 0.3


def state_of(trainer):
    """All that the steps to come begin with."""
    adapters = trainer.engine.adapters
    return {
        "masters": adapters.masters.clone(),
        "gradients": adapters.gradients.clone(),
        "let go of": [p.grad is None for p in (adapters.flat, *adapters.parameters.values())],
        "optimizer": trainer.optimizer,
        "tokens": trainer.step_tokens,
        "torch's random state": torch.get_rng_state(),
        "numpy's": numpy.random.get_state()[1].tolist(),
        "Python's": random.getstate(),
    }


def rehearsed(mesh, folder, place, kernels):
    """The state before and after, and the largest gradient that the rehearsal itself has made."""
    os.environ["LOCAL_WORLD_SIZE"] = str(mesh.size())  # as a launcher sets it
    run = Run(place)
    trainer = small_trainer(
        mesh,
        folder,
        run,
        all_rows(),
        {"train": {"steps": 2}},
        kernels,
        dataclasses.replace(LORA, dropout=RATE),
        evaluates=True,
    )
    made = []
    clip = trainer.engine.adapters.clip

    def noting(norm):
        made.append(trainer.engine.adapters.gradients.abs().max().item())
        return clip(norm)

    trainer.engine.adapters.clip = noting
    before = state_of(trainer)
    rehearse(trainer, run, trainer.pulse, keep_checkpoints=1)
    return before, state_of(trainer), made


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_afterwards_all_is_as_it_was(nf4_model, tmp_path, kernels):
    folder = nf4_model(num_hidden_layers=LAYERS)
    for before, after, made in run_ranks(2, rehearsed, folder, tmp_path, kernels):
        assert len(made) == 1 and made[0] > 0, "a real backward"
        for name, value in before.items():
            same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
            assert same, name
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    (event,) = jsonl(tmp_path / "events.jsonl")
    longest = worst_row(micro_batches(all_rows()))
    assert (event["kind"], event["tokens"]) == ("rehearsed", sum(ROWS[longest])) and ROWS[longest] == [
        5,
        17,
        9,
    ]


def test_the_worst_row_has_most_tokens_and_then_the_longest_document():
    rows = [
        {"input_ids": [1] * sum(lengths), "labels": [1] * sum(lengths), "seq_lengths": lengths}
        for lengths in ([3, 3], [4, 2], [5], [2, 4])
    ]
    assert worst_row(micro_batches(rows)) == 1
