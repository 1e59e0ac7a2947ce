"""`recipe bench` measures every variant for real, on two CPU ranks at a tiny shape, and says it in three forms."""

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from recipe import bench, cli
from recipe.bench import table
from recipe.bench.spec import TINY, Spec, nf4_model_gib
from recipe.plan.shapes import KNOWN
from tests.bench import bad_worker

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
    assert row["status"] == "measured" or (row["status"] == "not_implemented" and row["note"])


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


def a_row(**changes):
    """As a GPU gives it."""
    return {
        "variant": "ours",
        "status": "measured",
        "note": None,
        "tokens": 8192,
        "cap_gib": 22.5,
        "tokens_per_second": 1097.4,
        "tokens_per_second_min": 1080.2,
        "tokens_per_second_max": 1102.0,
        "seconds_per_micro_batch": 7.4651,
        "peak_allocated_gib": 21.52,
        "peak_reserved_gib": 21.71,
        "allocator_retries": 0,
        "host_ram_gib": 136.42,
        "gpu_utilisation_percent": 99.6,
        "matmul_tflops": 785.3,
        "share_of_roofline": 0.6,
        "profile": None,
        **changes,
    }


def a_document(*rows):
    return {
        "machine": {"gpus": ["NVIDIA H100 80GB <HBM3>"] * 2, "cpu": "x"},
        "versions": dict.fromkeys(("torch", "bitsandbytes", "peft", "transformers"), "2.11.0+cu130"),
        "model": {"name": "a & b", "layers": 80, "parameters": 70553706496, "flop_per_token": 4.24e11},
        "results": list(rows),
        "ratios": table.ratios(list(rows)),
    }


def test_rows_without_a_number_say_why_within_the_width():
    rows = [
        a_row(tokens=131072, tokens_per_second_max=123456.7),
        a_row(variant="article", tokens=1024, tokens_per_second=330.0),
        a_row(variant="fsdp_qlora", status="out_of_memory", note="asked for 1.96 GiB"),
        a_row(variant="trl", status="failed", note="ValueError: " + "long " * 80),
    ]
    text = table.render(a_document(*rows))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "out of memory: asked for 1.96 GiB (cap 22.5 GiB)" in text
    assert "failed: ValueError: long" in text
    assert "ours at 131072 tokens = 3.33 × article at 1024 tokens" in text
    texts = [
        t.text for t in xml.etree.ElementTree.fromstring(table.figure(a_document(*rows))).iter(f"{SVG}text")
    ]
    assert "a & b, 80 layers, 70.6 B parameters; 2 × NVIDIA H100 80GB <HBM3>" in texts
    assert "out of memory: asked for 1.96 GiB" in texts


def test_workers_that_come_to_a_bad_end_are_rows(monkeypatch, capsys):
    monkeypatch.setattr(bench, "WORKER", bad_worker.__name__)
    ends = (bad_worker.CRASHES, bad_worker.RUNS_OUT, bad_worker.IS_KILLED)
    code = cli.main([*ON_CPU, "--only", "ours", "--json", "--tokens", ",".join(map(str, ends))])
    out, err = capsys.readouterr()
    assert code == 1
    assert [(row["status"], row["note"]) for row in json.loads(out)["results"]] == [
        ("failed", "ValueError: so it is"),
        ("out_of_memory", "asked for 1.96 GiB"),
        ("failed", "a rank was killed by SIGKILL, often for lack of host RAM"),
    ]
    assert "Traceback (most recent call last):\nValueError: so it is" in err


def test_running_out_of_memory_is_a_result(monkeypatch, capsys):
    monkeypatch.setattr(
        bench, "measured", lambda spec, gpus: a_row(status="out_of_memory", note="asked for 2 GiB")
    )
    assert cli.main([*ON_CPU, "--only", "ours"]) == 0
    assert "out of memory: asked for 2 GiB" in capsys.readouterr().out


def test_a_worker_that_says_nothing_has_failed():
    assert bench.unsaid(0, collections.deque(["x"])) == "ended with 0 and without a result"
    assert bench.read_results(Path("no such file"), 2) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "two-cards"], "comes with a later version"),
        (["--suite", "other"], "two-cards"),
        (["--model-shape", "gpt-2"], "--model-shape is `gpt-2`"),
        (["--model-shape", "llama-3.1-8b"], "too many for a CPU"),
        (["--gpus", "99"], "--gpus is `99`, expected 0 to "),
        (["--gpus", "-1"], "--gpus is `-1`"),
        (["--against", "axolotl"], "--against: `axolotl` is not known"),
        (["--against", "none,trl"], "none alone"),
        (["--only", "theirs"], "--only: `theirs`"),
        (["--tokens", "many"], "--tokens is `many`"),
        (["--tokens", "1"], "at least 2"),
        (["--document-tokens", "0"], "--document-tokens is `0`"),
        (["--layers", "0"], "--layers is `0`"),
        (["--offload", "3"], "from 0 to 2"),
        (["--cap-gib", "nan"], "--cap-gib is `nan`"),
        (["--cap-gib", "0"], "--cap-gib is `0`"),
        (["--dropout", "1"], "--dropout is `1`"),
        (["--steps", "0"], "--steps is `0`"),
        (["--micro-batches", "0"], "--micro-batches is `0`"),
        (["--figure", "no/such/folder/x.svg"], "does not exist"),
        (["--figure", "x.png"], "expected the name of an .svg file"),
        (["--set", "lora.rank=8"], "bench reads no config"),
        (["--steps", "x"], "invalid int value"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("began to measure"))
    assert cli.main([*ON_CPU, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and named in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["ours 4096", "ours 8192", "article 1024", "fsdp_qlora 4096", "trl 4096", "trl 8192"]),
        (["--against", "none", "--tokens", "8,8"], ["ours 8"]),
        (["--against", "trl,article", "--tokens", "8"], ["ours 8", "trl 8", "article 1024"]),
        (["--only", "ours", "--tokens", "8"], ["ours 8"]),
        (["--only", "article"], ["article 1024"]),
    ],
)
def test_what_is_measured_is_what_was_asked_for(arguments, expected, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "measured", lambda spec, gpus: asked.append(spec) or a_row())
    assert cli.main([*ON_CPU, *arguments]) == 0
    assert [f"{spec.variant} {spec.tokens}" for spec in asked] == expected


def a_spec(**changes):
    values = {
        "variant": "trl",
        "model_shape": "x",
        "shape": TINY,
        "tokens": 100,
        "document_tokens": None,
        "cap_gib": 22.5,
        "gpus": 1,
        "ranks": 1,
        "offload": "auto",
        "dropout": 0.05,
        "steps": 1,
    }
    return Spec(**{**values, **changes})


def test_trl_is_skipped_where_it_cannot_be():
    assert a_spec().skip_reason() is None
    assert "asked for 2" in a_spec(gpus=2, ranks=2).skip_reason()
    assert a_spec(shape=KNOWN["llama-3.1-8b"]).skip_reason() is None
    assert "the cap is 22.5 GiB" in a_spec(shape=KNOWN["llama-3.1-70b"]).skip_reason()
    # 68.45 B weights of 4.13 bits, 2.1 B of 16 bits in embedding and head.
    assert nf4_model_gib(KNOWN["llama-3.1-70b"]) == pytest.approx(32.9 + 3.9, abs=0.1)


def test_a_spec_survives_its_file_and_knows_its_documents():
    spec = a_spec(document_tokens=40)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.document_lengths == [40, 40, 20]
    assert a_spec().document_lengths == a_spec(document_tokens=500).document_lengths == [100]


def test_the_parent_needs_no_torch():
    code = (
        "import sys; from recipe import bench; bench.measured = lambda *_: sys.exit('torch' in sys.modules); "
        "from recipe.cli import main; main(['bench', '--model-shape', 'tiny', '--gpus', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ)
    assert done.returncode == 0, done.stderr
