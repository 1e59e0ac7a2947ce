"""A row becomes tokens with a loss mask: labels are the tokens themselves, and -100 outside the loss."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipe.data.chat import Span, conversation
from recipe.data.new_tokens import add_new_tokens
from recipe.data.rows import Row
from recipe.errors import UserError
from recipe.settings import Data

IGNORED = -100


def load_tokenizer(folder: Path, data: Data, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, with `data.chat_template` where that is set, and `lora.new_tokens`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if data.chat_template:
        tokenizer.chat_template = read_template(data)
    if tokenizer.eos_token is None:
        raise UserError(
            f"{folder}: the tokenizer has no EOS token, so answers could not end; expected `eos_token`"
        )
    add_new_tokens(tokenizer, new_tokens, folder)
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


def chat_tokens(template: str | None) -> list[str]:
    """The tokens that a template writes, as far as they look like such."""
    return sorted(set(re.findall(r"<\|[^|<>\s]+\|>|\[/?[A-Z_]+\]", template or "")))


def untrained_template_note(tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str] = ()) -> str | None:
    """None where all of them are trained."""
    found = chat_tokens(tokenizer.chat_template)
    tokens = [token for token in found if token not in new_tokens]
    if found and not tokens:
        return None
    return (
        f"chat template from a file: a base model has never trained its chat tokens ({', '.join(tokens) or 'none found'});"
        " LoRA does not train embeddings, so answers may not end cleanly (torchtune issue 2429); lora.new_tokens does"
    )


def encode(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """input_ids and labels of one row. The first token has no label: nothing before it predicts it."""
    if row.messages is not None:
        ids, inside = _conversation(row, data, tokenizer)
    else:
        ids, inside = _plain(row, data, tokenizer)
    labels = [token if kept else IGNORED for token, kept in zip(ids, inside, strict=True)]
    labels[0] = IGNORED
    return ids, labels


def _plain(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    prompt = row.values.get("prompt", "")
    text = prompt + row.values["completion"] if "prompt" in row.values else row.values["text"]
    start = 0 if data.train_on == "all" else len(prompt)
    ids, offsets = _with_offsets(tokenizer, text, special=True)
    inside = [b > start for _, b in offsets]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text brings its own
        ids, inside = ids[1:], inside[1:]
    if ids[-1] != tokenizer.eos_token_id:
        ids, inside = [*ids, tokenizer.eos_token_id], [*inside, True]
    inside[-1] = True  # where the tokenizer itself has put the EOS, it stands for no text
    return ids, inside


def _conversation(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    text, spans = conversation(row, data.train_on, tokenizer)
    ids, offsets = _with_offsets(tokenizer, text)
    borders = {place for span in spans for place in span}
    if cut := sorted(place for place in borders if any(a < place < b for a, b in offsets)):
        ids, offsets = _in_pieces(tokenizer, text, cut)
    inside = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in offsets]
    ends = _ends(tokenizer, len(tokenizer))
    for span in reversed(spans):  # from the back, so that places before it stay
        last = _last_token(offsets, span, text)
        if last is not None and ids[last] not in ends:
            ids.insert(last + 1, tokenizer.eos_token_id)
            inside.insert(last + 1, True)
    return ids, inside


@functools.lru_cache(maxsize=4)
def _ends(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Tokens that may end an answer: EOS, and those that were added to the vocabulary, such as <|eot_id|>."""
    return frozenset({tokenizer.eos_token_id, *tokenizer.added_tokens_decoder})


def _last_token(offsets: list[tuple[int, int]], span: Span, text: str) -> int | None:
    """The last token of a span, but for white space behind it."""
    start = span[0]
    end = start + len(text[start : span[1]].rstrip())
    return next((i for i in range(len(offsets) - 1, -1, -1) if start < offsets[i][1] <= end), None)


def _in_pieces(tokenizer, text: str, cut: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenised apart at places where a token would belong to prompt and answer: as a prompt ends there."""
    ids, offsets = [], []
    for start, end in itertools.pairwise([0, *cut, len(text)]):
        piece, places = _with_offsets(tokenizer, text[start:end])
        ids += piece
        offsets += [(a + start, b + start) for a, b in places]
    return ids, offsets


def _with_offsets(tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]
