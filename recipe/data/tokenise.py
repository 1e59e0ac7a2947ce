"""Rows become documents, here or in several processes, and what was seen on the way is counted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from recipe.data.documents import Encoded
from recipe.data.encode import IGNORED, encode, load_tokenizer
from recipe.data.preference import check_row, encode_pair
from recipe.data.read import Raw, raw_rows
from recipe.data.rows import Row, row_of
from recipe.data.sources import Origin
from recipe.settings import Data

CHUNK_ROWS = 500
PARALLEL_BYTES = 16 * 2**20  # of the files; less is done before other processes have started
PENDING = 3  # chunks per process that are read ahead


@dataclass
class Tally:
    """What a pass has seen beside the documents."""

    rows: int = 0
    turns: int = 0
    long: int = 0
    longest: tuple[int, str] = (0, "")  # tokens and place of the longest overlong row
    unlearnt: int = 0
    ignored_choice: bool = False
    # How rows put a question (Prepared.form): all conversations; the opening message where all have the same.
    messages: bool = True
    opening: Any = None

    def add(self, other: Tally) -> None:
        if self.rows == 0:
            self.opening = other.opening
        elif other.opening != self.opening:
            self.opening = None
        self.rows += other.rows
        self.turns += other.turns
        self.long += other.long
        self.longest = max(self.longest, other.longest, key=lambda item: item[0])
        self.unlearnt += other.unlearnt
        self.ignored_choice |= other.ignored_choice
        self.messages &= other.messages


def sum_of(tallies: list[Tally]) -> Tally:
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    return whole


Part = tuple[Encoded, Tally]


@contextlib.contextmanager
def encoder(
    data: Data,
    method: str,
    tokenizer: PreTrainedTokenizerBase,
    model: Path,
    origins: list[Origin],
    new_tokens: Sequence[str] = (),
) -> Iterator[Callable[[Origin], Iterator[Part]]]:
    """A function that gives the encoded parts of an origin, in the order of its rows."""
    processes = len(os.sched_getaffinity(0))
    with tqdm(
        unit=" rows", desc="data", disable=not sys.stderr.isatty(), dynamic_ncols=True, delay=2, leave=False
    ) as bar:
        if sum(origin.bytes for origin in origins) < PARALLEL_BYTES or processes < 2:
            yield lambda origin: _counted(
                bar, (encoded(chunk, origin.columns, data, method, tokenizer) for chunk in _chunks(origin))
            )
            return
        context = get_context("forkserver")  # which imports once what all need
        context.set_forkserver_preload([__name__])
        executor = ProcessPoolExecutor(processes, context, _start, (model, data, method, new_tokens))
        try:
            yield lambda origin: _counted(bar, _in_order(executor, processes, origin))
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _counted(bar: tqdm, parts: Iterator[Part]) -> Iterator[Part]:
    for part in parts:
        bar.update(part[1].rows)
        yield part


def _chunks(origin: Origin) -> Iterator[list[Raw]]:
    rows = raw_rows(origin)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def _in_order(executor: ProcessPoolExecutor, processes: int, origin: Origin) -> Iterator[Part]:
    """Only some chunks are read ahead: reading is faster than tokenising, and the rest would wait in RAM."""
    waiting: deque[Future[Part]] = deque()
    for chunk in _chunks(origin):
        waiting.append(executor.submit(_encoded_elsewhere, chunk, origin.columns))
        if len(waiting) >= PENDING * processes:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_here: dict[str, Any] = {}  # of a process that tokenises


def _start(model: Path, data: Data, method: str, new_tokens: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(1)
    _here.update(data=data, method=method, tokenizer=load_tokenizer(model, data, new_tokens))


def _encoded_elsewhere(chunk: list[Raw], columns: dict[str, str]) -> Part:
    return encoded(chunk, columns, _here["data"], _here["method"], _here["tokenizer"])


def encoded(
    chunk: list[Raw], columns: dict[str, str], data: Data, method: str, tokenizer: PreTrainedTokenizerBase
) -> Part:
    """The documents of some rows. Overlong ones are cut or left out, or only counted where they stop the run."""
    tally, documents = Tally(), []
    for number, raw in enumerate(chunk):
        row = row_of(raw, columns)
        whole = documents_of(row, data, method, tokenizer)  # first, as it checks pairs
        tally.add(_seen(row, data))
        for found in whole:
            longest = max(len(ids) for ids, _ in found)
            if longest > data.max_length:
                tally.long += 1
                tally.longest = max(tally.longest, (longest, row.where), key=lambda item: item[0])
                if data.overlong != "truncate":
                    continue
                found = [(ids[: data.max_length], labels[: data.max_length]) for ids, labels in found]
            alike = len(found) > 1 and found[0] == found[1]
            if alike or any(all(label == IGNORED for label in labels) for _, labels in found):
                tally.unlearnt += 1
                continue
            first = len(found[0][0]) if len(found) > 1 else 0
            ids, labels = (list(chain.from_iterable(part)) for part in zip(*found, strict=True))
            documents.append((number, ids, labels, first))
    return Encoded.of(documents), tally


def documents_of(
    row: Row, data: Data, method: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[tuple[list[int], list[int]]]]:
    """What of a row must stay together: mostly one document; two answers of a pair; a long text may be several."""
    check_row(row, method)
    if method == "dpo":
        return [encode_pair(row, data, tokenizer)]
    document = encode(row, data, tokenizer)
    if data.overlong == "split" and "text" in row.values:
        return [[piece] for piece in pieces(*document, data.max_length)]
    return [[document]]


def pieces(ids: list[int], labels: list[int], tokens: int) -> list[tuple[list[int], list[int]]]:
    """A long text as documents of at most `tokens` tokens, each but the first beginning with the last token of the one
    before, which has its label there: so every token of the text but the first is in the loss once."""
    starts = range(0, max(len(ids) - 1, 1), tokens - 1)
    return [(ids[start : start + tokens], [IGNORED, *labels[start + 1 : start + tokens]]) for start in starts]


def _seen(row: Row, data: Data) -> Tally:
    messages = row.messages
    return Tally(
        rows=1,
        turns=len(messages) if messages else 0,
        ignored_choice=data.train_on != "assistant" and row.chosen,
        messages=messages is not None,
        opening=(messages[0]["role"], messages[0]["content"]) if messages else None,
    )
