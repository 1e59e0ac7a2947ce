"""`lora.new_tokens`: which row of the embedding each of them has, and a tokenizer that knows them.

A token that the tokenizer has keeps its row. One that it lacks takes a reserved one's row, which then has its name, or a
row behind the last token, where the embedding has more rows than the tokenizer tokens. No row is ever made: the export
would then load on no base model but a resized one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from recipe.errors import UserError

# What families call the tokens that they keep free: Llama 3, Mistral, Gemma, Phi, Qwen.
RESERVED = re.compile(
    r"<\|(reserved(_special_token)?|extra|dummy|unused|placeholder)_?\d+\|>"
    r"|<(reserved|unused|SPECIAL)_?\d+>|\[(control|unused)_?\d+\]"
)


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], folder: Path) -> None:
    """Make the tokenizer of the checkpoint in `folder` know them. Raises UserError where no row is free."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if not missing:
        return
    rows = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    free = _reserved(tokenizer, tokens, rows)
    beyond = range(max(vocabulary.values()) + 1, rows)
    if len(missing) > len(free) + len(beyond):
        raise UserError(
            f"lora.new_tokens has {len(missing)} that the tokenizer of {folder} lacks ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}), and its embedding of {rows:,} rows has {len(free)} reserved and "
            f"{len(beyond)} unused ones, expected a row for each: the embedding and the head of a quantised checkpoint are "
            "not resized, since the adapters would then fit no base model but a resized one; name fewer, or tokens that "
            "it has"
        )
    _rename(tokenizer, dict(zip(free, missing, strict=False)))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in missing[len(free) :]])
    ids = token_ids(tokenizer, tokens)
    if max(ids) >= rows:
        raise UserError(
            f"{folder}: its tokenizer gives {tokens[ids.index(max(ids))]} the number {max(ids)}, expected less than the "
            f"{rows:,} rows of the embedding; leave it out of lora.new_tokens"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """The rows that are trained, in the order of `tokens`; the tokenizer has them all (add_new_tokens)."""
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens)


def _reserved(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], rows: int) -> list[str]:
    """Tokens that nobody uses, in the order of their rows."""
    used = tokenizer.chat_template or ""
    roles = tokenizer.special_tokens_map.values()  # bos, eos, pad and so on; those without one are in a list
    named = {*tokens, *(str(token) for token in roles if not isinstance(token, list))}
    return [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if RESERVED.fullmatch(token.content)
        and number < rows
        and token.content not in used
        and token.content not in named
    ]


def _rename(tokenizer: PreTrainedTokenizerBase, names: dict[str, str]) -> None:
    """New names for added tokens; the numbers stay. As plain tokens: decoding must not leave them out."""
    if not names:
        return
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in text["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": False, "normalized": False}
    vocabulary = text["model"].get("vocab")
    if isinstance(vocabulary, dict):
        text["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(text))
    for settings in (tokenizer.init_kwargs, tokenizer.__dict__):
        _forget(settings, names)


def _forget(settings: dict[str, Any], names: dict[str, str]) -> None:
    """The old names in what is written to tokenizer_config.json: whoever loads it would add them again."""
    settings.pop("added_tokens_decoder", None)
    for key in ("extra_special_tokens", "additional_special_tokens", "_extra_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [token for token in settings[key] if str(token) not in names]
