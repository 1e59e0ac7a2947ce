"""`recipe doctor` as a command: its usage, its list and its page in docs/, and logs of any size."""

import json
import re
import subprocess
import sys

import pytest

from recipe.cli import main
from recipe.doctor import show
from recipe.doctor.diagnose import all_marks
from recipe.doctor.rule import CERTAINTIES, KINDS, STATES
from recipe.doctor.rules import RULES
from recipe.doctor.scan import Mark, scan_file
from tests.train.tiny_run import ROOT

LARGE_MIB = 150
MEMORY_MIB = 120  # Python's own included


@pytest.mark.parametrize(
    ("arguments", "said"),
    {
        "nothing": ([], "RUN= is not set"),
        "a run that is not there": (["--run", "none"], "no such run"),
        "a log that is not there": (
            ["--log", "none.log"],
            "no such file or directory, expected a readable log file",
        ),
        "a folder": (["--log", "."], "is a folder, expected a file"),
        "two things": (["--run", "a", "--log", "b"], "expected one of"),
        "markdown of what": (["--markdown"], "expected only with --list"),
    }.values(),
)
def test_a_wrong_request_ends_with_2_and_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_rules_are_whole_and_know_each_other():
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names)) >= 60
    for rule in RULES:
        assert set(rule.over) <= set(names), rule.name
        assert rule.name not in rule.over
        assert rule.certainty in CERTAINTIES and rule.kind in KINDS and rule.when in STATES
        assert rule.own_marks or rule.causes or rule.find, f"{rule.name} can never be found"
        assert rule.title and rule.cause.endswith((".", ":", ")")) and show.remedy_of(rule), rule.name
        for mark in rule.all_marks:
            re.compile(mark.pattern)


def test_the_page_in_docs_is_the_list(capsys):
    assert main(["doctor", "--list", "--markdown"]) == 0
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert page == capsys.readouterr().out, (
        "make it anew: recipe doctor --list --markdown > docs/troubleshooting.md"
    )


def test_the_list_has_every_rule(capsys):
    assert main(["doctor", "--list", "--json"]) == 0
    assert [rule["rule"] for rule in json.loads(capsys.readouterr().out)] == [rule.name for rule in RULES]


def test_a_log_of_nothing_is_in_order(tmp_path, capsys):
    (tmp_path / "empty.log").touch()
    assert main(["doctor", "--log", str(tmp_path / "empty.log")]) == 0
    out = capsys.readouterr().out
    assert "nothing found wrong" in out and "empty.log (0 lines)" in out


def test_the_answer_for_people_has_the_lines_and_the_remedy(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text("a\nb\nTraceback (most recent call last):\nModuleNotFoundError: No module named 'trl'\n")
    assert main(["doctor", "--log", str(log)]) == 0
    out = capsys.readouterr().out
    assert f"seen: {log}:4: ModuleNotFoundError: No module named 'trl'" in out
    assert "do: `make setup`" in out and "[certain; missing_package]" in out


def test_a_failure_that_no_rule_knows_is_not_passed_over(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text("Traceback (most recent call last):\nZeroDivisionError: division by zero\n")
    assert main(["doctor", "--log", str(log), "--json"]) == 0
    (diagnosis,) = json.loads(capsys.readouterr().out)["diagnoses"]
    assert diagnosis["rule"] == "unexpected" and "ZeroDivisionError" in diagnosis["evidence"][0]["text"]


def test_a_large_log_is_read_in_little_memory(tmp_path):
    """Its failure stands in the middle."""
    log = tmp_path / "large.log"
    block = b"".join(
        b"step %d: loss 1.234, 512 tokens/s, some more words of a line\n" % i for i in range(20_000)
    )
    with open(log, "wb") as file:
        for part in range(LARGE_MIB * 2**20 // len(block)):
            file.write(block)
            if part == 50:
                file.write(b"OSError: [Errno 28] No space left on device\n")
        file.write(b"Traceback (most recent call last):\nRuntimeError: a consequence\n")

    # The peak of this program alone: getrusage would count that of the process which it was forked from.
    code = (
        "import re, sys; from recipe.cli import main; code = main()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--log", str(log), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) / 1024 < MEMORY_MIB
    (first, *_) = json.loads(done.stdout)["diagnoses"]
    assert first["rule"] == "disk_full"
    assert first["evidence"][0]["line"] == 51 * 20_000 + 1


def test_lines_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.doctor.scan.BLOCK_BYTES", 64)
    log = tmp_path / "log"
    lines = [f"line {n} " + "x" * (n % 50) for n in range(1, 200)]
    lines[149] += "the mark"
    lines[189] = "y" * 1000 + "the mark"
    log.write_text("\n".join(lines))
    found = {}
    scan_file(log, "log", [Mark("the mark")], found)
    assert [line.number for line in found[Mark("the mark")].lines] == [150, 190]
    found.clear()
    scan_file(log, "log", [Mark("the mark")], found, start=len("\n".join(lines[:160])) + 1)
    assert [line.number for line in found[Mark("the mark")].lines] == [190]


def test_what_a_progress_bar_has_drawn_over_is_not_shown(tmp_path):
    log = tmp_path / "log"
    log.write_text("  1%|\r  2%|\r  3%| CUDA out of memory\n")
    found = {}
    scan_file(log, "log", all_marks(), found)
    assert found[Mark("CUDA out of memory")].lines[0].text == "3%| CUDA out of memory"
