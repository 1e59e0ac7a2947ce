"""`recipe chat` as somebody uses it: the real command in a terminal of its own, on a run that really learnt something."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from recipe.cli import main
from recipe.export import chat as chat_module
from recipe.export.adapters import _write_config
from recipe.export.chat import Talk
from recipe.export.evaluate import load_run
from recipe.export.plain import adapters_off, answers
from recipe.files import read_json
from recipe.train.run import Run
from tests.train.tiny_run import PATIENCE_SECONDS, PLAIN_STEPS, ROOT, plain_run

ASKED = "number 7"
SHORT = 24


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


@pytest.fixture(scope="module")
def expected(loaded):
    """What eval would have base and tuned answer to ASKED, in SHORT tokens. Base would go on to the context's end."""
    model, tokenizer = loaded
    message = [{"role": "user", "content": ASKED}]
    ids = tokenizer(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    found = {}
    for name in ("base", "tuned"):
        with adapters_off(model, name == "base"):
            found[name] = next(answers(model, [ids["input_ids"]], tokenizer, SHORT, 1))
    assert found["base"] != found["tuned"] != ""
    return found


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

    def interrupt_until(self, pattern):
        """Ctrl-C at the prompt, again where it came just before Python waits for a line: it is then seen with the next key."""
        self.said = ""
        limit = time.monotonic() + PATIENCE_SECONDS
        while pattern not in self.said:
            assert time.monotonic() < limit, f"no {pattern!r} in {self.said!r}"
            os.write(self.mine, b"\x03")
            for _ in range(15):
                if pattern not in self.said and select.select([self.mine], [], [], 0.2)[0]:
                    with contextlib.suppress(OSError):
                        self.said += os.read(self.mine, 65536).decode(errors="replace").replace("\r", "")

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.mine)


def _own_terminal():
    """The pseudo-terminal becomes the session's own, so that Ctrl-C is a signal there."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def squeezed(text):
    """As a terminal shows it, without what is no letter: a small model says many odd things."""
    return re.sub(r"[^a-z0-9]", "", text)


def test_a_conversation_in_a_terminal(run, expected):
    terminal = Terminal("chat", "--run", run.name, "--set", f"paths.runs={run.folder.parent}")
    tuned = squeezed(expected["tuned"])
    try:
        assert "good, tuned." in terminal.until("/help.*\n> $")
        terminal.type(f"{ASKED}\n")
        assert squeezed(terminal.until("\n> $")) == squeezed(ASKED) + tuned

        terminal.type("/new\n")
        terminal.until("> $")
        terminal.type("/both\n")
        terminal.until("base and tuned\n> $")
        terminal.type(f"{ASKED}\n")
        terminal.until("\nbase: ")
        terminal.type("\x03")  # ends base's answer, not tuned's, not the program
        said = terminal.until("\n> $")
        assert squeezed(said).endswith("stoppedtuned" + tuned)

        terminal.type("/tuned\n")
        terminal.until("\ntuned\n> $")
        for number in range(2):
            terminal.type(f"{number} " + "x7 " * 80 + "\n")
            terminal.until(r"x7 \n.*\n> $")
        assert re.search(r"longer than 384 tokens: the oldest \d+ of its questions", terminal.said)
        terminal.type("x7 " * 300 + "\n")
        assert "tokens with all around it, expected at most 384" in terminal.until("384\n> $")
        terminal.type("/base\n")
        terminal.until("\nbase\n> $")
        terminal.type("/help\n")
        terminal.until("Ctrl-C ends an answer.*\n> $")
        terminal.interrupt_until("stopped\n")
        assert terminal.process.wait(PATIENCE_SECONDS) == 130
    finally:
        terminal.end()


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_NEW_TOKENS", SHORT)


def test_the_conversation_goes_on_with_the_tuned_answer(loaded, expected, short):
    talk = Talk(*loaded, [])
    found = talk.ask(ASKED, ("base", "tuned"), show=False)
    assert {name: answer.text for name, answer in found.items()} == expected
    assert talk.history == [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": expected["tuned"]},
    ]
    system = {"role": "system", "content": "hello"}
    talk = Talk(*loaded, [system])
    talk.ask(ASKED, ("tuned",), show=False)
    assert talk.history[0] == system and len(talk.history) == 3
    talk.new()
    assert talk.history == [system]


def test_ctrl_c_keeps_what_was_said_and_marks_it(loaded, expected):
    """A real signal, while the base model talks."""
    talk = Talk(*loaded, [])
    before = signal.getsignal(signal.SIGINT)
    ctrl_c = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    answer = talk.ask(ASKED, ("base",), show=False)["base"]
    ctrl_c.join()
    assert answer.stopped and 0 < answer.tokens < 490
    shared = min(len(answer.text), len(expected["base"])) - 3  # the last character may be cut in two
    assert answer.text[:shared] == expected["base"][:shared]
    assert talk.history[-1]["content"] == answer.text + " …"
    assert signal.getsignal(signal.SIGINT) == before


def test_answers_are_the_same_with_what_was_kept_of_the_last_one(loaded, short):
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


def test_once_with_both_and_as_json(run, expected, short, capsys):
    base, tuned = expected["base"], expected["tuned"]
    assert main(command(run, "--once", ASKED, "--both")) == 0
    out, err = capsys.readouterr()
    assert squeezed(out) == squeezed(f"base{base}tuned{tuned}") and err == ""
    assert out.startswith("base: ") and "\ntuned: " in out
    assert main(command(run, "--once", ASKED, "--both", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"] == ASKED and found["answers"]["tuned"]["text"] == tuned
    assert found["answers"]["base"]["tokens"] == SHORT and not found["answers"]["base"]["stopped"]


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
