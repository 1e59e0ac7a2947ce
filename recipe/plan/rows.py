"""About how many tokens the training rows have, without a tokenizer: from the text of the first megabyte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipe.settings import Settings, Source

SAMPLE_BYTES = 2**20
CHARACTERS_PER_TOKEN = 4  # of English prose; code and other languages have fewer, which makes an epoch longer
DEMO = Path(__file__).parent.parent / "demo" / "train.jsonl"


def data_tokens(settings: Settings) -> float | None:
    """Tokens of the rows that are trained on, once; None where they are not JSONL files on this machine."""
    data = settings.data
    total = 0.0
    for source in data.sources or [Source(path=data.path)]:
        tokens = _tokens(source.path)
        if tokens is None:
            return None
        total += source.weight * tokens
    held_out = 0.0 if data.eval_path or data.path == "demo" else data.eval_fraction
    return (1 - held_out) * total or None


def _tokens(path: str | None) -> float | None:
    file = DEMO if path == "demo" else Path(path) if path else None
    if file is None or file.suffix not in (".jsonl", ".json") or not file.is_file():
        return None
    size = file.stat().st_size
    with open(file, "rb") as source:
        sample = source.read(SAMPLE_BYTES)
    if len(sample) < size:
        sample = sample[: sample.rfind(b"\n") + 1]
    characters = sum(_characters(line) for line in sample.splitlines())
    share = characters / len(sample) if sample else 0.0
    return size * share / CHARACTERS_PER_TOKEN


def _characters(line: bytes) -> int:
    try:
        return _length(json.loads(line))
    except ValueError:  # a line that is no row: `train` names it
        return 0


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 0
