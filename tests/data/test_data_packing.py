"""Packing loses nothing, fills the slots, and gives ranks side by side as much to do; on any number of ranks the same."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from recipe.data.documents import Documents, Encoded, Writer
from recipe.data.pack import MicroBatches, Plan, WholeBatches, best_fit, planned
from recipe.data.rows import training_rows
from recipe.settings import load
from tests.data.preparing import micro_batches

# name: lengths, tokens per micro-batch, micro-batches per step. The demo's rows have 38 to 51 tokens: packed by best
# fit alone they would waste 8 % of 256.
GENERATOR = np.random.default_rng(0)
SETS = {
    "long-tailed": (np.clip(GENERATOR.lognormal(5, 1.2, 4000).astype(np.int64), 8, 2048), 2048, 16),
    "longer tail": (np.clip(GENERATOR.lognormal(5.5, 1.5, 20_000).astype(np.int64), 4, 4096), 4096, 8),
    "short": (GENERATOR.integers(10, 60, 60_000), 1024, 16),
    "few fit": (np.concatenate([GENERATOR.integers(38, 46, 250), GENERATOR.integers(46, 52, 50)]), 256, 2),
}


def spread(tokens, world):
    """How much less the emptiest of micro-batches side by side has than the fullest, for each group."""
    groups = tokens.reshape(-1, world)
    return 1 - groups.min(1) / groups.max(1)


@pytest.mark.parametrize("name", SETS)
def test_slots_are_used_and_ranks_have_as_much_to_do(name):
    lengths, tokens, per_step = SETS[name]
    plan = planned(np.arange(len(lengths)), lengths, tokens, seed=7)
    assert sorted(plan.order.tolist()) == list(range(len(lengths))), "each document once"
    filled = np.add.reduceat(lengths[plan.order], plan.starts[:-1])
    assert filled.max() <= tokens
    assert filled.sum() / (tokens * len(plan)) >= 0.97
    sampler = WholeBatches(len(plan), per_step, seed=7)
    for world in (2, per_step):
        for epoch in range(3):
            sampler.set_epoch(epoch)
            assert spread(filled[list(sampler)], world).max() <= 0.02, (world, epoch)


def test_the_demos_rows_fill_their_slots():
    """At the config that the demo is trained with; about as many tokens as its tokenizer makes (tests/test_demo.py has them)."""
    settings = load("recipe/configs/smollm2-135m.yaml")
    lengths = np.array([len(row.text.split()) * 13 // 12 + 18 for row in training_rows(settings.data)])
    plan = planned(np.arange(len(lengths)), lengths, settings.micro_batch_tokens, settings.train.seed)
    assert lengths.sum() / (len(plan) * settings.micro_batch_tokens) >= 0.97


def test_best_fit_takes_the_least_room_that_does():
    lengths = np.array([6, 5, 4, 3, 2])
    assert [sorted(lengths[bin].tolist()) for bin in best_fit(list(range(5)), lengths, 10)] == [
        [4, 6],
        [2, 3, 5],
    ]


def test_packing_is_the_same_for_a_seed_and_another_for_another():
    lengths = np.full(30, 40)
    once, again, other = (planned(np.arange(30), lengths, 128, seed).order.tolist() for seed in (7, 7, 8))
    assert once == again
    assert once != other


def test_of_nothing_there_are_no_micro_batches():
    plan = planned(np.zeros(0, np.uint32), np.zeros(0, np.int64), 128, seed=7)
    rows = MicroBatches(
        micro_batches([{"input_ids": [1], "labels": [1], "seq_lengths": [1]}]).documents, plan
    )
    assert len(rows) == 0 and list(rows) == [] and rows.tokens().tolist() == []


def test_a_row_is_made_of_its_documents():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]},
        {"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [2]},
    ]
    found = micro_batches(rows)
    assert [found[0], found[1]] == list(found) == rows
    assert found.tokens().tolist() == [5, 2] and found.longest().tolist() == [3, 2]


@pytest.mark.parametrize("count", [48, 50, 5, 3])
def test_an_epoch_is_whole_steps_that_are_the_same_on_any_number_of_ranks(count):
    """By accelerate's own way of dealing them out."""
    steps = []
    for world in (1, 2, 4):
        dealt = []
        for rank in range(world):
            sampler = WholeBatches(count, 4, seed=3)
            sampler.set_epoch(1)
            shard = BatchSamplerShard(
                BatchSampler(sampler, 1, drop_last=True), world, rank, even_batches=True
            )
            dealt.append([number for (number,) in shard])
        assert len({len(numbers) for numbers in dealt}) == 1, "all ranks have as many"
        steps.append(np.array(dealt).T.reshape(-1, 4).tolist())
    assert steps[0] == steps[1] == steps[2]
    seen = [number for step in steps[0] for number in step]
    assert set(seen) == set(range(count)), "nothing is left out"
    assert len(seen) == -(-count // 4) * 4 and max(map(seen.count, seen)) <= 2


def test_another_epoch_has_another_order_and_the_same_epoch_the_same():
    sampler = WholeBatches(100, 4, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert first == again != list(sampler)
    assert list(WholeBatches(100, 4, seed=4)) != first


def test_drawing_an_order_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    list(WholeBatches(100, 4, seed=3))
    planned(np.arange(30), np.full(30, 40), 128, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_a_pair_the_longer_answer_counts_as_document(tmp_path):
    """Both answers of a pair stay together, but neither attends to the other: the worst row is not that of the longest pair."""
    answers = [(5, 5), (2, 7), (9, 0)]
    documents = [
        (n, list(range(a + b)), list(range(a + b)), a if b else 0) for n, (a, b) in enumerate(answers)
    ]
    with Writer(tmp_path) as writer:
        writer.write(Encoded.of(documents), 0)
    rows = MicroBatches(
        Documents.open(tmp_path), Plan(np.array([0, 1, 2], np.uint32), np.array([0, 1, 2, 3]))
    )
    assert [row["seq_lengths"] for row in rows] == [[5, 5], [2, 7], [9]]
    assert rows.tokens().tolist() == [10, 9, 9] and rows.longest().tolist() == [5, 7, 9]
