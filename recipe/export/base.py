"""Is this unquantised checkpoint the very one that a prepared NF4 model was made from? Found from samples of every tensor.

Adapters that were trained on one revision load without a word on another, and answer worse. Nobody can undo the
quantisation, but everybody can repeat it: a sixteenth of each weight is quantised again and must give the stored codes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from recipe.errors import UserError
from recipe.export.tensors import Dequantised, Stored, values_of
from recipe.files import read_json
from recipe.prepare import RECORD
from recipe.prepare.nf4 import BLOCK, pack
from recipe.settings import Quantization

PIECE_VALUES = 2**20  # in a row; a small tensor is compared whole
EVERY = 16  # one piece of so many
MOST_OTHER_CODES = 1e-3  # share: a GPU's kernel puts a value between two codes to the other one now and then
MOST_OTHER_SCALE = 0.02  # share by which the mean absmax may differ: the second level rounds each of them


def check_base(source: Stored, nf4_folder: Path) -> None:
    """Raises UserError, naming the first tensor that differs, unless `nf4_folder` was made from `source`."""
    quantised = Dequantised(nf4_folder)
    check_shapes(source, quantised)
    names = quantised.names()
    threads = torch.get_num_threads()
    workers = len(os.sched_getaffinity(0))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = pool.map(lambda name: _difference(source, quantised, name), names)
            for name, difference in zip(names, found, strict=True):
                if difference:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise _wrong(source, nf4_folder, name, difference)
    finally:
        torch.set_num_threads(threads)


def check_shapes(source: Stored, quantised: Dequantised) -> None:
    """Raises UserError where the two have other tensors or other shapes; reads no weights."""
    here, there = set(source.names()), set(quantised.names())
    for name in sorted(there - here):
        raise _wrong(source, quantised.folder, name, "is missing")
    for name in sorted(here - there):
        if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints have it, no model of today reads it
            raise _wrong(source, quantised.folder, name, "is not in the NF4 model")
    for name in quantised.names():
        if source.shape(name) != quantised.shape(name):
            found, expected = list(source.shape(name)), list(quantised.shape(name))
            raise _wrong(source, quantised.folder, name, f"has shape {found}, in the NF4 model {expected}")


def _difference(source: Stored, quantised: Dequantised, name: str) -> str | None:
    """What is wrong with a tensor, or None."""
    total = torch.Size(source.shape(name)).numel()
    pieces = [(first, min(first + PIECE_VALUES, total)) for first in range(0, total, EVERY * PIECE_VALUES)]
    if not quantised.quantised(name):
        for first, end in pieces:
            expected = values_of(quantised.checkpoint, name, first, end)
            if not torch.equal(values_of(source.checkpoint, name, first, end).to(expected.dtype), expected):
                return "has other values"
        return None
    absmax = quantised.absmax(name)
    other = count = 0
    scales = torch.zeros(2, dtype=torch.float64)  # sums of the source's and of the stored
    for first, end in pieces:
        packed, largest = pack(values_of(source.checkpoint, name, first, end), Quantization())
        stored = torch.empty(len(packed), dtype=torch.uint8)
        quantised.checkpoint.read_bytes(name, first // 2, stored)
        other += int((packed != stored).sum())
        count += len(packed)
        scales += torch.stack([largest.double().sum(), absmax[first // BLOCK : end // BLOCK].double().sum()])
    if other > MOST_OTHER_CODES * count:
        return f"gives other 4-bit codes ({other / count:.1%} of the sampled bytes)"
    here, there = scales.tolist()
    if abs(here - there) > MOST_OTHER_SCALE * there:
        return f"has other scales ({here / max(there, 1e-38):.2f} times as large)"
    return None


def _wrong(source: Stored, nf4_folder: Path, name: str, what: str) -> UserError:
    expected = "the checkpoint that it was made from"
    if (nf4_folder / RECORD).exists():
        made_from = read_json(nf4_folder / RECORD)["source"]
        commit = made_from.get("commit") or made_from["revision"]
        expected = f"{made_from['name']}{f' at {commit}' if commit else ''}, which it was made from"
    return UserError(
        f"{source.folder}: wrong base or revision for {nf4_folder}: {name} {what}, expected {expected}"
    )
