"""Before a server says that it is ready: does it answer, over HTTP, what the reference answers?

A wrong template, a wrong base or an adapter that was not applied shows in greedy answers at once.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

Expected = tuple[str, str]  # what is asked, and the reference's greedy answer
ANSWER_TOKENS = 64
PATIENCE_SECONDS = 600


def self_check(
    address: str,
    key: str,
    model: str,
    expected: Sequence[Expected],
    form: dict[str, Any],
    answer_tokens: int = ANSWER_TOKENS,
) -> int:
    """How many of the answers of `model` are the expected ones; of longer ones the first `answer_tokens` count.

    `form`: how the training rows put a question, {"messages": bool, "system": str | None}.
    """
    return sum(
        _same(_ask(address, key, model, prompt, form, answer_tokens), answer) for prompt, answer in expected
    )


def _same(found: tuple[str, bool], answer: str) -> bool:
    text, cut = found
    text, answer = text.strip(), answer.strip()
    return text == answer or (cut and bool(text) and answer.startswith(text))


def _ask(
    address: str, key: str, model: str, prompt: str, form: dict[str, Any], answer_tokens: int
) -> tuple[str, bool]:
    """The greedy answer, and whether it was cut at `answer_tokens`."""
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": answer_tokens}
    if form["messages"]:
        path = "/v1/chat/completions"
        opening = [{"role": "system", "content": form["system"]}] if form["system"] else []
        asked["messages"] = [*opening, {"role": "user", "content": prompt}]
    else:
        path, asked["prompt"] = "/v1/completions", prompt
    request = urllib.request.Request(
        address + path,
        json.dumps(asked).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE_SECONDS) as response:
            choice = json.load(response)["choices"][0]
    except (
        urllib.error.HTTPError
    ):  # such as a template that does not take the messages: no answer is another answer
        return "", False
    text = choice["message"]["content"] if form["messages"] else choice["text"]
    return text or "", choice["finish_reason"] == "length"
