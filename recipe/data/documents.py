"""Tokenised rows on disk: a few flat arrays, memory-mapped, so that a rank holds in RAM what it looks at and no more.

ids.bin       uint32  the tokens of all documents, one document behind the other
in_loss.bin   uint8   for each token, whether it is in the loss
bounds.bin    int64   where each document begins, and the end of the last
learnt.bin    uint32  for each document, its tokens in the loss
rows.bin      uint32  for each document, the number of its row (rows that could not be used have none)
first.bin     uint32  of a pair of answers, which is one document here, the tokens of the chosen one; 0 of all others
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from recipe.data.encode import IGNORED

TYPES = {
    "ids": np.dtype("<u4"),
    "in_loss": np.dtype("u1"),
    "bounds": np.dtype("<i8"),
    "learnt": np.dtype("<u4"),
    "rows": np.dtype("<u4"),
    "first": np.dtype("<u4"),
}


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass
class Documents:
    ids: np.ndarray
    in_loss: np.ndarray
    bounds: np.ndarray
    learnt: np.ndarray
    rows: np.ndarray
    first: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Documents:
        return cls(*(mapped(folder / f"{name}.bin", dtype) for name, dtype in TYPES.items()))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> tuple[list[int], list[int]]:
        """input_ids and labels."""
        piece = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        ids: np.ndarray = self.ids[piece].astype(np.int64)
        return ids.tolist(), np.where(self.in_loss[piece] != 0, ids, IGNORED).tolist()

    def parts(self, number: int) -> list[tuple[list[int], list[int]]]:
        """The document, or both of a pair: chosen, rejected."""
        ids, labels = self[number]
        cut = int(self.first[number])
        return [(ids[:cut], labels[:cut]), (ids[cut:], labels[cut:])] if cut else [(ids, labels)]

    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def longest(self) -> np.ndarray:
        """Tokens of each document's longest part."""
        return np.maximum(self.first, self.lengths() - self.first)


@dataclass
class Encoded:
    """Some documents, as a process that tokenises hands them over; rows count from the first of its rows."""

    ids: np.ndarray
    in_loss: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, documents: list[tuple[int, list[int], list[int], int]]) -> Encoded:
        """From (row, input_ids, labels, tokens of the chosen answer of a pair or 0)."""
        lengths = np.array([len(ids) for _, ids, _, _ in documents], np.int64)
        ids: np.ndarray = np.fromiter(
            (i for _, document, _, _ in documents for i in document), TYPES["ids"], int(lengths.sum())
        )
        in_loss = np.fromiter(
            (label != IGNORED for _, _, labels, _ in documents for label in labels),
            TYPES["in_loss"],
            len(ids),
        )
        rows, first = (np.array([document[at] for document in documents], np.int64) for at in (0, 3))
        return cls(ids, in_loss, lengths, rows, first)

    @property
    def learnt(self) -> np.ndarray:
        """Tokens in the loss, for each document (none is empty)."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.add.reduceat(self.in_loss, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)


class Writer:
    """Appends documents to the files of a folder."""

    def __init__(self, folder: Path):
        self.folder, self.tokens, self.documents = folder, 0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        self._files = {
            name: self._stack.enter_context((self.folder / f"{name}.bin").open("wb")) for name in TYPES
        }
        self._write("bounds", np.zeros(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, part: Encoded, first_row: int) -> None:
        self._write("ids", part.ids)
        self._write("in_loss", part.in_loss)
        self._write("bounds", self.tokens + np.cumsum(part.lengths))
        self._write("learnt", part.learnt)
        self._write("rows", part.rows + first_row)
        self._write("first", part.first)
        self.tokens += len(part.ids)
        self.documents += len(part.lengths)

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.astype(TYPES[name], copy=False).tobytes())
