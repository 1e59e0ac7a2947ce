"""The plan against what real trainings of 8B and 70B shapes took on H200s; on a CPU: tests/long/test_plan_on_this_cpu.py."""

import copy
import json
from pathlib import Path

import pytest

from recipe.bench import planned

RECORD = json.loads((Path(__file__).parents[2] / "docs/plan_measured.json").read_text())
ROWS = {row["name"]: row for row in RECORD["results"]}


def test_the_record_spans_what_the_plan_promises():
    assert len(ROWS) >= 12
    assert {row["shape"] for row in ROWS.values()} == {"llama-3.1-8b", "llama-3.1-70b"}
    assert {row["ranks"] for row in ROWS.values()} == {1, 2}
    assert len({row["tokens"] for row in ROWS.values()}) >= 4
    assert len({row["placement"]["offload_layers"] for row in ROWS.values()}) >= 5


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_plan_is_as_near_as_it_promises(row):
    off = planned.deviations(row)
    assert abs(off["vram_gib"]) <= planned.MEMORY, off
    # Of two ranks it was measured when each gathered a checkpoint whole.
    assert ("host_gib" in off) == (row["ranks"] == 1)
    assert abs(off.get("host_gib", 0.0)) <= planned.MEMORY, off
    assert abs(off["step_seconds"]) <= planned.TIME, off


def test_gpu_memory_is_never_planned_below_what_is_taken():
    assert all(planned.deviations(row)["vram_gib"] >= 0 for row in ROWS.values())


def test_a_prediction_that_is_off_is_told():
    row = copy.deepcopy(next(iter(ROWS.values())))
    assert planned.met(row)
    row["measured"]["host_gib"] *= 1.05
    assert not planned.met(row)
    assert "**missed**" in planned.report({"results": [row]})


def test_the_table_in_the_docs_is_the_reports():
    text = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
    assert planned.report(RECORD).strip() in text
