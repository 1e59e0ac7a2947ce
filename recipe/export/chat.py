"""`recipe chat`: talk to the trained model in a terminal; the adapters off, on, or one answer of each."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from recipe.data.chat import render
from recipe.errors import UserError
from recipe.export.evaluate import load_run
from recipe.export.plain import GREEDY, adapters_off, in_pieces, pad_token
from recipe.export.spread import Work
from recipe.files import read_json
from recipe.train.run import Run

BASE, TUNED = "base", "tuned"
MODES = {"/base": (BASE,), "/tuned": (TUNED,), "/both": (BASE, TUNED)}
HELP = """\
/base: adapters off   /tuned: adapters on   /both: one answer of each, the conversation goes on with the tuned one
/new: forget what was said   /help   /quit      Ctrl-C ends an answer, at the prompt the program"""
MAX_NEW_TOKENS = 512
CONTEXT_TOKENS = Work().tokens  # for which memory is left
STOPPED = " …"  # at the end of an answer that was not let finish, for the model too


@dataclass(frozen=True)
class Answer:
    """What was said; `stopped`: by Ctrl-C."""

    text: str
    tokens: int
    seconds: float
    stopped: bool


class Stop(StoppingCriteria):
    """`with Stop() as stop:` Ctrl-C ends the answer after its next token; pressed again, the program at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)


@dataclass
class Kept:
    """The keys and values of the last answer: the next question begins with the same text."""

    name: str
    ids: list[int]
    cache: DynamicCache


class TooLong(Exception):
    """A question alone is longer than what the model can read."""


class Talk:
    """A conversation with one model, base or tuned. `opening`: the messages that every conversation begins with."""

    def __init__(self, model: Any, tokenizer: Any, opening: list[dict[str, str]]):
        self.model, self.tokenizer, self.opening = model, tokenizer, opening
        self.history = list(opening)
        self.context = min(model.config.max_position_embeddings, CONTEXT_TOKENS)
        # A cache of the last few tokens only cannot go back.
        self._reusable = getattr(model.config, "sliding_window", None) is None
        self._kept: Kept | None = None

    def ask(self, text: str, names: tuple[str, ...], show: bool = True) -> dict[str, Answer]:
        """The answer of each of `names`, printed as it comes if `show`; the last one goes into the history.

        Raises TooLong, with the history as it was but for turns that were left out.
        """
        self.history.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except TooLong:
            self.history.pop()
            raise
        answers = {}
        for name in names:
            with Stop() as stop:
                if show and len(names) > 1:
                    print(f"{name}: ", end="", flush=True)
                answers[name] = self._answer(ids, name, show, stop)
        last = answers[names[-1]]
        self.history.append(
            {"role": "assistant", "content": last.text + STOPPED if last.stopped else last.text}
        )
        return answers

    def new(self) -> None:
        self.history = list(self.opening)

    def _fitting(self) -> list[int]:
        """The prompt's tokens; where they and an answer are too many, the oldest turns are left out, and that is said."""
        most = self.context - min(MAX_NEW_TOKENS, self.context // 4)
        first, left_out = len(self.opening), 0
        while len(ids := self._prompt()) > most:
            if len(self.history) == first + 1 or self.tokenizer.chat_template is None:
                raise TooLong(
                    f"the question has {len(ids)} tokens with all around it, expected at most {most}"
                )
            del self.history[first : first + 2]
            left_out += 1
        if left_out:
            print(
                f"the conversation is longer than {most} tokens: the oldest {left_out} of its questions and answers "
                "are left out",
                file=sys.stderr,
            )
        return ids

    def _prompt(self) -> list[int]:
        """The last text alone where the tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(self.history[-1]["content"])["input_ids"]
        text = render(list(self.history), self.tokenizer, "chat", prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _answer(self, ids: list[int], name: str, show: bool, stop: Stop) -> Answer:
        started = time.perf_counter()
        cache = self._cache(ids, name)
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        with adapters_off(self.model, name == BASE), torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(MAX_NEW_TOKENS, self.context - len(ids)),
                cache=cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=pad_token(self.tokenizer),
                eos_token_id=self.tokenizer.eos_token_id,
                **GREEDY,
                **in_pieces(1, len(ids)),
            )[0].tolist()
        if stop.asked:
            print("(stopped)", file=sys.stderr)
        self._kept = Kept(name, output[: cache.get_seq_length()], cache) if self._reusable else None
        text = self.tokenizer.decode(output[len(ids) :], skip_special_tokens=True).strip()
        return Answer(text, len(output) - len(ids), round(time.perf_counter() - started, 3), stop.asked)

    def _cache(self, ids: list[int], name: str) -> DynamicCache:
        """With the tokens that the last prompt and answer have in common with this prompt, but for one to go on from."""
        kept, self._kept = self._kept, None
        if kept is None or kept.name != name:
            return DynamicCache(config=self.model.config)
        common = next(
            (i for i, (a, b) in enumerate(zip(kept.ids, ids, strict=False)) if a != b),
            min(len(kept.ids), len(ids)),
        )
        surplus = kept.cache.get_seq_length() - min(common, len(ids) - 1)
        if surplus > 0:
            kept.cache.crop(-surplus)
        return kept.cache


def chat(
    run: Run,
    once: str | None = None,
    names: tuple[str, ...] = (TUNED,),
    system: str | None = None,
    as_json: bool = False,
) -> int:
    """Answer `once` on standard output, or talk until the end of input.

    Questions are put as the training rows put them: in the chat template where those were conversations, beginning
    with `system` or else with the system message that all of them had; as plain text where they were not.
    """
    if once is not None and not once.strip():
        raise UserError("--once: is empty, expected a question")
    if as_json and once is None:
        raise UserError("--json: expected together with --once TEXT")
    model, tokenizer = load_run(run, Work())
    form = read_json(run.manifest)["data"]
    if not form["messages"]:
        tokenizer.chat_template = None
        if system is not None:
            raise UserError(f"--system: RUN={run.name} was trained on plain text, expected no system message")
    elif system is None:
        system = form["system"]
    talk = Talk(model, tokenizer, [{"role": "system", "content": system}] if system else [])
    if once is None:
        print(f"{run.name}, {' and '.join(names)}.\n{HELP}", file=sys.stderr)
        if system:
            print(f"system message: {system}", file=sys.stderr)
        elif not form["messages"]:
            print("trained on plain text: what you type is continued as it stands", file=sys.stderr)
        return _talk(talk, names)
    try:
        answers = talk.ask(once, names, show=not as_json)
    except TooLong as error:
        raise UserError(f"--once: {error}") from None
    if any(answer.stopped for answer in answers.values()):
        raise KeyboardInterrupt
    if as_json:
        found = {name: asdict(answer) for name, answer in answers.items()}
        print(json.dumps({"run": run.name, "question": once, "answers": found}, indent=2, ensure_ascii=False))
    return 0


def _talk(talk: Talk, names: tuple[str, ...]) -> int:
    """Until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys, and what was typed before

    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text in MODES:
            names = MODES[text]
            print(" and ".join(names), file=sys.stderr)
        elif text == "/new":
            talk.new()
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            try:
                talk.ask(text, names)
            except TooLong as error:
                print(error, file=sys.stderr)
