"""A preparation of data as `recipe train` makes it, read back whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from recipe.data.documents import Documents, Encoded, Writer
from recipe.data.pack import MicroBatches, Plan
from recipe.data.prepare import prepared
from recipe.settings import Settings


def prepared_once(settings: Settings, tokenizer) -> SimpleNamespace:
    """Documents of both splits in the order of their rows, `parts` of those to train on (both answers of a pair), their
    packed rows, and what was said; nothing is read from a cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        with prepared(settings, tokenizer, Path(folder)) as data:
            found: dict[str, list[Any]] = {
                name: [data.split(name).documents[int(i)] for i in sorted(data.split(name).plan.order)]
                for name in ("train", "held_out")
            }
            train = data.split("train")
            found["parts"] = [train.documents.parts(int(i)) for i in sorted(train.plan.order)]
            found["packed"] = [train[number] for number in range(len(train))]
            return SimpleNamespace(notes=data.notes, form=data.form, stats=data.stats, **found)


def micro_batches(rows: list[dict[str, Any]]) -> MicroBatches:
    """These packed rows, as a run has them."""
    documents, starts = [], [0]
    for row in rows:
        at = 0
        for length in row["seq_lengths"]:
            piece = slice(at, at + length)
            documents.append((len(documents), row["input_ids"][piece], row["labels"][piece], 0))
            at += length
        starts.append(len(documents))
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder)) as writer:
            writer.write(Encoded.of(documents), 0)
        stored = Documents.open(Path(folder))  # the files stay mapped
    return MicroBatches(stored, Plan(np.arange(len(documents), dtype=np.uint32), np.array(starts)))
