"""What `recipe bench --suite two-cards` makes of what it finds; the whole of it is rehearsed in tests/long."""

from pathlib import Path

import pytest

from recipe import bench, cli
from recipe.bench import profile, suite
from recipe.bench.verdicts import verdicts
from tests.bench.rows import a_document, a_row

ROOT = Path(__file__).parent.parent.parent
REHEARSAL = ("bench", "--suite", "two-cards", "--gpus", "0", "--model-shape", "tiny", "--tokens", "64")


def a_suite(**changes):
    """The numbers of two cards that keep every promise."""
    classes = [{"class": "matmul", "ms": 5000.0, "share": 0.8, "alone_ms": 3000.0}]
    classes += [{"class": "nccl", "ms": 2000.0, "share": 0.2, "alone_ms": 60.0}]
    ours = a_row(
        tokens_per_second=2700.0,
        share_of_roofline=0.79,
        host_ram_gib=23.6,
        build_seconds=38.0,
        first_step_seconds=9.0,
        peak_reserved_gib=21.9,
        seconds_per_micro_batch=6.1,
        details={"offload_layers": 0, "planned_device_gib": 22.1, "planned_step_seconds": 5.9},
        profile={"step_ms": 6100.0, "kernels_ms": 7000.0, "busy_ms": 6000.0, "classes": classes, "top": []},
    )
    rows = [
        ours | changes.pop("ours", {}),
        a_row(variant="article", tokens_per_second=600.0),
        a_row(variant="fsdp_qlora", tokens_per_second=1300.0),
    ]
    hurt = {"exit_code": 1, "ranks_left": 0, "noticed_seconds": 21.0}
    of_one = {"loss": 13.3}
    return (
        a_document(*rows)
        | {
            "rehearsal": False,
            "disk": {"bytes_per_second": 1e9},
            "parity": {"bf16": [of_one, {"loss": 13.3, "worst": 0.03}]},
            "drill": {
                "killed": hurt,
                "stopped": hurt,
                "resumed": {"exit_code": 0, "each_step_once": True, "message": ""},
                "export": {
                    "exit_code": 0,
                    "message": "",
                    "held_out_loss": {"plain_peft": 1.0, "trainer": 1.0},
                },
            },
        }
        | changes
    )


def missed(document):
    return [verdict["what"] for verdict in verdicts(document) if not verdict["met"]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"ours": {"tokens_per_second": 2500.0}}, ["tokens/s", "over fsdp_qlora"]),
        ({"ours": {"host_ram_gib": 33.0}}, ["host RAM of the tree"]),
        ({"ours": {"peak_reserved_gib": 23.0}}, ["plan against measured, memory"]),
        ({"ours": {"seconds_per_micro_batch": 7.5}}, ["plan against measured, step"]),
        (
            {"disk": {"bytes_per_second": 4e9}, "ours": {"build_seconds": 60.0}},
            ["cold checkpoint to first step"],
        ),
        (
            {"parity": {"bf16": [{"loss": 13.3}, {"loss": 13.4, "worst": 0.05}]}},
            ["two ranks against one, bf16: loss", "two ranks against one, bf16: worst gradient"],
        ),
        ({"parity": {"bf16": [{"failed": "x"}, {}]}}, ["two ranks against one, bf16: loss, gradients"]),
        ({"drill": {"failed": "ended with 1"}}, ["drill"]),
    ],
)
def test_a_promise_that_is_not_kept_is_named(changes, named):
    assert missed(a_suite(**changes)) == named


def test_a_card_of_unknown_rate_has_no_time_to_judge():
    details = {"offload_layers": 0, "planned_device_gib": 22.1, "planned_step_seconds": None}
    found = [verdict["what"] for verdict in verdicts(a_suite(ours={"details": details}))]
    assert "plan against measured, memory" in found and "plan against measured, step" not in found


def test_an_ours_that_was_not_measured_is_a_promise_not_kept():
    document = a_suite(ours={"status": "failed"}, ratios=[])
    assert missed(document) == ["ours"]
    text = suite.report(document | {"stages": [], "verdicts": verdicts(document)})
    assert any(line.startswith("ours") and line.endswith("MISSED") for line in text.splitlines())


def test_a_class_is_alone_where_no_other_runs():
    spans = [
        ("nvjet_x", 0.0, 4000.0),
        ("ncclDevKernel_AllGather", 3000.0, 3000.0),
        ("nvjet_y", 5500.0, 500.0),
    ]
    assert profile.alone(spans) == {"matmul": pytest.approx(3.0), "nccl": pytest.approx(1.5)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "three-cards"], "--suite is `three-cards`, expected two-cards"),
        (["--only", "ours"], "--only cannot be given with --suite"),
        (["--tokens", "64,128"], "one whole number"),
        (["--micro-batches", "2"], "asked for --gpus 0 and --micro-batches 2"),
        (["--output", ""], "--suite needs --output FOLDER"),
        (["--output", "tests"], "expected a new or an empty folder"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments, named, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("began to measure"))
    monkeypatch.chdir(ROOT)
    assert cli.main([*REHEARSAL, "--output", str(tmp_path / "new"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not (tmp_path / "new").exists()
