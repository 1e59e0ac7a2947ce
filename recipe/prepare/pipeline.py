"""The stages of the preparation, each in threads of its own: read, quantise, write, hash.

    read ──► quantise (one worker per core, or the GPU) ──► write ──► hash ──► fsync and rename
                        └─ a tensor's last piece ─► second level (the calling thread)

torch, bitsandbytes, hashlib and file access release the GIL, so the stages overlap. Tensors go through in pieces of 8 MiB
from a fixed number of buffers, so memory does not depend on the size of a tensor, of a shard or of the model.

The second level runs in the thread that calls: the workers limit torch to one thread each, and a mean over many absmax
depends, in its last bit, on how many threads sum it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipe.checksums import BlockChecksums
from recipe.errors import UserError
from recipe.files import fsync_folder
from recipe.prepare.download import Cancelled
from recipe.prepare.entries import Entry
from recipe.prepare.nf4 import BLOCK, CPU_VALUES, json_suffix, pack, state_of
from recipe.prepare.rates import Stage
from recipe.prepare.shardfile import ShardFile
from recipe.settings import Quantization

PIECE_BYTES = 8 * 2**20
HASH_BYTES = 4 * 2**20
MOST_WORKERS = 32
WAIT_SECONDS = 0.1


@dataclass
class Shard:
    """One output file on its way: `name` is what it is called once it is whole."""

    name: str
    entries: list[Entry]
    file: ShardFile | None = None
    left: int = 0  # entries that are not through yet
    jsons: dict[str, bytes] = field(default_factory=dict)
    checksums: bytes = b""  # of its blocks, for ranks that read a part (recipe/checksums.py)
    bytes: int = 0
    sha256: str = ""

    @property
    def source_bytes(self) -> int:
        return sum(entry.source_bytes for entry in self.entries)


@dataclass
class Tensor:
    """One tensor on its way."""

    entry: Entry
    shard: Shard
    left: int  # pieces that are not through yet
    absmax: torch.Tensor | None  # (numel / 64,) fp32 on the device that quantises


@dataclass
class Piece:
    """`size` bytes of a tensor, `start` bytes into it, in `buffer`."""

    tensor: Tensor
    start: int
    size: int
    buffer: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        return self.buffer[: self.size].view(self.tensor.entry.dtype)


class Pipeline:
    """Turns shards into files in `folder`. One object, one run."""

    def __init__(
        self,
        folder: Path,
        quantization: Quantization,
        obtain: Callable[[Path, threading.Event], None],
        durable: Callable[[Shard], None],
        through: Callable[[int], object] = lambda size: None,
    ):
        """`obtain(file, stop)` returns when a source file is there; `durable(shard)` is called, in one thread,
        when a shard is on the disk under its name (small ones may overtake each other). `through(size)` is told of each
        piece that is quantised, in bytes of the source. What they raise ends the run."""
        self.through = through
        self.folder, self.quantization, self.obtain, self.durable = folder, quantization, obtain, durable
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.workers = 2 if self.gpu else max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS))
        self.torch_threads = torch.get_num_threads()  # also settles the number for this thread
        self.read = Stage("disk reads")
        where = torch.cuda.get_device_name() if self.gpu else f"cpu, {self.workers} threads"
        self.quantise = Stage("quantisation", where, self.workers)
        self.nest = Stage("second level")
        self.write = Stage("writing")
        self.hash = Stage("hashing")
        self.sync = Stage("fsync")
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        buffers = 2 * self.workers + 4
        self.free: queue.Queue = queue.Queue()
        for _ in range(buffers):
            self.free.put(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self.gpu))
        self.pieces: queue.Queue = queue.Queue()  # bounded by the buffers
        self.writes: queue.Queue = queue.Queue(buffers)
        self.whole: queue.Queue = queue.Queue()
        self.hashed: queue.Queue = queue.Queue()
        self.events: queue.Queue = queue.Queue()

    @property
    def stages(self) -> list[Stage]:
        return [self.read, self.quantise, self.nest, self.write, self.hash, self.sync]

    def run(self, shards: list[Shard]) -> None:
        """Raises what the first failing stage raised: UserError where a file is damaged or the disk is full."""
        bodies = [
            lambda: self._read(shards),
            self._write,
            self._hash,
            self._sync,
            *[self._quantise] * self.workers,
        ]
        threads = [threading.Thread(target=self._guarded, args=(body,), daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        try:
            self._second_level(len(shards))
        except Cancelled:
            pass
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
            for shard in shards:
                if shard.file:
                    shard.file.abandon()
            torch.set_num_threads(self.torch_threads)
        if self.error:
            raise self.error

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Cancelled:
            pass
        except BaseException as error:  # handed to the thread that called run()
            with self.lock:
                self.error = self.error or error
            self.stop.set()

    def _give(self, pipe: queue.Queue, item: Any) -> None:
        while not self.stop.is_set():
            try:
                return pipe.put(item, timeout=WAIT_SECONDS)
            except queue.Full:
                pass
        raise Cancelled

    def _take(self, pipe: queue.Queue) -> Any:
        while not self.stop.is_set():
            try:
                return pipe.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                pass
        raise Cancelled

    def _read(self, shards: list[Shard]) -> None:
        for shard in shards:
            file = shard.entries[0].file
            self.obtain(file, self.stop)
            shard.file = ShardFile(self.folder / f".{shard.name}", shard.entries, self.quantization)
            shard.left = len(shard.entries)
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                for entry in shard.entries:
                    self._read_entry(descriptor, entry, shard)
            finally:
                os.close(descriptor)

    def _read_entry(self, descriptor: int, entry: Entry, shard: Shard) -> None:
        absmax = None
        if entry.quantised:
            absmax = torch.empty(entry.numel // BLOCK, dtype=torch.float32, device=self.device)
        starts = range(0, entry.source_bytes, PIECE_BYTES)
        tensor = Tensor(entry, shard, len(starts), absmax)
        for start in starts:
            size = min(PIECE_BYTES, entry.source_bytes - start)
            buffer = self._take(self.free)
            with self.read.working(size):
                content = memoryview(buffer.numpy())[:size]
                done = 0
                while done < size:
                    got = os.preadv(descriptor, [content[done:]], entry.start + start + done)
                    if not got:
                        raise UserError(f"{entry.file}: is cut short in {entry.name}; fetch it again")
                    done += got
            self._give(self.pieces, Piece(tensor, start, size, buffer))
        if not starts:
            self._give(self.events, tensor)

    def _quantise(self) -> None:
        if not self.gpu:
            torch.set_num_threads(1)
        while True:
            piece = self._take(self.pieces)
            entry, file = piece.tensor.entry, piece.tensor.shard.file
            with self.quantise.working(piece.size):
                out = self._packed(piece) if entry.quantised else self._plain(piece)
            start = file.start_of(entry.name) + (
                piece.start // entry.dtype.itemsize // 2 if entry.quantised else piece.start
            )
            if entry.quantised:
                self._give(self.free, piece.buffer)
            self._give(self.writes, (file, start, out, None if entry.quantised else piece.buffer))
            with self.lock:
                self.through(piece.size)
                piece.tensor.left -= 1
                last = not piece.tensor.left
            if last:
                self._give(self.events, piece.tensor)

    def _packed(self, piece: Piece) -> torch.Tensor:
        values = piece.values.to(self.device, non_blocking=True)
        packed, absmax = pack(values, self.quantization)
        # A GPU's maximum passes over NaN; a CPU's does not, so the blocks' maxima tell.
        if not torch.isfinite(values if self.gpu else absmax).all():
            raise _not_finite(piece.tensor.entry)
        first = piece.start // values.element_size() // BLOCK
        assert piece.tensor.absmax is not None
        piece.tensor.absmax[first : first + absmax.numel()] = absmax
        return packed.cpu()

    def _plain(self, piece: Piece) -> torch.Tensor:
        values = piece.values
        if values.is_floating_point() and not all(
            part.float().isfinite().all() for part in values.split(CPU_VALUES)
        ):
            raise _not_finite(piece.tensor.entry)
        return piece.buffer[: piece.size]

    def _second_level(self, shards: int) -> None:
        while shards:
            event = self._take(self.events)
            if isinstance(event, Shard):
                shards -= 1
                continue
            shard, entry = event.shard, event.entry
            if event.absmax is not None:
                with self.nest.working(event.absmax.nbytes):
                    state = state_of(event.absmax, entry.shape, entry.dtype, self.quantization)
                event.absmax = None
                kept = json_suffix(self.quantization)
                shard.jsons[f"{entry.name}.{kept}"] = state.pop(kept).numpy().tobytes()
                for suffix, constant in state.items():
                    start = shard.file.start_of(f"{entry.name}.{suffix}")
                    self._give(self.writes, (shard.file, start, constant, None))
            shard.left -= 1
            if not shard.left:
                self._give(self.writes, shard)

    def _write(self) -> None:
        while True:
            item = self._take(self.writes)
            try:
                if isinstance(item, Shard):
                    assert item.file is not None
                    with self.write.working():
                        item.bytes = item.file.close(item.jsons)
                    self._give(self.whole, item)
                    continue
                file, start, values, buffer = item
                with self.write.working(values.nbytes):
                    file.write(start, values)
            except OSError as error:
                raise _cannot_write(self.folder, error) from None
            if buffer is not None:
                self._give(self.free, buffer)

    def _hash(self) -> None:
        content = bytearray(HASH_BYTES)
        while True:
            shard = self._take(self.whole)
            digest, blocks = hashlib.sha256(), BlockChecksums()
            with (
                self.hash.working(shard.bytes),
                open(self.folder / f".{shard.name}", "rb", buffering=0) as file,
            ):
                while size := file.readinto(content):
                    digest.update(memoryview(content)[:size])
                    blocks.update(memoryview(content)[:size])
                    if self.stop.is_set():
                        raise Cancelled
            shard.sha256, shard.checksums = digest.hexdigest(), blocks.to_bytes()
            self._give(self.hashed, shard)

    def _sync(self) -> None:
        while True:
            shard = self._take(self.hashed)
            aside = self.folder / f".{shard.name}"
            try:
                with self.sync.working(shard.bytes), open(aside, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, self.folder / shard.name)
                fsync_folder(self.folder)
            except OSError as error:
                raise _cannot_write(self.folder, error) from None
            self.durable(shard)
            self._give(self.events, shard)


def _not_finite(entry: Entry) -> UserError:
    return UserError(
        f"{entry.file}: {entry.name} has NaN or infinite values, expected finite weights; "
        "fetch the file again or take another checkpoint"
    )


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: cannot be written ({error.strerror}); free some space or choose another disk with "
        "--set paths.models=; what is done is kept"
    )
