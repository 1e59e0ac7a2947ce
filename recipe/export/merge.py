"""A merged model on the disk: the tensors of a source, written as bf16 shards while the next ones are read and merged.

Several threads, each of which reads, merges and writes a tensor of its own; torch and file access release the GIL, so
the disk and the cores work at once. A tensor begins only when there is room for it in `HELD_BYTES`, so memory depends on
the largest tensor and not on the model. A merge that was interrupted goes on at the shard that it was writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recipe.engine.checkpoint import INDEX
from recipe.errors import UserError
from recipe.export.tensors import Tensors
from recipe.files import fsync_folder, read_json, require_space, write_json
from recipe.prepare.entries import Entry, split
from recipe.prepare.header import read_header
from recipe.prepare.pipeline import Shard
from recipe.prepare.rates import PeakMemory, Stage, summary
from recipe.prepare.shardfile import ShardFile
from recipe.settings import Quantization

RECORD = "merge.json"
SHARD_BYTES = 5 * 10**9  # what hubs and other tools are used to
HELD_BYTES = 7 * 2**29  # 3.5 GiB: the head of a 70B model is 2.0, its largest linear layer 0.44
MORE_THAN_CORES = 2  # workers that wait for the disk
MOST_WORKERS = 16
SYNC_BYTES = 64 * 2**20  # a tensor from this size is brought to the disk at once, by the worker that wrote it
WAIT_SECONDS = 0.1


def write_merged(source: Tensors, partial: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write `source` into the folder `partial` as bf16: shards, index, config.json, generation_config.json.

    What an earlier call for the same source has left there is gone on with, all else in the folder goes. The caller adds
    the tokenizer and gives the folder its name. Returns what `merge.json` in it keeps: files, sizes, and the rates of the
    last call that wrote something (see rates.summary).
    Raises UserError where the source is damaged or the disk too small.
    """
    entries = [
        Entry(name, source.folder, source.shape(name), _written_as(source.dtype(name)), quantised=False)
        for name in source.names()
    ]
    parts = split(entries, shard_bytes)
    shards = [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, 1)
    ]
    progress = _resume(partial, _fingerprint(source, entries, shard_bytes))
    todo = [shard for shard in shards if shard.name not in progress["files"]]
    require_space(partial, sum(shard.source_bytes for shard in todo), "the merged model")
    partial.mkdir(parents=True, exist_ok=True)
    if todo:
        progress["rates"] = _run(source, partial, entries, todo, progress)
    _finish(partial, source, entries, progress)
    return progress


def _run(
    source: Tensors, partial: Path, entries: list[Entry], todo: list[Shard], progress: dict[str, Any]
) -> dict[str, Any]:
    """Write the shards in `todo`, and keep `progress` and its record on the disk up to date with what is done."""
    total, size = sum(entry.source_bytes for entry in entries), sum(shard.source_bytes for shard in todo)

    def durable(shard: Shard) -> None:
        progress["files"][shard.name] = {"bytes": shard.bytes}
        write_json(partial / RECORD, progress)

    with (
        PeakMemory() as memory,
        tqdm(total=total, initial=total - size, unit="B", unit_scale=True, desc="merge", leave=False, disable=None) as bar,
    ):  # fmt: skip
        writer = Writer(source, partial, durable, bar.update)
        begin = time.perf_counter()
        writer.run(todo)
        seconds = time.perf_counter() - begin
    return summary(writer.stages, size, seconds, memory.bytes)


class Writer:
    """Writes the tensors of a source into shards in `folder`. One object, one run."""

    def __init__(
        self,
        source: Tensors,
        folder: Path,
        durable: Callable[[Shard], None],
        through: Callable[[int], object],
    ):
        """`durable(shard)` is called when a shard is on the disk under its name, one at a time; `through(bytes)` is told of
        each tensor."""
        self.source, self.folder, self.durable, self.through = source, folder, durable, through
        self.workers = min(len(os.sched_getaffinity(0)) + MORE_THAN_CORES, MOST_WORKERS)
        self.merge = Stage("reading and merging", workers=self.workers)
        self.write = Stage("writing", workers=self.workers)
        self.sync = Stage("fsync", workers=self.workers)
        self.held = 0  # bytes, of the tensors on their way
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.error: BaseException | None = None

    @property
    def stages(self) -> list[Stage]:
        return [self.merge, self.write, self.sync]

    def run(self, shards: list[Shard]) -> None:
        """Raises what the first failing worker raised; what is whole by then stays."""
        threads = torch.get_num_threads()  # also settles the number for this thread
        try:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                try:
                    for shard in shards:
                        shard.left = len(shard.entries)
                        for entry in shard.entries:
                            held = self._make_room(entry)
                            pool.submit(self._guarded, shard, entry, held)
                    while self.held and not self.error:
                        self._wait()
                except BaseException:  # Ctrl-C among them
                    self.stop.set()
                    raise
        finally:
            for shard in shards:
                if shard.file:
                    shard.file.abandon()
            torch.set_num_threads(threads)
        if self.error:
            raise self.error

    def _make_room(self, entry: Entry) -> int:
        """Wait until this tensor fits in beside those on their way, or is alone; the bytes that it holds."""
        needed = max(self.source.held_bytes(entry.name), 1)
        while self.held and self.held + needed > HELD_BYTES and not self.error:
            self._wait()
        with self.changed:
            self.held += needed
        return needed

    def _wait(self) -> None:
        with self.changed:
            self.changed.wait(WAIT_SECONDS)

    def _guarded(self, shard: Shard, entry: Entry, held: int) -> None:
        try:
            if not self.stop.is_set():
                self._one(shard, entry)
        except BaseException as error:  # handed to the thread that called run()
            self.error = self.error or error
            self.stop.set()
        finally:
            with self.changed:
                self.held -= held
                self.changed.notify_all()

    def _one(self, shard: Shard, entry: Entry) -> None:
        with self.merge.working(entry.source_bytes):
            values = self.source.read(entry.name).to(entry.dtype)
        if self.stop.is_set():
            return
        try:
            with self.changed:
                if shard.file is None:
                    shard.file = ShardFile(self.folder / f".{shard.name}", shard.entries, Quantization())
            with self.write.working(entry.source_bytes):
                shard.file.write(shard.file.start_of(entry.name), values)
            if entry.source_bytes >= SYNC_BYTES:
                with self.sync.working():
                    os.fdatasync(shard.file.descriptor)
            with self.changed:
                self.through(entry.source_bytes)
                shard.left -= 1
                last = not shard.left
            if last:
                self._close(shard)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space or choose another disk with "
                "--set paths.runs=; what is done is kept"
            ) from None

    def _close(self, shard: Shard) -> None:
        assert shard.file is not None
        shard.bytes = shard.file.close({})
        aside = self.folder / f".{shard.name}"
        with self.sync.working(shard.bytes), open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, self.folder / shard.name)
        fsync_folder(self.folder)
        with self.changed:
            self.durable(shard)


def _written_as(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.is_floating_point else dtype


def _fingerprint(source: Tensors, entries: list[Entry], shard_bytes: int) -> str:
    """Tells whether a half-written result is of this very base, adapters and weights."""
    tensors = [[entry.name, entry.shape, str(entry.dtype)] for entry in entries]
    return hashlib.sha256(json.dumps([shard_bytes, tensors, source.identity()]).encode()).hexdigest()


def _resume(partial: Path, fingerprint: str) -> dict[str, Any]:
    """The record of a half-written result and nothing but its whole shards; else an empty one and nothing in the folder."""
    if (partial / RECORD).exists():
        progress = read_json(partial / RECORD)
        if progress.get("fingerprint") == fingerprint and all(
            (partial / name).exists() and (partial / name).stat().st_size == file["bytes"]
            for name, file in progress["files"].items()
        ):
            for path in partial.iterdir():
                if path.name != RECORD and path.name not in progress["files"]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return progress
    shutil.rmtree(partial, ignore_errors=True)
    return {"fingerprint": fingerprint, "files": {}}


def _finish(partial: Path, source: Tensors, entries: list[Entry], progress: dict[str, Any]) -> None:
    """The index, the configuration of a plain bf16 model, and the record."""
    progress["files"] = dict(sorted(progress["files"].items()))
    total = sum(entry.source_bytes for entry in entries)
    weight_map = {one.name: file for file in progress["files"] for one in read_header(partial / file)}
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = read_json(source.folder / "config.json")
    config.pop("quantization_config", None)
    old = config.pop("torch_dtype", None)  # what transformers before 5 called it
    config["dtype" if old is None else "torch_dtype"] = "bfloat16"
    write_json(partial / "config.json", config)
    generation = source.folder / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, partial / generation.name)
    write_json(partial / RECORD, progress)
