"""`recipe chat` as somebody uses it: the real command in a terminal of its own, on a run that really learnt something."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch

from recipe.cli import main
from recipe.export import chat as chat_module
from recipe.export.adapters import _write_config
from recipe.export.chat import Talk
from recipe.export.evaluate import load_run
from recipe.files import read_json
from recipe.train.run import Run
from tests.train.tiny_run import PATIENCE_SECONDS, PLAIN_STEPS, ROOT, plain_run

LEARNT = "the answer is yes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its adapters as export leaves them; what export itself proves is in test_export.py."""
    folder = tmp_path_factory.mktemp("runs") / "good"
    shutil.copytree(plain_run(), folder)
    found = Run(folder)
    found.adapters.mkdir()
    trained = folder / "checkpoints" / f"step-{PLAIN_STEPS:06d}" / "adapters.safetensors"
    shutil.copyfile(trained, found.adapters / "adapter_model.safetensors")
    _write_config(found, read_json(found.manifest), found.adapters)
    return found


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run)


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recipe", *arguments],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)
        self.said = ""

    def type(self, text):
        self.said = ""
        os.write(self.mine, text.encode())

    def until(self, pattern):
        """All that was said up to the pattern since something was typed."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while not (found := re.search(pattern, self.said, re.DOTALL)):
            assert time.monotonic() < limit, f"no {pattern!r} in {self.said!r}"
            if select.select([self.mine], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self.mine, 65536).decode(errors="replace").replace("\r", "")
                except OSError:
                    raise AssertionError(f"ended without {pattern!r}: {self.said!r}") from None
        before = self.said[: found.end()]
        return before

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.mine)


def _own_terminal():
    """The pseudo-terminal becomes the session's own, so that Ctrl-C is a signal there."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_in_a_terminal(run):
    terminal = Terminal("chat", "--run", run.name, "--set", f"paths.runs={run.folder.parent}")
    try:
        assert "good, tuned." in terminal.until("/help.*\n> $")
        terminal.type("number 7\n")
        assert terminal.until("\n> $") == f"number 7\n{LEARNT}\n> "

        terminal.type("/new\n")  # so small a model has learnt one turn
        terminal.until("> $")
        terminal.type("/both\n")
        terminal.until("base and tuned\n> $")
        terminal.type("number 8\n")
        base, tuned = re.fullmatch(
            "number 8\nbase: (.*)\ntuned: (.*)\n> ", terminal.until("tuned: .*\n> $"), re.DOTALL
        ).groups()
        assert tuned == LEARNT and base.strip() and LEARNT not in base

        terminal.type("/base\n")
        terminal.until("\nbase\n> $")
        terminal.type("/new\n")
        terminal.until("> $")
        terminal.type("number 9\n")
        terminal.until("number 9\n.+")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)\n> $")
        terminal.type("/tuned\n")
        terminal.until("\ntuned\n> $")
        terminal.type("/new\n")
        terminal.until("> $")
        terminal.type("number 10\n")
        assert LEARNT in terminal.until("\n> $")  # the program went on

        for number in range(4):
            terminal.type(f"{number} " + "no " * 50 + "\n")
            terminal.until(r"no \n.*\n> $")
            if "left out" in terminal.said:
                break
        assert re.search(r"longer than 384 tokens: the oldest \d+ of its questions", terminal.said)
        terminal.type("x7 " * 300 + "\n")
        assert "tokens with all around it, expected at most 384" in terminal.until("384\n> $")
        terminal.type("/help\n")
        terminal.until("Ctrl-C ends an answer.*\n> $")
        terminal.type("\x03")
        terminal.until("stopped\n")
        assert terminal.process.wait(PATIENCE_SECONDS) == 130
    finally:
        terminal.end()


def test_the_conversation_goes_on_with_the_tuned_answer_and_marks_what_was_stopped(loaded, monkeypatch):
    model, tokenizer = loaded
    talk = Talk(model, tokenizer, [])
    answers = talk.ask("number 1", ("base", "tuned"), show=False)
    assert answers["tuned"].text == LEARNT != answers["base"].text
    assert talk.history == [
        {"role": "user", "content": "number 1"},
        {"role": "assistant", "content": LEARNT},
    ]
    monkeypatch.setattr(chat_module.Stop, "__enter__", lambda stop: setattr(stop, "asked", True) or stop)
    monkeypatch.setattr(chat_module.Stop, "__exit__", lambda *_: None)
    stopped = talk.ask("number 2", ("tuned",), show=False)["tuned"]
    assert stopped.stopped and stopped.tokens == 1
    assert talk.history[-1]["content"] == stopped.text + " …"
    talk.new()
    assert talk.history == []
    system = {"role": "system", "content": "hello"}
    talk = Talk(model, tokenizer, [system])
    assert talk.history == [system]
    talk.ask("number 3", ("tuned",), show=False)
    talk.new()
    assert talk.history == [system]


def test_answers_are_the_same_with_what_was_kept_of_the_last_one(loaded):
    """Keys and values of the common beginning are not computed again, and base's are not taken for tuned's."""
    model, tokenizer = loaded
    seen = []
    handle = model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    try:
        going_on, fresh = Talk(model, tokenizer, []), []
        for number, names in enumerate([("tuned",), ("tuned",), ("base",), ("tuned",)]):
            seen.clear()
            answers = going_on.ask(f"number {number}", names, show=False)
            prompt = seen[0]
            alone = Talk(model, tokenizer, [])
            alone.history = going_on.history[:-2]
            seen.clear()
            assert alone.ask(f"number {number}", names, show=False)[names[0]].text == answers[names[0]].text
            fresh.append(prompt == seen[0])
        assert fresh == [True, False, True, True]
    finally:
        handle.remove()


def command(run, *more):
    return ["chat", "--run", run.name, "--set", f"paths.runs={run.folder.parent}", *more]


def test_once_with_both_and_as_json(run, capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_NEW_TOKENS", 24)
    assert main(command(run, "--once", "number 7", "--both")) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(f"base: .*\ntuned: {LEARNT}\n", out, re.DOTALL) and err == ""
    assert main(command(run, "--once", "number 7", "--both", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"] == "number 7" and found["answers"]["tuned"]["text"] == LEARNT
    assert found["answers"]["base"]["tokens"] == 24 and not found["answers"]["base"]["stopped"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--json",), "--json: expected together with --once TEXT"),
        (("--base", "--both"), "--base and --both: expected one of them"),
        (("--once", "x7 " * 300), "--once: the question has"),
    ],
)
def test_a_wrong_request_is_one_line(run, capsys, more, said):
    assert main(command(run, *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and len(err.splitlines()) == 1


def test_more_than_one_pass_for_a_long_prompt_gives_the_same_answer(loaded, monkeypatch):
    from recipe.export import plain

    model, tokenizer = loaded
    prompts = [[5 + (i + row) % 400 for i in range(40 + row)] for row in range(8)]
    whole = list(plain.answers(model, prompts, tokenizer, 8, 8))
    monkeypatch.setattr(plain, "FORWARD_TOKENS", 64)
    widths = []
    handle = model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, output: widths.append(args[0].numel())
    )
    with torch.no_grad():
        assert list(plain.answers(model, prompts, tokenizer, 8, 8)) == whole
    handle.remove()
    assert max(widths) == 64 and widths[-1] == 8
