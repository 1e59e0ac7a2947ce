"""`recipe chat`: talk to the trained model in a terminal, adapters on or off."""

from __future__ import annotations

import sys

from transformers import TextStreamer

from recipe.data.chat import render
from recipe.errors import UserError
from recipe.export.evaluate import load_run
from recipe.export.plain import adapters_off, pad_token
from recipe.files import read_json
from recipe.train.run import Run

HELP = "/base: adapters off   /tuned: adapters on   /new: forget what was said   /quit"
MAX_NEW_TOKENS = 512


def chat(run: Run, once: str | None = None, adapters: bool = True, system: str | None = None) -> int:
    """Answer `once` on standard output, or talk until the end of input.

    Questions are put as the training rows put them: in the chat template where those were conversations, beginning
    with `system` or else with the system message that all of them had; as plain text where they were not.
    """
    if once is not None and not once.strip():
        raise UserError("--once: is empty, expected a question")
    model, tokenizer = load_run(run)
    form = read_json(run.manifest)["data"]
    if not form["messages"]:
        tokenizer.chat_template = None
        if system is not None:
            raise UserError(f"--system: RUN={run.name} was trained on plain text, expected no system message")
    elif system is None:
        system = form["system"]
    opening = [{"role": "system", "content": system}] if system else []
    if once is not None:
        _answer(model, tokenizer, [*opening, {"role": "user", "content": once}], adapters)
        return 0
    print(f"{run.name}, adapters {'on' if adapters else 'off'}. {HELP}", file=sys.stderr)
    if system:
        print(f"system message: {system}", file=sys.stderr)
    elif not form["messages"]:
        print("trained on plain text: what you type is continued as it stands", file=sys.stderr)
    history = list(opening)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text in ("/base", "/tuned"):
            adapters = text == "/tuned"
            print(f"adapters {'on' if adapters else 'off'}", file=sys.stderr)
        elif text == "/new":
            history = list(opening)
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": _answer(model, tokenizer, history, adapters)})


def _answer(model, tokenizer, history: list[dict[str, str]], adapters: bool) -> str:
    """The answer, printed as it comes; to the last text alone where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        prompt = history[-1]["content"]
    else:
        prompt = render(history, tokenizer, "chat", prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None).to(
        model.device
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with adapters_off(model, not adapters):
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            streamer=streamer,
            pad_token_id=pad_token(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
