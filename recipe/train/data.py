"""Rows become token sequences with a loss mask, packed into micro-batches without padding.

A packed micro-batch is one row of `input_ids`, `labels` (-100 outside the loss) and `seq_lengths`, the lengths of the
documents in it. Documents never see each other (recipe/engine/attention.py) and positions restart at each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerBase

from recipe.errors import UserError
from recipe.settings import Data, Settings
from recipe.train.rows import Row, read_held_out_rows, read_training_rows

IGNORED = -100


@dataclass
class TokenData:
    """Tokenised rows: `train` and `held_out` are data sets of documents (input_ids, labels), not packed yet.

    `form` says how the training rows put a question, so that `chat` does the same: whether all are conversations
    (`messages`), and the system message that all begin with (`system`, or None).
    """

    train: Dataset
    held_out: Dataset
    notes: list[str]
    form: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.train["input_ids"])


def load_tokenizer(folder: Path, data: Data) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, with `data.chat_template` where that is set."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if data.chat_template:
        tokenizer.chat_template = read_template(data)
    if tokenizer.eos_token is None:
        raise UserError(
            f"{folder}: the tokenizer has no EOS token, so answers could not end; expected `eos_token`"
        )
    return tokenizer


def read_template(data: Data) -> str:
    """The text of `data.chat_template`. Raises UserError where it is no file or no text."""
    try:
        return Path(data.chat_template or "").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"not UTF-8 text (byte {error.start})"
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
    raise UserError(f"data.chat_template is `{data.chat_template}`: {found}, expected a Jinja template")


def tokenise(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> TokenData:
    """Read, check, hold out and tokenise. Raises UserError naming the row that cannot be used."""
    data = settings.data
    rows, held_out = read_training_rows(data), read_held_out_rows(data)
    if not held_out and data.eval_fraction:
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(settings.train.seed)
        ).tolist()
        count = max(1, round(len(rows) * data.eval_fraction)) if len(rows) > 1 else 0
        kept = set(order[:count])
        held_out = [rows[i] for i in sorted(kept)]
        rows = [row for i, row in enumerate(rows) if i not in kept]
    notes = [_untrained_template_note(tokenizer)] if data.chat_template else []
    train = _documents(rows, data, tokenizer, notes)
    evaluated = _documents(held_out, data, tokenizer, notes) if held_out else train.select([])
    return TokenData(train, evaluated, notes, _form(rows))


def _form(rows: list[Row]) -> dict[str, Any]:
    first, *others = [row.messages[0] if row.messages else None for row in rows]
    common = first is not None and first["role"] == "system" and all(other == first for other in others)
    return {
        "messages": all(opening is not None for opening in (first, *others)),
        "system": first["content"] if first and common else None,
    }


def _documents(rows: list[Row], data: Data, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> Dataset:
    documents = [(row, *encode(row, data, tokenizer)) for row in rows]
    long = [(row, len(ids)) for row, ids, _ in documents if len(ids) > data.max_length]
    if long and data.overlong == "error":
        longest, tokens = max(long, key=lambda item: item[1])
        raise UserError(
            f"{longest.where}: has {tokens} tokens, and {len(long)} of {len(rows)} rows are longer than data.max_length "
            f"({data.max_length}); raise it, or set data.overlong to drop or truncate"
        )
    if long:
        notes.append(
            f"{len(long)} of {len(rows)} rows are longer than {data.max_length} tokens: {data.overlong}"
        )
    if data.overlong == "drop":
        documents = [item for item in documents if len(item[1]) <= data.max_length]
    cut = [(ids[: data.max_length], labels[: data.max_length]) for _, ids, labels in documents]
    whole = len(cut)
    cut = [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels)]
    if len(cut) < whole:
        notes.append(f"{whole - len(cut)} of {len(rows)} rows have no token in the loss: left out")
    if not cut:
        raise UserError(
            "data: no row is left with a token in the loss, expected at least one; raise data.max_length"
        )
    return Dataset.from_dict({"input_ids": [ids for ids, _ in cut], "labels": [labels for _, labels in cut]})


def encode(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """input_ids and labels of one row. The first token has no label: nothing before it predicts it."""
    if row.messages is not None:
        text, spans = _conversation(row.messages, row.where, data, tokenizer)
        ids, offsets = _with_offsets(tokenizer, text)
        inside = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in offsets]
    else:
        prompt = row.values.get("prompt", "")
        text = prompt + row.values.get("completion", "") if "prompt" in row.values else row.values["text"]
        start = 0 if data.train_on == "all" else len(prompt)
        ids, offsets = _with_offsets(tokenizer, text, special=True)
        inside = [b > start for _, b in offsets]
        if ids[-1] != tokenizer.eos_token_id:
            ids, inside = [*ids, tokenizer.eos_token_id], [*inside, True]
        inside[-1] = True  # where the tokenizer itself has put the EOS, it stands for no text
    labels = [token if kept else IGNORED for token, kept in zip(ids, inside, strict=True)]
    labels[0] = IGNORED
    return ids, labels


def _conversation(
    messages: list[dict[str, str]], where: str, data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans that are in the loss."""
    text = render(messages, tokenizer, where)
    if data.train_on == "all":
        return text, [(0, len(text))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for turn in turns[-1:] if data.train_on == "completion" else turns:
        if turn == 0:
            raise UserError(
                f"{where}: messages[0] is the answer to nothing, expected a user or system turn before it"
            )
        before = render(messages[:turn], tokenizer, where, prompt=True)
        after = render(messages[: turn + 1], tokenizer, where)
        if not text.startswith(before) or not text.startswith(after.rstrip()):
            raise UserError(
                f"{where}: the chat template changes earlier turns, so the answer of turn {turn} cannot be told "
                "apart; use data.train_on: completion with the last turn only, or another data.chat_template"
            )
        # The newline that some templates put after the end-of-turn token is never generated.
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str, prompt: bool = False
) -> str:
    """A conversation as the model sees it; `prompt` ends it where the answer begins."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: has `messages`, but this model's tokenizer has no chat template; set data.chat_template to a "
            "Jinja file (its chat tokens were never trained in a base model), or use an Instruct model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses this conversation ({error})") from None


def _with_offsets(tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _untrained_template_note(tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = sorted(set(re.findall(r"<\|[^|<>\s]+\|>", tokenizer.chat_template or "")))
    return (
        f"chat template from a file: a base model has never trained its chat tokens ({', '.join(tokens) or 'none found'});"
        " LoRA does not train embeddings, so answers may not end cleanly (torchtune issue 2429)"
    )


def packed(documents: Dataset, tokens: int, seed: int) -> Dataset:
    """Micro-batches of at most `tokens` tokens, filled best-fit, in an order given by `seed`."""
    from trl import pack_dataset

    if not len(documents):
        return documents
    return pack_dataset(documents.shuffle(seed=seed), seq_length=tokens, strategy="bfd").with_format(None)


class PackedCollator:
    """One packed row -> tensors of shape (1, tokens) and the document boundaries for variable-length attention."""

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        documents = []
        for feature in features:
            start = 0
            for length in feature["seq_lengths"]:
                piece = slice(start, start + length)
                documents.append(
                    {"input_ids": feature["input_ids"][piece], "labels": feature["labels"][piece]}
                )
                start += length
        return self._flatten(documents)


def shown_rows(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, count: int = 3, color: bool = True
) -> str:
    """The first rows as the model sees them; what is not in the loss is dim, or in brackets without colour."""
    grey, plain = ("\x1b[2m", "\x1b[0m") if color else ("[[", "]]")
    lines = []
    for number, row in enumerate(documents.select(range(min(count, len(documents))))):
        text, was_masked = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            masked = label == IGNORED
            if masked != was_masked:
                text += grey if masked else plain
                was_masked = masked
            text += tokenizer.decode([token])
        text += plain if was_masked else ""
        lines.append(f"  row {number + 1} ({len(row['input_ids'])} tokens): " + text.replace("\n", "⏎"))
    return "\n".join(lines)
