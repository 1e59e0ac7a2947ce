"""Fifty SIGKILLs at random moments of one run, of one rank or of all: nothing is lost beyond the last checkpoint."""

from collections import Counter

import pytest

from tests.train.test_faults import assert_as_undisturbed, kill_at_random
from tests.train.tiny_run import jsonl, make_place, train

pytestmark = pytest.mark.slow

KILLS, STEPS = 50, 150


def test_killed_fifty_times_it_ends_as_if_nothing_had_happened(tmp_path, capsys):
    config = make_place(tmp_path, STEPS)
    code, _, err = train(config, "whole")
    assert code == 0, err
    hit = kill_at_random(config, "killed", KILLS, seed=50, steps=STEPS)
    runs = tmp_path / "runs"
    assert len(hit) == KILLS
    assert_as_undisturbed(runs / "killed", runs / "whole")
    at = Counter(
        event.get("phase", "start")
        for event in jsonl(runs / "killed/events.jsonl")
        if event["kind"] == "restarted"
    )
    with capsys.disabled():
        print(
            f"\n{KILLS} kills: {sum(hit)} of one rank (in {dict(at)}), {KILLS - sum(hit)} of all; the same bytes at the end"
        )
