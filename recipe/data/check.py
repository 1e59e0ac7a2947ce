"""What is wrong with a data set, before a run is spent on it: each finding with how often, and where first.

A finding is an error where a run would stop, learn nonsense or measure itself wrongly, else a warning. Rows are read one
by one; of each only two hashes are kept.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from recipe.data.encode import chat_tokens
from recipe.data.preference import answers_of, check_row
from recipe.data.prepare import held_out_rows
from recipe.data.read import raw_rows
from recipe.data.rows import Row, row_of
from recipe.data.sources import Origin, held_out_origins, training_origins
from recipe.errors import UserError
from recipe.settings import Settings

PLACES = 5  # that are named of a finding
UNTRAINED = 0.1  # of the middle norm of an embedding's rows
SAME = 0.999  # cosine of two rows that were set alike and never trained apart
SAMPLE = 512  # ordinary tokens
SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an API key": re.compile(
        r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
        r"|AIza[0-9A-Za-z_-]{35}|glpat-[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
    ),
    "an e-mail address": re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,}\b"),
}


@dataclass
class Finding:
    kind: str
    level: str  # error or warning
    message: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def seen(self, where: str) -> None:
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(where)


def of_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    """What can be told of the rows as they stand in the files."""
    reading = _Reading(tokenizer, settings.train.method)
    training = reading.read(training_origins(settings.data))
    held_out = reading.read(held_out_origins(settings.data))
    found = list(reading.findings.values())
    held = held_out_rows(settings, len(training))
    where = _Places(settings)
    found += [_duplicates(training.exact[~held], np.flatnonzero(~held), where)]
    for name, mine in (("exact", training.exact), ("normalised", training.normalised)):
        other = held_out.exact if name == "exact" else held_out.normalised
        found.append(_leakage(name, mine, other, held, where))
    return [finding for finding in found if finding.count]


def of_tokens(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Path, stats: dict[str, Any]
) -> list[Finding]:
    """What a prepared model's tokenizer and embedding tell."""
    found = [_overlong(long, settings) for long in stats["overlong"]]
    if settings.data.chat_template:
        found.append(untrained(tokenizer, model, settings.lora.new_tokens))
    return [finding for finding in found if finding.count]


@dataclass
class Hashes:
    """64 bits of each row's text, as it stands and without case, spaces and punctuation."""

    exact: np.ndarray
    normalised: np.ndarray

    def __len__(self) -> int:
        return len(self.exact)


class _Reading:
    """Looks at every row once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, method: str):
        self.method = method
        kinds = {
            "malformed": ("error", "rows that cannot be used"),
            "empty": ("error", "answers without a word: the model would learn to say nothing"),
            "special": (
                "warning",
                "rows with special tokens of the tokenizer in their text, which end turns early",
            ),
        }
        kinds |= {name: ("warning", f"rows with what looks like {name}") for name in SECRETS}
        self.findings = {kind: Finding(kind, *rest) for kind, rest in kinds.items()}
        special = [token for token in (tokenizer.all_special_tokens if tokenizer else []) if len(token) > 3]
        self.special = re.compile("|".join(map(re.escape, special))) if special else None

    def read(self, origins: Iterable[Origin]) -> Hashes:
        exact, normalised = array("Q"), array("Q")
        for origin in origins:
            for raw in raw_rows(origin):
                try:
                    row = row_of(raw, origin.columns)
                    check_row(row, self.method)
                except UserError as error:
                    self.findings["malformed"].seen(str(error))
                    row = None
                text = self._look(row) if row else repr(raw[1])
                exact.append(_hash(text))
                normalised.append(_hash(re.sub(r"[\W_]+", "", text.casefold())))
        return Hashes(
            *(
                np.frombuffer(bits, np.uint64) if len(bits) else np.zeros(0, np.uint64)
                for bits in (exact, normalised)
            )
        )

    def _look(self, row: Row) -> str:
        text = "\n".join(answer.text for answer in answers_of(row)) if self.method == "dpo" else row.text
        for name, expression in SECRETS.items():
            if expression.search(text):
                self.findings[name].seen(row.where)
        if self.special and self.special.search(text):
            self.findings["special"].seen(row.where)
        for message in row.messages or []:
            if (
                message["role"] == "assistant"
                and not message["content"].strip()
                and "tool_calls" not in message
            ):
                self.findings["empty"].seen(row.where)
                break
        return text


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


class _Places:
    """Where rows stand, by their numbers; found by reading once more, and only where something is to be said."""

    def __init__(self, settings: Settings):
        self.origins = training_origins(settings.data), held_out_origins(settings.data)

    def __call__(self, numbers: np.ndarray, held_out_file: bool = False) -> list[str]:
        wanted, found = sorted(set(numbers.tolist())), []
        origins = self.origins[1] if held_out_file else self.origins[0]
        for number, (where, _) in enumerate(raw for origin in origins for raw in raw_rows(origin)):
            if not wanted:
                break
            if number == wanted[0]:
                found.append(where)
                wanted.pop(0)
        return found


def _duplicates(exact: np.ndarray, numbers: np.ndarray, where: Callable[..., list[str]]) -> Finding:
    finding = Finding("duplicates", "warning", "rows that stand there a second time")
    _, first = np.unique(exact, return_index=True)
    again = np.setdiff1d(np.arange(len(exact)), first)
    finding.count = len(again)
    finding.places = where(numbers[again[:PLACES]]) if len(again) else []
    return finding


def _leakage(
    name: str, training: np.ndarray, other: np.ndarray, held: np.ndarray, where: Callable[..., list[str]]
) -> Finding:
    """Held-out rows that are trained on too; `other` are those of data.eval_path, if that is set."""
    finding = Finding(
        f"leakage, {name}",
        "error",
        "held-out rows that are trained on as well"
        + ("" if name == "exact" else ", but for case, spaces and punctuation"),
    )
    own_file = len(other) > 0
    numbers = np.arange(len(other)) if own_file else np.flatnonzero(held)
    leaked = numbers[np.isin(other if own_file else training[held], training[~held])]
    finding.count = len(leaked)
    finding.places = where(leaked[:PLACES], own_file) if len(leaked) else []
    return finding


def _overlong(long: dict[str, Any], settings: Settings) -> Finding:
    level = "error" if settings.data.overlong == "error" else "warning"
    message = (
        f"rows of {long['rows']} longer than data.max_length ({settings.data.max_length}); the longest has {long['tokens']} tokens; "
        f"data.overlong is {settings.data.overlong}"
    )
    return Finding("overlong", level, message, long["count"], [long["where"]])


def untrained(tokenizer: PreTrainedTokenizerBase, model: Path, new_tokens: Sequence[str] = ()) -> Finding:
    """Tokens of the chat template whose embeddings look as if they were never trained (torchtune issue 2429), nor will be."""
    finding = Finding(
        "untrained",
        "warning",
        "chat tokens that the model has never trained: answers may not end; use an Instruct model or its own template, or "
        "name them in lora.new_tokens",
    )
    tokens = [token for token in chat_tokens(tokenizer.chat_template) if token not in new_tokens]
    known = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    for token in [token for token, number in known.items() if number in (None, tokenizer.unk_token_id)]:
        finding.seen(f"{token} is no token of this tokenizer")
        del known[token]
    ids = np.array(list(known.values()), np.int64)
    rows, ordinary = _embeddings(model, ids)
    if rows is None or not len(ids):
        return finding
    norms, middle = np.linalg.norm(rows, axis=1), float(np.median(np.linalg.norm(ordinary, axis=1)))
    unit = rows / np.maximum(norms, 1e-12)[:, None]
    alike = (unit @ unit.T > SAME) & ~np.eye(len(ids), dtype=bool)
    for token, norm, twin in zip(known, norms, alike.any(1), strict=True):
        if norm < UNTRAINED * middle:
            finding.seen(f"{token}: its embedding has the norm {norm:.2g}, others {middle:.2g}")
        elif twin:
            finding.seen(f"{token}: its embedding is that of another chat token")
    return finding


def _embeddings(model: Path, ids: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Rows of the embedding for `ids`, and for tokens spread over the vocabulary."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            name = next((name for name in weights.keys() if name.endswith("embed_tokens.weight")), None)  # noqa: SIM118
            if name is None:
                continue
            table = weights.get_slice(name)
            count = table.get_shape()[0]
            chosen = [int(i) for i in ids if i < count]
            spread = range(0, count, max(1, count // SAMPLE))
            own, others = (
                np.stack([table[i : i + 1][0].float().numpy() for i in numbers])
                if len(numbers)
                else np.zeros((0, 1))
                for numbers in (chosen, spread)
            )
            return (own if len(chosen) == len(ids) else None), others
    return None, np.zeros((0, 1))


def render(findings: list[Finding]) -> str:
    """As `recipe data check` prints it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.count:>6} {finding.message}  [{finding.kind}]")
        lines += [f"                  {place}" for place in finding.places]
        if finding.count > len(finding.places):
            lines.append(f"                  and {finding.count - len(finding.places)} more")
    return "\n".join(lines) if lines else "nothing found"
