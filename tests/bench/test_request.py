"""What is asked for, what comes of workers that end badly, and how results are shown; measures nothing."""

import collections
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from recipe import bench, cli
from recipe.bench import table
from recipe.bench.spec import Spec, nf4_model_gib
from recipe.plan.shapes import KNOWN
from tests.bench import bad_worker
from tests.bench.rows import a_document, a_row, a_spec

ROOT = Path(__file__).parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"
ON_CPU = ("bench", "--model-shape", "tiny", "--gpus", "0")
WIDTH = 100


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
    assert "ours 131072: offloaded_layers 46, kept x" in text
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
