"""Which paths outside the checkout a container sees: those that an argument or the config names, and only as far as needed."""

import os
from pathlib import Path

import pytest
import run
from setup import SetupError

ME = os.getuid(), os.getgid()


@pytest.fixture
def places(tmp_path):
    """A checkout, and files and folders outside of it."""
    for name in ("checkout/recipe", "out/models", "out/data set"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("checkout/in.jsonl", "out/rows.jsonl", "out/data set/a.jsonl", "out/other"):
        (tmp_path / name).touch()
    return tmp_path


def outside(places, *arguments):
    root, out = places / "checkout", f"{places}/out"
    found = run.outside_paths(
        [a.replace("OUT", out).replace("ROOT", str(root)) for a in arguments], *ME, root
    )
    return [(path.replace(out, "OUT"), writable) for path, writable in found]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "OUT/rows.jsonl"], ["OUT/rows.jsonl"]),
        (["--data=OUT/rows.jsonl"], ["OUT/rows.jsonl"]),
        (["--data", "OUT/data set/a.jsonl"], ["OUT/data set/a.jsonl"]),
        (["--set", "model.id=OUT/models"], ["OUT/models"]),
        (["--data", "OUT/rows.jsonl", "--set", "data.eval_path=OUT/other"], ["OUT/other", "OUT/rows.jsonl"]),
        (["--data", "OUT/rows.jsonl", "--set", "data.eval_path=OUT/rows.jsonl"], ["OUT/rows.jsonl"]),
        (["--data", "OUT/absent.jsonl"], []),
        (["--data", "ROOT/in.jsonl"], []),
        (["--data", "ROOT"], []),
        (["--data", "in.jsonl"], []),
        (["--data", "../out/rows.jsonl"], ["OUT/rows.jsonl"]),
        (["--once", "is 1/2 more than 1/3, or km/h?"], []),
        ([], []),
    ],
)
def test_what_an_argument_names_outside_the_checkout_can_be_read(places, arguments, expected):
    assert outside(places, *arguments) == [(path, False) for path in expected]


def config(places, text):
    path = places / "checkout/config.yaml"
    path.write_text(text.replace("OUT", f"{places}/out"))
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n  path: OUT/rows.jsonl\n", [("OUT/rows.jsonl", False)]),
        ('data:\n  path: "OUT/rows.jsonl"  # mine\n', [("OUT/rows.jsonl", False)]),
        ("data:\n  path: rows.jsonl\n  eval_path: ../out/rows.jsonl\n", [("OUT/rows.jsonl", False)]),
        ("model:\n  id: meta-llama/Llama-3.1-70B\n", []),
        ("paths:\n  models: OUT/models\n", [("OUT/models", True)]),
        ("paths: {}\nmodels: 'OUT/models'\nmodel: {id: OUT/models}\n", [("OUT/models", True)]),
        ("paths:\n  runs: OUT/new/runs # a bigger disk\n", [("OUT/new/runs", True)]),
        ("paths:\n  models: models\n  runs: runs/of/mine\n", []),
    ],
)
def test_what_the_config_names_outside_the_checkout(places, text, expected):
    """The folders of models and runs are made, and can be written."""
    assert outside(places, "--config", config(places, text)) == expected
    assert (places / "out/new/runs").is_dir() == ("new" in text)


def test_what_the_config_of_a_run_names_is_mounted_where_it_is_trained_again(places, monkeypatch):
    monkeypatch.chdir(places / "checkout")
    run = places / "checkout" / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"data:\n  path: {places}/out/rows.jsonl\n")
    assert outside(places, "reproduce", "--run", "first") == [("OUT/rows.jsonl", False)]
    assert outside(places, "eval", "--run", "first") == []


@pytest.mark.parametrize(
    "text",
    [
        "# as OUT/rows.jsonl\n",
        "data:\n  path: demo # or OUT/rows.jsonl\n",
        "#models: OUT/new\n",
    ],
)
def test_a_comment_of_the_config_names_nothing(places, text):
    assert outside(places, "--config", config(places, text)) == []
    assert not (places / "out/new").exists()


@pytest.mark.parametrize("argument", ["paths.runs=OUT/new", "--set=paths.runs=OUT/new"])
def test_a_setting_that_moves_the_runs(places, argument):
    assert outside(places, "--set", argument) == [("OUT/new", True)]
    assert (places / "out/new").is_dir()


def test_runs_elsewhere_in_the_checkout_can_be_written(places):
    found = outside(places, "--set", "paths.runs=elsewhere/runs")
    assert found == [(f"{places}/checkout/elsewhere/runs", True)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "OUT/new"], [("OUT/new", True)]),
        (["--output=ROOT/results"], [("ROOT/results", True)]),
        (["--output", "runs/results"], []),
        (["--figure", "OUT/chart.svg"], [("OUT", True)]),
        (["--figure", "runs/chart.svg"], []),
        (["--bundle", "OUT/report.tar.gz"], [("OUT", True)]),
        (["--archive", "OUT/first.tar"], [("OUT", True)]),
        (["report", "--output", "OUT/page.html"], [("OUT", True)]),  # a file; bench's is a folder
        (["compare", "one", "two", "--output=OUT/page.html"], [("OUT", True)]),
        (["report", "--output", "runs/page.html"], []),
        (["--checkpoint", "OUT/models"], [("OUT/models", True)]),
    ],
)
def test_what_bench_and_reports_write(places, arguments, expected):
    root = str(places / "checkout")
    assert [(path.replace(root, "ROOT"), w) for path, w in outside(places, *arguments)] == expected


@pytest.mark.parametrize("figure", ["chart.svg", "ROOT/chart.svg"])
def test_the_checkout_itself_is_not_written_to(places, figure):
    with pytest.raises(SetupError, match="the container may not write there; name a place in runs/"):
        outside(places, "--figure", figure)


def test_a_path_with_a_colon_is_one_line(places):
    (places / "out/a:b").touch()
    with pytest.raises(SetupError, match=r"a:b: docker cannot mount a path with a colon"):
        outside(places, "--data", "OUT/a:b")


def test_a_config_outside_is_itself_read(places):
    (places / "out/config.yaml").write_text(f"data:\n  path: {places}/out/rows.jsonl\n")
    assert outside(places, "--config", "OUT/config.yaml") == [
        ("OUT/config.yaml", False),
        ("OUT/rows.jsonl", False),
    ]


def test_a_file_name_is_taken_whole(places):
    (places / "out/it's #1.jsonl").touch()
    (places / "out/it").touch()
    assert outside(places, "--data", "OUT/it's #1.jsonl") == [("OUT/it's #1.jsonl", False)]


@pytest.mark.parametrize("text", ["/" + "long" * 2000, "/\0", "/"])
def test_words_that_are_no_path(places, text):
    assert outside(places, "--once", text) == []


def test_a_path_that_may_not_be_looked_at(places, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    assert outside(places, "--data", "OUT/rows.jsonl") == []


def test_a_folder_of_runs_that_cannot_be_made_is_one_line(places):
    with pytest.raises(SetupError, match=r"other/runs") as refused:
        outside(places, "--set", "paths.runs=OUT/other/runs")
    assert "\n" not in str(refused.value)
