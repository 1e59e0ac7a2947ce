"""Reads what the run will read: all rows, a sample of their lengths, the tokenizer and its template, the model's files.

Takes {"settings", "prepared", "hash_seconds"} as JSON on standard input and prints JSON, a line per part. In a process of
its own, since transformers takes seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.files import read_json
from recipe.preflight.program import say
from recipe.settings import Data, Settings, from_dict

SAMPLE = 200
CHARACTERS_PER_TOKEN = 4
CHUNK = 16 * 2**20
MESSAGE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def main(request: dict[str, Any]) -> None:
    settings = from_dict(request["settings"])
    prepared = Path(request["prepared"]) if request["prepared"] else None
    there = prepared is not None and (prepared / "config.json").is_file()
    rows = _rows(settings.data)
    if there and prepared:
        _tokenizer(settings, prepared, rows)
    elif rows:
        lengths = [len(row.text) / CHARACTERS_PER_TOKEN for row in rows]
        _say_lengths(lengths, settings, "characters / 4")
    if there and prepared:
        say(hashes=hashes(prepared, request["hash_seconds"]))


def _rows(data: Data) -> list[Any]:
    """All rows of local files, checked, of which a sample is kept; nothing of hub data sets, which training loads."""
    from recipe.data.rows import rows_of
    from recipe.data.sources import held_out_origins, training_origins

    if data.path is None and not data.sources:
        return []
    try:
        training, held_out = training_origins(data), held_out_origins(data)
        if not all(origin.files for origin in training):
            return []
        rows, count = _sample(rows_of(training))
        _, held = _sample(rows_of([origin for origin in held_out if origin.files]))
    except UserError as error:
        say(rows={"problem": str(error)})
        return []
    say(rows={"count": count, "held_out": held})
    return rows


def _tokenizer(settings: Settings, prepared: Path, rows: list[Any]) -> None:
    """Load it, render a conversation, and encode a sample as training will."""
    from recipe.data.chat import render
    from recipe.data.encode import load_tokenizer
    from recipe.data.tokenise import documents_of

    try:
        tokenizer = load_tokenizer(prepared, settings.data, settings.lora.new_tokens)
        conversation = next((row.messages for row in rows if row.messages), None)
        if conversation or tokenizer.chat_template:
            text = render(conversation or MESSAGE, tokenizer, "the first conversation")
            say(tokenizer={"characters": len(text), "template": True})
        else:
            say(tokenizer={"characters": 0, "template": False})
        if rows:
            documents = (documents_of(row, settings.data, settings.train.method, tokenizer) for row in rows)
            lengths = [float(max(len(ids) for part in parts for ids, _ in part)) for parts in documents]
            _say_lengths(lengths, settings, "the tokenizer")
    except UserError as error:
        say(tokenizer={"problem": str(error)})
    except Exception as error:  # the libraries raise many kinds for a damaged tokenizer
        line = str(error).strip().splitlines()
        say(tokenizer={"problem": f"{prepared}: {type(error).__name__}: {line[0][:150] if line else ''}"})


def hashes(folder: Path, seconds: float) -> dict[str, Any]:
    """sha256 of the files against prepare's record, as many as the time allows; the small ones first."""
    record = folder / "prepare.json"
    if not record.is_file():
        return {"files": 0, "verified": 0, "wrong": []}
    files = read_json(record)["files"]
    end, verified, wrong = time.monotonic() + seconds, 0, []
    for name in sorted(files, key=lambda name: files[name]["bytes"]):
        digest = _sha256(folder / name, end)
        if digest is None:
            break
        verified += 1
        if digest != files[name]["sha256"]:
            wrong.append(name)
    return {"files": len(files), "verified": verified, "wrong": wrong}


def _sha256(path: Path, end: float) -> str | None:
    """None where the time is over before the file is."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                if time.monotonic() > end:
                    return None
    except OSError:
        return ""
    return digest.hexdigest()


def _sample(rows: Iterable[Any]) -> tuple[list[Any], int]:
    """Some rows, evenly from the whole, since they are often sorted by something; and how many there are."""
    kept: list[Any] = []
    count, every = 0, 1
    for row in rows:
        if count % every == 0:
            kept.append(row)
            if len(kept) == 2 * SAMPLE:
                kept, every = kept[::2], 2 * every
        count += 1
    return kept[:: max(1, len(kept) // SAMPLE)][:SAMPLE], count


def _say_lengths(lengths: list[float], settings: Settings, by: str) -> None:
    over = sum(length > settings.data.max_length for length in lengths)
    say(
        lengths={
            "sample": len(lengths),
            "over": over,
            "mean": sum(lengths) / len(lengths),
            "longest": max(lengths),
            "by": by,
        }
    )


if __name__ == "__main__":
    main(json.load(sys.stdin))
