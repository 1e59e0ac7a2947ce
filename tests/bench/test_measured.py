"""The whole command on two CPU ranks at a tiny shape: every variant is measured for real, and said in three forms."""

import dataclasses
import json
import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from recipe.bench import table
from recipe.bench.spec import TINY

pytestmark = pytest.mark.slow  # four measurements, each in fresh processes that import everything

ROOT = Path(__file__).parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"
ON_CPU = ("bench", "--model-shape", "tiny", "--gpus", "0")
WIDTH = 100
ONE_LAYER = dataclasses.replace(TINY, layers=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(JSON document, figure, standard error) of one run of the whole command."""
    figure = tmp_path_factory.mktemp("bench") / "bars.svg"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "recipe", *ON_CPU, "--tokens", "64", "--document-tokens", "40"),
            *("--steps", "2", "--layers", "1", "--profile", "--json", "--figure", str(figure)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), figure.read_text(), done.stderr


def rows_of(measured, status="measured"):
    return {row["variant"]: row for row in measured[0]["results"] if row["status"] == status}


def test_every_emulation_is_measured_at_its_length_on_its_ranks(measured):
    found = {name: (row["tokens"], row["ranks"]) for name, row in rows_of(measured).items() if name != "ours"}
    assert found == {"article": (1024, 2), "fsdp_qlora": (4096, 2), "trl": (64, 1)}


def test_what_is_measured_is_plausible(measured):
    for row in rows_of(measured).values():
        tokens = row["tokens"] * row["ranks"]
        assert len(row["step_seconds"]) == 2 and all(seconds > 0 for seconds in row["step_seconds"])
        low, middle, high = (row[f"tokens_per_second{end}"] for end in ("_min", "", "_max"))
        assert low == pytest.approx(tokens / max(row["step_seconds"])) and low <= middle <= high
        assert row["seconds_per_micro_batch"] == pytest.approx(tokens / middle)
        # Each rank holds Python, torch and the libraries, and no tiny model takes more.
        assert 0.1 * row["ranks"] < row["host_ram_gib"] < 8
        assert row["host_ram_gib"] == pytest.approx(
            row["host_ram_anonymous_gib"] + row["host_ram_shared_gib"]
        )
        limit = row["ranks"] * row["matmul_tflops"] * 1e12 / (6 * ONE_LAYER.parameters)
        assert row["share_of_roofline"] == pytest.approx(middle / limit)
        assert row["dtype"] == "float32" and row["build_seconds"] > 0
        # Random weights know nothing: the loss is that of a guess.
        assert row["loss_first"] == pytest.approx(math.log(TINY.vocab), rel=0.1)
        # What only a GPU has.
        names = ("peak_allocated_gib", "peak_reserved_gib", "allocator_retries", "gpu_utilisation_percent")
        assert [row[name] for name in names] == [None] * 4


def test_the_profile_names_what_takes_the_time(measured):
    for row in rows_of(measured).values():
        profile = row["profile"]
        assert sum(entry["share"] for entry in profile["classes"]) == pytest.approx(1)
        assert all(
            entry["ms"] > 0 for entry in profile["classes"] if entry["class"] in ("matmul", "attention")
        )
        assert 0 < len(profile["top"]) <= 25
        shares = [entry["share"] for entry in profile["top"]]
        assert shares == sorted(shares, reverse=True)


def test_the_document_says_what_ran_where(measured):
    document = measured[0]
    assert document["command"].startswith("recipe bench --model-shape tiny")
    assert document["machine"]["gpus"] == [] and document["machine"]["cores"] >= 1
    assert all(document["versions"][name] for name in ("python", "torch", "bitsandbytes", "transformers"))
    assert document["model"]["parameters"] == ONE_LAYER.parameters
    others = [ratio["against"] for ratio in document["ratios"]]
    assert others == (["article", "fsdp_qlora", "trl"] if "ours" in rows_of(measured) else [])


def test_ours_has_a_row(measured):
    """A number where the engine is wired in, else the reason."""
    (row,) = (row for row in measured[0]["results"] if row["variant"] == "ours")
    assert row["status"] == "measured"


def test_progress_goes_to_standard_error(measured):
    assert "bench: article 1024: built in " in measured[2] and "bench: trl 64: step 4 of 4" in measured[2]


def test_the_table_is_at_most_100_columns_wide(measured):
    lines = table.render(measured[0]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    for name, row in rows_of(measured).items():
        assert any(line.startswith(name) and f" {row['tokens']} " in line for line in lines)


def test_the_figure_is_well_formed_and_has_a_bar_for_each_number(measured):
    root = xml.etree.ElementTree.fromstring(measured[1])
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text.startswith("Tokens per second")
    bars = root.findall(f"{SVG}rect")[1:]  # the first is the ground
    rows = list(rows_of(measured).values())
    assert len(bars) == len(rows)
    lengths = [
        float(bar.get("width")) / row["tokens_per_second"] for bar, row in zip(bars, rows, strict=True)
    ]
    assert max(lengths) == pytest.approx(min(lengths), rel=0.01, abs=1e-3)
    width = float(root.get("width"))
    assert all(float(bar.get("x")) + float(bar.get("width")) < width for bar in bars)
