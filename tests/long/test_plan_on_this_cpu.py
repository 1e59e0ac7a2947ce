"""The plan of a training on this CPU, against the RAM that it takes."""

import json

from recipe.bench import planned
from recipe.cli import main


def test_a_training_on_this_cpu_takes_the_ram_that_was_planned(tmp_path, capsys):
    """Two settings, each a `recipe train` of its own; the report is written, and a second call has nothing left to do."""
    assert main(["bench", "--suite", "plan", "--gpus", "0", "--output", str(tmp_path / "found")]) == 0
    rows = json.loads((tmp_path / "found/plan.json").read_text())["results"]
    assert [row["ranks"] for row in rows] == [2, 1]
    assert all(abs(planned.deviations(row)["host_gib"]) <= planned.CPU_MEMORY for row in rows)
    assert (tmp_path / "found/report.md").read_text().count(" met |") == 2
    said = capsys.readouterr().err
    assert "1 of 2" in said and "2 of 2" in said
    assert main(["bench", "--suite", "plan", "--gpus", "0", "--output", str(tmp_path / "found")]) == 0
    assert "of 2" not in capsys.readouterr().err
