"""The vocabulary of a GGUF file: tokens, merges or scores, special tokens, chat template.

It is taken from the tokenizer as transformers loads it, which is the one that training used, not from its files. What
splits a text before the merges is told to llama.cpp by a name; it is found from the tokenizer's own expressions, since a
wrong one still gives tokens, only others.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from recipe.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name by (how the text is split, whether a word that is a token needs no merges).
PRE_TOKENIZERS = {
    ((_WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((_WORDS % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((_WORDS % r"\p{N}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    (("digits", "gpt-2"), False): "smollm",
    (("gpt-2",), False): "gpt-2",
}
BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # what SentencePiece writes for a space


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], rows: int) -> None:
    """`rows`: of the embedding; those beyond the tokenizer's tokens become unused ones.

    Raises UserError where llama.cpp has no tokenizer that does the same.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer has no tokenizer.json, expected one that the tokenizers library reads"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(described, rows, str(folder))
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"{folder}: the tokenizer is a {model['type']} one, expected BPE")
    _check_normalizer(described, str(folder))
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(model, tokens, types))
        writer.add_add_space_prefix(_space_prefix(described, tokenizer.chat_template, str(folder)))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(described, str(folder)))
        writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, config, rows, merges=not model.get("byte_fallback"))


def _tokens(described: dict[str, Any], rows: int, where: str) -> tuple[list[str], list[TokenType]]:
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [TokenType.UNUSED] * rows
    model = described["model"]
    bytes_too = bool(model.get("byte_fallback"))
    last = max([*model["vocab"].values(), *(token["id"] for token in described["added_tokens"])])
    if last >= rows:
        raise UserError(
            f"{where}: the tokenizer numbers its tokens up to {last}, the embedding has {rows:,} rows, expected one for "
            "each; the tokenizer belongs to another model"
        )
    for token, row in model["vocab"].items():
        tokens[row] = token
        types[row] = TokenType.BYTE if bytes_too and BYTE.fullmatch(token) else TokenType.NORMAL
    for token in described["added_tokens"]:
        # The tokenizer's own word for it, whatever the token looks like: new tokens are to be seen in an answer.
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]] = token["content"]
        if token["content"] == model.get("unk_token") and bytes_too:
            types[token["id"]] = TokenType.UNKNOWN
    return tokens, types


def _check_normalizer(described: dict[str, Any], where: str) -> None:
    """llama.cpp normalises nothing: composed text (NFC) is what Qwen's tokenizer is given nearly always."""
    first = described["normalizer"] or {"type": "NFC"}
    steps = first.get("normalizers", [first])
    known = ("Prepend", "Replace") if described["model"].get("byte_fallback") else ()
    if other := [step["type"] for step in steps if step["type"] not in ("NFC", *known)]:
        raise UserError(
            f"{where}: the tokenizer changes texts by {other[0]}, expected none: llama.cpp does no such thing"
        )


def pre_tokenizer(described: dict[str, Any], where: str) -> str:
    """llama.cpp's name for how this byte-level tokenizer splits a text."""
    steps = described["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    found: list[str] = []
    for step in steps:
        if step.get("type") == "Split" and not step["invert"] and step["behavior"] in ("Isolated", "Removed"):
            found.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            found += ["gpt-2"] * step["use_regex"]
        else:
            found.append(str(step.get("type")))
    key = tuple(found), bool(described["model"].get("ignore_merges"))
    if key not in PRE_TOKENIZERS:
        said = " then ".join(found) or "nothing"
        raise UserError(
            f"{where}: the tokenizer splits texts by {said[:120]!r}{' without merges of whole words' * key[1]}, expected "
            f"one of the ways that llama.cpp knows as {', '.join(PRE_TOKENIZERS.values())}"
        )
    return PRE_TOKENIZERS[key]


def _scores(model: dict[str, Any], tokens: list[str], types: list[TokenType]) -> list[float]:
    """What SentencePiece merges by: the token with the highest score first. tokenizer.json keeps their order alone.

    llama.cpp's converter gives all of them one score where there is no tokenizer.model, which merges from the left.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    least = -float(len(model["merges"]))
    return [
        -float(ranks[token])
        if token in ranks
        else (least if kind == TokenType.NORMAL else 0.0 if kind == TokenType.BYTE else -1000.0)
        for token, kind in zip(tokens, types, strict=True)
    ]


def _space_prefix(described: dict[str, Any], chat_template: Any, where: str) -> bool:
    """Whether llama.cpp puts a space before a text; it does so after every special token as well.

    A tokenizer that does so only at the very beginning ("first") has no counterpart: there the conversations of a chat
    model, which begin with a special token, are put right, else plain texts.
    """
    normalizer, before = described["normalizer"] or {}, described["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" and step["prepend"] == SPACE for step in steps):
        return True
    steps = before.get("pretokenizers", [before])
    scheme = next((step["prepend_scheme"] for step in steps if step.get("type") == "Metaspace"), "never")
    return scheme == "always" or (scheme == "first" and not chat_template)


def _add_special(
    writer: gguf.GGUFWriter, tokenizer: Any, config: dict[str, Any], rows: int, merges: bool
) -> None:
    """Merges, the numbers of the special tokens, whether texts begin and end with them, and the chat template."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)  # one form, whichever files it came from
        special = gguf.SpecialVocab(scratch, load_merges=merges, n_vocab=rows)
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for role in ids:
        said = config.get(f"{role}_token_id")
        ids[role] = (said if isinstance(said, int) else None) if ids[role] is None else ids[role]
    special.special_token_ids = {role: number for role, number in ids.items() if number is not None}
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    before, after = whole[:at], whole[at + len(plain) :]
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer puts the tokens {before + after} around a text, expected none or "
            "its BOS and EOS"
        )
    # Always said: some pre-tokenizers' names imply the one or the other.
    special.add_special_token = {"bos": bool(before), "eos": bool(after)}
    special.chat_template = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else special.chat_template
    )
    special.add_to_gguf(writer, quiet=True)
