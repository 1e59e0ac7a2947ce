"""Results to standard output, everything else to standard error, and an exit code that says how it ended."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import __version__, commands
from recipe.cli import main
from recipe.errors import Refused, UserError

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "recipe" / "configs" / "smollm2-135m.yaml")
COMMANDS = (
    "plan",
    "preflight",
    "prepare",
    "data",
    "train",
    "eval",
    "export",
    "chat",
    "serve",
    "report",
    "compare",
    "doctor",
    "reproduce",
    "demo",
    "bench",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.startswith(f"usage: recipe {command}") and "--set SECTION.KEY=VALUE" in out and "--json" in out


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert re.findall(r"^    (\w+)", out, re.MULTILINE) == list(COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"recipe {__version__}\n")


def plan(*arguments):
    return main(["plan", "--config", DEMO, *arguments])


def test_what_fits_ends_with_0_on_standard_output(capsys):
    assert plan("--gpus", "2", "--vram-gib", "24", "--ram-gib", "64") == 0
    out, err = capsys.readouterr()
    assert "\nIt fits" in out and err == ""


def test_what_does_not_fit_ends_with_1(capsys):
    assert plan("--gpus", "2", "--vram-gib", "0.5", "--ram-gib", "64") == 1
    out, err = capsys.readouterr()
    assert "It does not fit:" in out and err == ""


def test_a_named_card_has_its_own_time(capsys):
    seconds = []
    for card in ("RTX 3090", "rtx 4090"):
        assert plan("--gpus", "2", "--vram-gib", "24", "--ram-gib", "64", "--gpu", card, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {name.lower() for name in found["cards"]} == {card.lower()} and found["cards_assumed"]
        seconds.append(found["duration"]["run_seconds"])
    assert seconds[1] < seconds[0]


def test_json_is_one_document_and_nothing_else(capsys):
    assert plan("--gpus", "2", "--vram-gib", "24", "--ram-gib", "64", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is True and err == ""


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (UserError("c.yaml: is wrong"), 2, "error: c.yaml: is wrong\n"),
        (Refused("does not fit"), 1, "error: does not fit\n"),
        (UserError("of a library:\n  two lines"), 2, "error: of a library:   two lines\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_each_ending_has_its_exit_code_and_one_line(ending, code, said, monkeypatch, capsys):
    def end(arguments):
        raise ending

    monkeypatch.setattr(commands, "plan", end)
    assert plan() == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", said)


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "plan", fail)
    with pytest.raises(ZeroDivisionError):
        plan()


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_plan_needs_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'peft', 'datasets', 'bitsandbytes')"
    done = run_python(
        f"import sys; from recipe.cli import main; code = main(['plan', '--config', {DEMO!r}, '--gpus', '2', "
        f"'--vram-gib', '24', '--ram-gib', '64', '--json']); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert json.loads(done.stdout)["world_size"] == 2


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "recipe", "plan", "--config", "no.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no.yaml: no such config file") and done.stderr.count("\n") == 1


def test_a_reader_who_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m recipe plan --config {DEMO} --gpus 2 --vram-gib 24 --ram-gib 64 | true; "
        "exit ${PIPESTATUS[0]}",
        cwd=ROOT,
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
