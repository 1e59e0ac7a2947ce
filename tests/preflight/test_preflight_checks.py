"""Preflight as a whole: a healthy machine passes, groups and order, text and JSON, quick is quick, and no GPU is said."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe import preflight
from recipe.preflight.check import Check
from tests.preflight.situation import GOOD, context

__all__ = ["context"]  # of tests elsewhere, too

ROOT = Path(__file__).parents[2]


def test_a_healthy_machine_gives_ok_or_skip_for_every_check(tmp_path, monkeypatch):
    monkeypatch.delenv("RECIPE_IMAGE_DIGEST", raising=False)
    (tmp_path / "template.jinja").touch()
    made = context(
        data={"path": "demo", "chat_template": str(tmp_path / "template.jinja")},
        paths={"runs": str(tmp_path)},
    )
    # Whether there is room, a token and a hub depends on where the test runs; versions on which lock was installed.
    result = [c for c in preflight.run_checks(made) if c.name not in ("disk", "hub", "hub token", "versions")]
    assert [check for check in result if check.status not in ("ok", "skip")] == []
    assert {check.name for check in result if check.status == "skip"} <= {"model", "driver"}
    assert len(result) > 40 and len({check.name for check in result}) == len(result)
    assert all(check.found and (check.expected or check.name == "bf16") for check in result)


def test_every_check_belongs_to_a_group_and_has_its_unit():
    result = preflight.run_checks(context())
    groups = [check.group for check in result]
    assert sorted(set(groups), key=groups.index) == ["host", "gpu", "link", "software", "data"]
    assert all(isinstance(check.measured, int | float) for check in result if check.unit)


def test_run_checks_asks_about_gpus_only_where_there_are_some():
    there = {check.name for check in preflight.run_checks(context())}
    without = {check.name for check in preflight.run_checks(context({"gpus": []}))}
    assert without < there
    assert {"gpu count", "driver", "temperature", "loaded in step", "p2p copies", "nvlink"} <= there - without
    assert {"gpu", "all-reduce", "torch"} <= without


@pytest.mark.parametrize(
    ("gpus", "sees", "quick", "reason"),
    [
        (2, 2, True, "not measured with --quick"),
        (1, 1, False, "one rank has nobody to talk to"),
        (2, 1, False, "torch does not see the GPUs of this run"),
    ],
)
def test_ranks_are_not_started_in_vain(gpus, sees, quick, reason):
    made = dataclasses.replace(context({"gpus": GOOD.gpus[:gpus]}), quick=quick)
    made.__dict__["stack"] = {"torch": "2.13.0", "gpus": sees}
    assert made.ranks == {"skipped": reason}


def test_a_torch_that_does_not_start_measures_nothing():
    made = dataclasses.replace(context())
    made.__dict__["stack"] = {"torch_error": "ImportError: libcudart"}
    for name in ("ranks", "copies", "peers", "load"):
        assert getattr(made, name) == {"skipped": "torch does not start"}


def test_text_and_json():
    checks = [
        Check("ram", "ok", "64 GiB of a very long story " * 9, measured=64.0, unit="GiB", group="host"),
        Check("swap", "warn", "none", "some", "add swap", group="host"),
        Check("disk", "fail", "1 GiB free " * 12, "100 GiB", "free some", group="host"),
        Check("model", "skip", "not there yet", group="data"),
    ]
    text = preflight.render(checks)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "host" and lines[1].startswith("  ok    ram ") and lines[1].endswith("…")
    assert "\n\ndata\n  skip  model " in text
    assert "        what to do          free some" in text
    assert text.endswith("not ready: 1 ok, 1 warnings, 1 failed, 1 skipped\n")
    assert preflight.failed(checks) and not preflight.failed(checks[:2])
    found = json.loads(json.dumps(preflight.to_dict(checks)))
    assert found["ok"] is False and found["checks"][1]["remedy"] == "add swap"
    assert found["checks"][0] == {
        "name": "ram", "status": "ok", "found": checks[0].found, "expected": "", "remedy": "", "measured": 64.0,
        "unit": "GiB", "group": "host",
    }  # fmt: skip


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    config = ROOT / "recipe/configs/smollm2-135m.yaml"
    return subprocess.run(
        [sys.executable, "-m", "recipe", "preflight", "--config", str(config), *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_quick_is_quick_and_imports_no_torch(tmp_path):
    started = time.monotonic()
    done = command("--quick", "--json", cwd=tmp_path)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    names = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert names["torch"] == names["all-reduce"] == names["disk speed"] == "skip"
    assert "preflight:" not in done.stderr and seconds < 5
    code = "import recipe.preflight, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_a_gpu_it_exits_by_the_configs_need(tmp_path):
    large = command("--quick", "--set", "model.id=meta-llama/Llama-3.1-70B", cwd=tmp_path, PATH=str(tmp_path))
    assert large.returncode == 1 and "FAIL  gpu                 no GPU" in large.stdout, (
        large.stdout + large.stderr
    )
    small = command("--quick", cwd=tmp_path, PATH=str(tmp_path))
    assert (
        small.returncode == 0
        and "ok    gpu                 no GPU; this config runs on the CPU" in small.stdout
    )


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine(tmp_path):
    """CPU ranks for real: collectives, the sharded step, NF4, the disk, the demo's rows; progress on standard error."""
    done = command("--json", "--data", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in (
        "torch",
        "bitsandbytes",
        "all-reduce",
        "all-gather",
        "sharded step",
        "disk speed",
        "data",
        "row lengths",
    ):
        assert checks[name]["status"] in ("ok", "warn"), checks[name]
    assert checks["all-reduce"]["measured"] > 0 and checks["all-reduce"]["unit"] == "GiB/s"
    assert done.stderr.count("preflight: ") == 4
    assert not list(tmp_path.glob("**/.preflight-*")), "scratch files stay"
