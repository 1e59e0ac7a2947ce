"""Micro-batches without padding: a plan of which documents stand together, and the rows that are made by it.

No token is copied: a plan is two arrays, the numbers of the documents micro-batch by micro-batch, and where each of
those begins. Documents are packed best fit decreasing in windows of their shuffled order, so that what is packed
together is near in that order. The micro-batches are put in the order of how full they are: neighbours have about the
same number of tokens, whatever number of ranks takes neighbours side by side.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithFlattening

from recipe.data.documents import Documents, mapped

WINDOW = 32_768  # documents; enough that hardly a slot stays empty, and few enough to be packed in a second
ORDER, STARTS = np.dtype("<u4"), np.dtype("<i8")
FILL_STEPS = 128  # micro-batches within a 128th of each other count as equally full
FILLED, ALIKE = 0.97, 0.02  # of the slots, at least; between micro-batches side by side, at most
LEVELLED = 4096  # micro-batches, the least full ones, whose documents are spread anew
COARSE = 64  # of them where documents are so long that few stand together
PATIENCE = 4_000_000  # lengths looked at
Bins = list[list[int]]


@dataclass
class Plan:
    """`order[starts[i]:starts[i + 1]]` are the documents of micro-batch i."""

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def open(cls, folder: Path, name: str) -> Plan:
        return cls(mapped(folder / f"{name}.order.bin", ORDER), mapped(folder / f"{name}.starts.bin", STARTS))

    def save(self, folder: Path, name: str) -> None:
        (folder / f"{name}.order.bin").write_bytes(self.order.astype(ORDER).tobytes())
        (folder / f"{name}.starts.bin").write_bytes(self.starts.astype(STARTS).tobytes())

    def __len__(self) -> int:
        return len(self.starts) - 1


def planned(numbers: np.ndarray, lengths: np.ndarray, tokens: int, seed: int) -> Plan:
    """Micro-batches of at most `tokens` tokens out of the documents `numbers`, whose lengths are `lengths`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(len(numbers))
    packed: Bins = []
    waiting: list[int] = []  # of a window's last, half-full micro-batches: they join the next one
    for start in range(0, len(shuffled), WINDOW):
        window = waiting + shuffled[start : start + WINDOW].tolist()
        bins = packed_best(window, lengths, tokens)
        waiting = []
        if start + WINDOW < len(shuffled):
            full = [bin for bin in bins if lengths[bin].sum() >= 0.99 * tokens] or bins
            kept = {id(bin) for bin in full}
            waiting = [i for bin in bins if id(bin) not in kept for i in bin]
            bins = full
        packed += bins
    fill = np.array([int(lengths[bin].sum()) for bin in packed], np.int64)
    # The fullest first; equally full ones as chance has it.
    rank = np.lexsort((generator.random(len(packed)), -(fill * FILL_STEPS // tokens)))
    ordered = levelled([packed[i] for i in rank], lengths, tokens)
    starts = np.concatenate([[0], np.cumsum([len(bin) for bin in ordered], dtype=np.int64)])
    flat = np.fromiter((i for bin in ordered for i in bin), np.int64, len(numbers))
    return Plan(numbers[flat].astype(ORDER), starts.astype(STARTS))


def packed_best(window: list[int], lengths: np.ndarray, tokens: int) -> Bins:
    """Best fit, and where that leaves much room, a better one that takes its time."""
    bins = best_fit(window, lengths, tokens)
    distinct = len(set(lengths[window].tolist()))
    if sum_of(window, lengths) < 0.99 * tokens * len(bins) and len(bins) * distinct < PATIENCE:
        bins = min(bins, closest_fit(window, lengths, tokens), key=len)
    return bins


def best_fit(window: list[int], lengths: np.ndarray, tokens: int) -> Bins:
    """The longest first, each to the micro-batch with least room that still takes it."""
    bins: Bins = []
    rooms: list[int] = []  # that occur, ascending
    with_room: dict[int, list[int]] = {}
    for i, length in _longest_first(window, lengths):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([i])
            bin, room = len(bins) - 1, tokens
        else:
            room = rooms[at]
            bin = with_room[room].pop()
            bins[bin].append(i)
            if not with_room[room]:
                del with_room[room], rooms[at]
        left = room - length
        if left:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(bin)
    return bins


def _longest_first(documents: list[int], lengths: np.ndarray) -> list[tuple[int, int]]:
    sizes = lengths[documents]
    order = np.argsort(-sizes, kind="stable")
    return list(zip(np.array(documents)[order].tolist(), sizes[order].tolist(), strict=True))


def closest_fit(window: list[int], lengths: np.ndarray, tokens: int) -> Bins:
    """The longest, and those of the others that fill the rest best; for documents so long that few stand together.

    Of sums that can be had, a set of bits: bit n for n tokens.
    """
    left: dict[int, list[int]] = {}
    for i, length in _longest_first(window, lengths):
        left.setdefault(length, []).append(i)
    bins: Bins = []
    while left:
        longest = next(iter(left))
        room = tokens - longest
        bins.append([left[longest].pop()])
        sums, reached = 1, []
        for length, documents in left.items():
            reached.append(sums)
            for _ in range(min(len(documents), room // length)):
                sums |= sums << length
            sums &= (2 << room) - 1
            if sums >> room:
                break
        best = sums.bit_length() - 1
        # From the shortest on, each taken as seldom as can be: short ones are wanted later.
        for length, before in reversed(list(zip(left, reached, strict=False))):
            while not before >> best & 1:
                bins[-1].append(left[length].pop())
                best -= length
        for length in [length for length, documents in left.items() if not documents]:
            del left[length]
    return bins


def levelled(bins: Bins, lengths: np.ndarray, tokens: int) -> Bins:
    """The last micro-batches, what they miss spread over them: one of them may else be nearly empty.

    They are left as they are where nothing makes them alike.
    """
    if len(bins) < 2 or spread(bins[-LEVELLED:], lengths) <= ALIKE:
        return bins
    count = min(LEVELLED, len(bins))
    while count > 1:
        found = evenly([i for bin in bins[-count:] for i in bin], lengths, count)
        if sum_of(found[0], lengths) <= tokens and spread(found, lengths) <= ALIKE:
            return bins[:-count] + found
        count //= 2
    count = min(COARSE, len(bins))
    loose = [i for bin in bins[-count:] for i in bin]
    total = sum_of(loose, lengths)
    whole = total + sum(sum_of(bin, lengths) for bin in bins[:-count])
    for more in range(count):
        if whole < FILLED * (len(bins) + more) * tokens and more:
            break
        least = max(-(-total // (count + more)), int(lengths[loose].max()))
        for most in range(least, min(tokens, int(least * (1 + ALIKE))) + 1, 1 + least // 256):
            found = closest_fit(loose, lengths, most)
            if len(found) <= count + more and spread(found, lengths) <= ALIKE:
                return bins[:-count] + sorted(found, key=lambda bin: -sum_of(bin, lengths))
    return bins


def evenly(documents: list[int], lengths: np.ndarray, count: int) -> Bins:
    """Each document, the longest first, to the one of `count` that has fewest tokens; the fullest first."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, bin) for bin in range(count)]
    for i, length in _longest_first(documents, lengths):
        filled, bin = heap[0]
        heapq.heapreplace(heap, (filled + length, bin))
        bins[bin].append(i)
    return [bins[bin] for _, bin in sorted(heap, reverse=True)]


def sum_of(bin: list[int], lengths: np.ndarray) -> int:
    return int(lengths[bin].sum())


def spread(bins: Bins, lengths: np.ndarray) -> float:
    """How much less the emptiest has than the fullest, as a share."""
    fill = [sum_of(bin, lengths) for bin in bins]
    return 1 - min(fill) / max(fill)


class MicroBatches(torch.utils.data.Dataset):
    """Packed rows, made when they are asked for: input_ids, labels and seq_lengths, the lengths of the documents.

    The two answers of a pair are two of these documents, one behind the other.
    """

    def __init__(self, documents: Documents, plan: Plan):
        self.documents, self.plan = documents, plan

    @classmethod
    def open(cls, folder: Path, name: str) -> MicroBatches:
        """`train` or `held_out` of a run's data folder."""
        return cls(Documents.open(folder), Plan.open(folder, name))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for ids, labels in self.documents_of(number):
            row["input_ids"] += ids
            row["labels"] += labels
            row["seq_lengths"].append(len(ids))
        return row

    def documents_of(self, number: int) -> Iterator[tuple[list[int], list[int]]]:
        for document in self.plan.order[self.plan.starts[number] : self.plan.starts[number + 1]]:
            yield from self.documents.parts(int(document))

    def tokens(self) -> np.ndarray:
        """Of each micro-batch; no token is read for it."""
        return self._over(np.add, self.documents.lengths())

    def longest(self) -> np.ndarray:
        """The longest document of each; of a pair the longer answer."""
        return self._over(np.maximum, self.documents.longest())

    def _over(self, how: np.ufunc, lengths: np.ndarray) -> np.ndarray:
        if not len(self):
            return np.zeros(0, np.int64)
        return how.reduceat(lengths[self.plan.order], self.plan.starts[:-1])


class WholeBatches(torch.utils.data.Sampler):
    """The order of an epoch: global batches in an order of their own, each of neighbours in the plan.

    Consecutive micro-batches go to consecutive ranks, so a global batch is the same on any number of them. What an
    epoch lacks of a whole number of global batches it has of micro-batches that come twice, other ones each epoch.
    """

    def __init__(self, count: int, per_batch: int, seed: int):
        self.count, self.per_batch, self.seed, self.epoch = count, per_batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.per_batch) * self.per_batch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.Generator(np.random.PCG64((self.seed, self.epoch)))
        batches = len(self) // self.per_batch
        shifted = generator.integers(1, batches) if batches > 1 else 1
        for batch in generator.permutation(batches).tolist():
            start = batch * self.per_batch
            if batch >= shifted:
                start -= len(self) - self.count
            for number in range(start, start + self.per_batch):
                yield number % self.count


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
