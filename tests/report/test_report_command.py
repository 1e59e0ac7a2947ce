"""`recipe report` and `recipe compare` without a browser: states, missing and damaged files, long runs, wrong requests."""

import json
import re
import shutil

import pytest

from recipe.cli import main
from recipe.report import numbers, page
from recipe.report.read import read
from recipe.train.run import Run
from tests.report.conftest import on_two_gpus
from tests.train.tiny_run import jsonl


def call(capsys, *arguments):
    code = main([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_plan_is_kept_with_the_run_and_stands_beside_what_happened(runs, capsys):
    plan = json.loads((runs / "tracked/plan.json").read_text())
    assert (
        plan["world_size"] == 2
        and plan["host_parts"]
        and (runs / "tracked/plan.json").stat().st_size < 20_000
    )
    code, out, _ = call(capsys, "report", "--set", f"paths.runs={runs}", "--run", "tracked")
    text = (runs / "tracked/report.html").read_text()
    assert code == 0 and "tracked (finished)" in out and "host RAM of the ranks" in text
    without_scripts = re.sub(
        r"<script>.*?</script>", "", text, flags=re.DOTALL
    )  # bokeh's own words hold addresses
    assert len(without_scripts) < len(text) / 2 and not re.search(r"https?://", without_scripts)


@pytest.mark.parametrize(
    "name", ("manifest.json", "metrics.jsonl", "events.jsonl", "plan.json", "data/stats.json", "summary.json")
)
def test_a_file_that_is_missing_or_damaged_is_left_out(runs, name, capsys):
    file = runs / "tracked" / name
    for damage in (lambda: file.unlink(missing_ok=True), lambda: file.write_text("{no json\n[1]\n")):
        damage()
        code, _, err = call(capsys, "report", "--set", f"paths.runs={runs}", "--run", "tracked")
        assert (code, err) == (0, "")
    text = (runs / "tracked/report.html").read_text()
    assert f"{name}" in text and "left out of this report" in text


def test_a_run_of_an_earlier_version_gives_a_report(runs, capsys):
    run = runs / "tracked"
    for file in ("plan.json", "events.jsonl", "manifest.json"):
        (run / file).unlink()
    (run / "config.yaml").write_text(
        "model: {id: demo}\nold_section: {gone: 1}\ntrain: {steps: 12, forgotten: yes}\n"
    )
    code, _, err = call(capsys, "report", "--set", f"paths.runs={runs}", "--run", "tracked")
    assert (code, err) == (0, "")
    text = (run / "report.html").read_text()
    assert "earlier version" in text and "old_section.gone" in text and "train.forgotten" in text


def test_states(runs):
    run = Run(runs / "tracked")
    assert read(run).state == "finished"
    on_two_gpus(run.folder)
    assert read(run).state == "failed"
    lines = run.events.read_text().splitlines()
    run.events.write_text("\n".join(lines[:-1]) + "\n")
    assert read(run).state == "broken off"
    with run.locked():
        assert read(run).state == "running"
    run.event("stopped", "stopped at step 3 of 12")
    assert read(run).state == "stopped"


def test_a_long_run_makes_no_large_page_and_keeps_its_extremes(runs):
    run = runs / "tracked"
    on_two_gpus(run, 30_000)
    lines = jsonl(run / "metrics.jsonl")
    lines[17_123]["loss"], lines[21_456]["grad_norm"] = 99.0, 77.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read(Run(run))
    drawn = numbers.series(record)["steps"]
    by_step = {line["step"]: line for line in lines}
    assert len(drawn["step"]) <= numbers.MOST_POINTS + 1 and drawn["step"][-1] == 30_000
    assert all(by_step[step]["loss"] == loss for step, loss in zip(drawn["step"], drawn["loss"], strict=True))
    assert 99.0 in drawn["loss"] and 77.0 in drawn["grad_norm"]
    assert len(page.render(record).encode()) < 3e6


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["report"], "RUN= is not set"),
        (["report", "--run", "nobody"], "no such run"),
        (["report", "--run", "tracked", "--output", "{runs}"], "is a folder, expected a file name"),
        (["report", "--run", "tracked", "--output", "{runs}/none/x.html"], "cannot be written"),
        (["report", "--run", "tracked", "--watch", "--json"], "expected without --output and --json"),
        (["report", "--run", "tracked", "--watch", "--port", "70000"], "expected a free port"),
        (["compare", "tracked"], "two different runs"),
        (["compare", "tracked", "tracked"], "two different runs"),
        (["compare", "tracked", "nobody"], "no such run"),
    ],
)
def test_wrong_requests_end_in_one_line(runs, arguments, said, capsys):
    arguments = [word.format(runs=runs) for word in arguments]
    code, out, err = call(capsys, *arguments, "--set", f"paths.runs={runs}")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_compare(runs, capsys, tmp_path):
    shutil.copytree(runs / "tracked", runs / "other")
    on_two_gpus(runs / "other")
    config = (runs / "other/config.yaml").read_text()
    (runs / "other/config.yaml").write_text(config.replace("rank: 4", "rank: 8"))
    manifest = json.loads((runs / "other/manifest.json").read_text())
    manifest["git_commit"], manifest["data"]["sha256"] = "0" * 40, "1" * 64
    (runs / "other/manifest.json").write_text(json.dumps(manifest))
    where = ("--set", f"paths.runs={runs}")
    code, out, _ = call(capsys, "compare", "tracked", "other", "--json", *where)
    found = json.loads(out)
    assert code == 0 and [row["key"] for row in found["settings"]] == ["lora.rank"]
    assert found["settings"][0]["values"] == ["4", "8"]
    assert {row["key"] for row in found["manifest"]} == {"git_commit", "data.sha256", "gpus"}
    summary = json.loads((runs / "tracked/summary.json").read_text())
    first, second = found["runs"]
    assert first["held_out_last"] == summary["held_out_loss"] and second["state"] == "failed"
    assert first["last_loss"] == jsonl(runs / "tracked/metrics.jsonl")[-1]["loss"]
    code, out, _ = call(capsys, "compare", "tracked", "other", *where, "--output", tmp_path / "both.html")
    assert code == 0 and "lora.rank" in out and "held-out loss, last" in out
    assert (tmp_path / "both.html").stat().st_size < 3e6


def test_compare_of_a_run_with_itself_under_another_name_finds_no_difference(runs, capsys):
    shutil.copytree(runs / "tracked", runs / "other")
    code, out, _ = call(capsys, "compare", "tracked", "other", "--set", f"paths.runs={runs}")
    assert code == 0 and "Settings: no difference" in out and "Manifests: no difference" in out
