"""One pass over the rows: read, check, encode, write; then what is held out, how often each document comes, the packing.

Never all rows are in RAM. Several processes tokenise where there is enough to do. What was prepared once is found again
under `<paths.models>/data-cache/` by a hash over the files, the tokenizer and all settings that matter; a run has hard
links to it, so it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from recipe.data.documents import Documents, Writer
from recipe.data.encode import load_tokenizer, untrained_template_note
from recipe.data.pack import MicroBatches, planned
from recipe.data.sources import Origin, held_out_origins, held_out_path, training_origins
from recipe.data.stats import statistics
from recipe.data.tokenise import Tally, encoder, sum_of
from recipe.errors import UserError
from recipe.files import publish, read_json, require_space, sha256_of, write_json
from recipe.settings import Data, Settings

FORMAT = 1  # of what is cached; another number is another key
DISK_PER_BYTE = 2.0  # of the files: about four bytes make a token, which takes five; and the plans
STALE_SECONDS = 24 * 3600
KEPT = 16  # preparations in the cache; the one that was used longest ago goes first
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
META = "meta.json"
SPLITS = ("train", "held_out")


@dataclass
class Prepared:
    """What stands in a folder: documents, plans for both splits, and what is to be said of them.

    `form` says how the training rows put a question, so that `chat` does the same: whether all are conversations
    (`messages`), and the system message that all begin with (`system`, or None).
    """

    folder: Path
    notes: list[str]
    form: dict[str, Any]
    stats: dict[str, Any]
    hashes: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> MicroBatches:
        return MicroBatches.open(self.folder, name)

    def first(self, count: int) -> Iterator[tuple[list[int], list[int]]]:
        """The first training documents, in the order of their rows."""
        split = self.split("train")
        order = split.plan.order
        nearest = np.partition(order, min(8 * count, len(order) - 1))[: 8 * count]
        return (split.documents[int(number)] for number in np.unique(nearest)[:count])

    def link_into(self, folder: Path) -> None:
        """Hard links, or copies where another disk holds the run."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.bin")):
            target = folder / path.name
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        write_json(folder / "stats.json", self.stats)


@contextlib.contextmanager
def prepared(settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Path) -> Iterator[Prepared]:
    """The data of a run, from the cache or made now; `model` is the folder that the tokenizer comes from.

    What was made is kept where the block ends well. Raises UserError naming the row that cannot be used.
    """
    origins, held_out = training_origins(settings.data), held_out_origins(settings.data)
    hashes = [origin.sha256() for origin in [*origins, *held_out]]
    cached = cache_folder(settings) / _key(settings, tokenizer, model, hashes)
    if (cached / META).is_file():
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(cached / META)
        found = _opened(cached)
        _refuse_overlong(settings.data, found.stats["overlong"])
        yield found
        return
    aside = _aside(settings, cached)
    made = not aside.parent.exists()
    try:
        for left in aside.parent.glob(".*.partial"):  # by one that was killed
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        require_space(
            aside, DISK_PER_BYTE * sum(o.bytes for o in [*origins, *held_out]), "the tokenised rows"
        )
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _make(aside, settings, tokenizer, model, origins, held_out, hashes)
        found = _opened(aside)
        _refuse_overlong(settings.data, found.stats["overlong"])
        yield found
        if aside.parent == cached.parent:
            publish(aside, cached)
            _prune(cached.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                aside.parent.rmdir()  # only where nothing stands in it


def _prune(cache: Path) -> None:
    used = sorted(cache.glob(f"*/{META}"), key=lambda meta: meta.stat().st_mtime)
    for meta in used[:-KEPT]:
        shutil.rmtree(meta.parent, ignore_errors=True)


def hashes_of(data: Data) -> dict[str, list[str]]:
    """SHA-256 of each source, as a run's manifest has them. Raises UserError where one is missing."""
    found = {"train": training_origins(data), "held_out": held_out_origins(data)}
    return {split: [origin.sha256() for origin in origins] for split, origins in found.items()}


def cache_folder(settings: Settings) -> Path:
    return Path(settings.paths.models) / "data-cache"


def is_cached(settings: Settings, model: Path) -> bool:
    """Whether all rows were read and found good before. Raises UserError where a source is missing."""
    if not (cache_folder(settings).is_dir() and (model / "tokenizer.json").is_file()):
        return False
    hashes = [o.sha256() for o in [*training_origins(settings.data), *held_out_origins(settings.data)]]
    tokenizer = load_tokenizer(model, settings.data, settings.lora.new_tokens)
    key = _key(settings, tokenizer, model, hashes)
    return (cache_folder(settings) / key / META).is_file()


def _aside(settings: Settings, cached: Path) -> Path:
    """Where it is made: beside the cached, or among the runs where the models may only be read."""
    name = f".{cached.name}-{os.getpid()}.partial"
    existing = next(p for p in (cached.parent, *cached.parent.absolute().parents) if p.exists())
    return (cached.parent if os.access(existing, os.W_OK) else Path(settings.paths.runs)) / name


def _key(settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Path, hashes: list[str]) -> str:
    data = asdict(settings.data)
    if data["overlong"] == "error":  # the same documents, where there is no error
        data["overlong"] = "drop"
    parts = {
        "format": FORMAT,
        "hashes": hashes,
        "data": data,
        "tokens": settings.micro_batch_tokens,
        "seed": settings.train.seed,
        "method": settings.train.method,
        "template": tokenizer.chat_template,
        "tokenizer": [sha256_of(model / name) for name in TOKENIZER_FILES if (model / name).is_file()],
    }
    if settings.lora.new_tokens:
        parts["new_tokens"] = settings.lora.new_tokens
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _opened(folder: Path) -> Prepared:
    meta = read_json(folder / META)
    return Prepared(folder, **meta)


def _make(
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    model: Path,
    origins: list[Origin],
    held_out: list[Origin],
    hashes: list[str],
) -> None:
    data = settings.data
    new_tokens = settings.lora.new_tokens
    notes = [untrained_template_note(tokenizer, new_tokens)] if data.chat_template else []
    notes = [note for note in notes if note]
    tallies: list[Tally] = []
    with (
        Writer(folder) as writer,
        encoder(data, settings.train.method, tokenizer, model, [*origins, *held_out], new_tokens) as encoded,
    ):
        first = 0
        for origin in [*origins, *held_out]:
            tally = Tally()
            for part, seen in encoded(origin):
                writer.write(part, first + tally.rows)
                tally.add(seen)
            first += tally.rows
            tallies.append(tally)
    training = sum_of(tallies[: len(origins)])
    passes = [training, *tallies[len(origins) :]]
    overlong = [
        {"where": tally.longest[1], "tokens": tally.longest[0], "count": tally.long, "rows": tally.rows}
        for tally in passes
        if tally.long
    ]
    for tally in passes:
        notes += _notes(tally, settings)
    documents = Documents.open(folder)
    train, held = split(settings, documents.rows, [tally.rows for tally in tallies], len(origins))
    for numbers in (train, *([held] if held_out else [])):
        if not len(numbers):
            _refuse_overlong(data, overlong)
            raise UserError(
                "data: no row is left with a token in the loss, expected at least one; raise data.max_length"
            )
    counted, said = weighted(settings, documents.rows, train, [tally.rows for tally in tallies], origins)
    notes += said
    lengths = documents.lengths()
    for name, numbers in zip(SPLITS, (counted, held), strict=True):
        planned(numbers, lengths[numbers], settings.micro_batch_tokens, settings.train.seed).save(
            folder, name
        )
    opening = training.opening
    stats = statistics(documents, MicroBatches.open(folder, "train"), settings, train, held, tallies, origins)
    stats["overlong"] = overlong
    write_json(
        folder / META,
        {
            "notes": notes,
            "form": {
                "messages": training.messages,
                "system": opening[1] if training.messages and opening and opening[0] == "system" else None,
            },
            "stats": stats,
            "hashes": {"train": hashes[: len(origins)], "held_out": hashes[len(origins) :]},
        },
    )


def _refuse_overlong(data: Data, overlong: list[dict[str, Any]]) -> None:
    for long in overlong if data.overlong in ("error", "split") else []:
        raise UserError(
            f"{long['where']}: has {long['tokens']} tokens, and {long['count']} of {long['rows']} rows are longer than "
            f"data.max_length ({data.max_length}); raise it, or set data.overlong to drop or truncate"
        )


def _notes(tally: Tally, settings: Settings) -> list[str]:
    data, notes = settings.data, []
    if tally.long:
        notes.append(
            f"{tally.long} of {tally.rows} rows are longer than {data.max_length} tokens: {data.overlong}"
        )
    if tally.unlearnt and settings.train.method == "dpo":
        notes.append(
            f"{tally.unlearnt} of {tally.rows} pairs have two answers alike, or one without a token in the loss: left out"
        )
    elif tally.unlearnt:
        notes.append(f"{tally.unlearnt} of {tally.rows} rows have no token in the loss: left out")
    if tally.ignored_choice:
        notes.append("messages with `weight` or `train` count only with data.train_on: assistant")
    return notes


def held_out_rows(settings: Settings, total: int) -> np.ndarray:
    """For each of so many training rows, whether it is held out where there is no data.eval_path."""
    held: np.ndarray = np.zeros(total, bool)
    fraction = settings.data.eval_fraction
    if fraction and total > 1 and held_out_path(settings.data) is None:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(settings.train.seed)).numpy()
        held[order[: max(1, round(total * fraction))]] = True
    return held


def split(
    settings: Settings, rows: np.ndarray, counts: list[int], sources: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on and of those held out; `counts` are the rows of all sources, in order."""
    total = sum(counts[:sources])
    training = int(np.searchsorted(rows, total))  # the documents of data.eval_path stand behind
    numbers: np.ndarray = np.arange(len(rows), dtype=np.uint32)
    outside = held_out_rows(settings, total)[rows[:training]]
    return numbers[:training][~outside], np.concatenate([numbers[:training][outside], numbers[training:]])


def weighted(
    settings: Settings, rows: np.ndarray, train: np.ndarray, counts: list[int], origins: list[Origin]
) -> tuple[np.ndarray, list[str]]:
    """The training documents as often as their source's weight says, and what is to be said of it."""
    if all(origin.weight == 1 for origin in origins):
        return train, []
    generator = np.random.Generator(np.random.PCG64(settings.train.seed))
    parts, notes, end = [], [], 0
    for origin, count in zip(origins, counts, strict=False):
        begin, end = end, end + count
        own = train[np.searchsorted(rows[train], begin) : np.searchsorted(rows[train], end)]
        whole, share = divmod(origin.weight, 1)
        some = generator.permutation(len(own))[: round(share * len(own))]
        part = np.concatenate([np.tile(own, int(whole)), own[np.sort(some)]])
        parts.append(part)
        notes.append(
            f"{origin.key.removesuffix('.path')} ({origin.path}) has weight {origin.weight:g}: {len(part):,} documents an epoch "
            f"of {len(own):,}"
        )
    return np.concatenate(parts), notes
