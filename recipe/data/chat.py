"""A conversation as the model sees it, and which characters of it are answers to be learnt.

Where the chat template marks what is generated ({% generation %}), its marks count. Elsewhere an answer is what the
template adds behind the prompt that ends where the answer begins. A template that writes earlier turns otherwise than
it wrote them when they were answered (Mistral's moves the system message along) is followed answer by answer, and
refused where an answer is not found again: nothing of a prompt is ever learnt in silence.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from recipe.data.rows import Row, is_learnt
from recipe.errors import UserError

Span = tuple[int, int]
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACE = "\ue000answer\ue001"  # stands for an answer, to see where a template puts it; of the private use area
CUE_CHARACTERS = 8
CHOICE = ("weight", "train")  # said to us, not to the template


def conversation(row: Row, train_on: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The conversation of a row as text, and the spans that are in the loss, in their order."""
    view = _View(row, tokenizer)
    messages = view.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        text = view.text(turns[-1])
        return text, [(0, len(text))]
    chosen = turns[-1:]
    if train_on == "assistant":
        chosen = [i for i in turns if is_learnt((row.messages or [])[i])]
    if chosen and chosen[0] == 0:
        raise UserError(
            f"{row.where}: messages[0] is the answer to nothing, expected a user or system turn before it"
        )
    if MARKS.search(tokenizer.chat_template or ""):
        return view.marked(chosen, turns)
    return view.matched(chosen, turns)


class _View:
    """What a template makes of a conversation and of its beginnings, each rendered once."""

    def __init__(self, row: Row, tokenizer: PreTrainedTokenizerBase):
        self.where, self.tools, self.tokenizer = row.where, row.tools, tokenizer
        self.messages = [
            {key: value for key, value in message.items() if key not in CHOICE}
            for message in row.messages or []
        ]
        self._rendered: dict[tuple[int, bool], str] = {}

    def render(self, turns: int, prompt: bool = False) -> str:
        key = (turns, prompt)
        if key not in self._rendered:
            self._rendered[key] = render(
                self.messages[:turns], self.tokenizer, self.where, prompt=prompt, tools=self.tools
            )
        return self._rendered[key]

    def marked(self, chosen: list[int], turns: list[int]) -> tuple[str, list[Span]]:
        """By the template's own marks, one for each answer."""
        text = self.render(len(self.messages))
        rendered, marks = render_jinja_template(
            [self.messages],
            tools=self.tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if rendered[0] != text or len(marks[0]) != len(turns):
            raise UserError(
                f"{self.where}: the chat template marks {len(marks[0])} generated parts, expected one for each of the "
                f"{len(turns)} answers; use another data.chat_template"
            )
        spans = []
        for turn, (start, end) in zip(turns, marks[0], strict=True):
            before = self.render(turn, prompt=True)
            if text.startswith(before):  # some marks begin within the prompt
                start = max(start, len(before))
            if turn in chosen:
                spans.append((start, max(start, start + len(text[start:end].rstrip()))))
        return text, spans

    def text(self, last: int) -> str:
        """As the model will see it when it answers: the prompt to the last answer, and the answer.

        That is the whole as the template writes it, but for templates such as Mistral's.
        """
        text = self.render(len(self.messages))
        before = self.render(last, prompt=True)
        return text if last == 0 or text.startswith(before) else before + self.answer(last)

    def matched(self, chosen: list[int], turns: list[int]) -> tuple[str, list[Span]]:
        """By comparing the text with the prompts that it answers."""
        text, spans = self.text(turns[-1]), []
        for turn in chosen:
            before, after = self.render(turn, prompt=True), self.render(turn + 1).rstrip()
            if text.startswith(before) and text.startswith(after) and len(after) >= len(before):
                spans.append((len(before), len(after)))
            else:
                spans.append(self.found_again(text, turn, turns))
        return text, spans

    def answer(self, turn: int) -> str:
        """What the template writes for this turn, from where its generation begins."""
        before, after = self.render(turn, prompt=True), self.render(turn + 1)
        if after.startswith(before):
            return after[len(before) :]
        dummy = [*self.messages[:turn], {"role": "assistant", "content": PLACE}]
        head, place, _ = render(dummy, self.tokenizer, self.where, tools=self.tools).partition(PLACE)
        start = len(head.rstrip()) + len(before) - len(before.rstrip())
        agree = head.rstrip().endswith(before.rstrip()[-CUE_CHARACTERS:])
        if not place or not agree or not after.startswith(head[:start]):
            self.refuse(turn)
        return after[start:]

    def cue(self, turn: int) -> str:
        """The end of the prompt, behind the message that is answered."""
        before = self.render(turn, prompt=True)
        said = (self.messages[turn - 1].get("content") or "").strip()
        behind = before.rpartition(said)[2] if said else ""
        return behind if behind.strip() else before[-CUE_CHARACTERS:]

    def found_again(self, text: str, turn: int, turns: list[int]) -> Span:
        """Where an earlier answer stands in a text whose beginning is not the prompt that it answered.

        Cue and answer must stand there as often as the conversation has them, or it would be a guess.
        """
        sought = self.cue(turn) + self.answer(turn).rstrip()
        same = [other for other in turns if self.cue(other) + self.answer(other).rstrip() == sought]
        places = [found.start() for found in re.finditer(re.escape(sought), text)]
        if len(places) != len(same):
            self.refuse(turn)
        start = places[same.index(turn)]
        return start + len(self.cue(turn)), start + len(sought)

    def refuse(self, turn: int) -> None:
        raise UserError(
            f"{self.where}: the chat template changes earlier turns, so the answer of turn {turn} cannot be told "
            "apart; use data.train_on: completion with the last turn only, or another data.chat_template"
        )


def render(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """A conversation as the model sees it; `prompt` ends it where the answer begins."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: has `messages`, but this model's tokenizer has no chat template; set data.chat_template to a "
            "Jinja file (its chat tokens were never trained in a base model), or use an Instruct model"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: has half of a surrogate pair, expected Unicode text") from None
    except (
        Exception
    ) as error:  # a template is a program of others: what it raises is about it or the conversation
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: the chat template refuses this conversation ({said})") from None
    return text
