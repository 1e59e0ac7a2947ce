"""Host memory that a GPU copies from and to: one mapping of exactly the size asked for, registered once.

torch's own pinned allocator rounds each tensor up to a power of two (pytorch issue 95823): 80 slices of 408 MiB would
take 512 MiB each. Here all of a rank's slices lie in one anonymous mapping, and CUDA is told of it once.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from pathlib import Path

import psutil
import torch

from recipe.engine.checkpoint import Checkpoint
from recipe.errors import Refused

GIB = 2**30
SPARE_BYTES = GIB  # host RAM left to the rest of the system


class HostPool:
    """Tensors cut one after another from a mapping of `nbytes`; pinned where the device is a GPU.

    Raises Refused, before anything is allocated, where the host has not that much memory to give.
    """

    def __init__(self, nbytes: int, device: torch.device, what: str):
        self._used = 0
        self._pinned = device.type == "cuda" and nbytes > 0
        self.nbytes = nbytes
        if nbytes == 0:
            self._whole = torch.empty(0, dtype=torch.uint8)
            return
        available = psutil.virtual_memory().available
        if nbytes + SPARE_BYTES > available:
            raise Refused(
                f"host RAM: {nbytes / GIB:.1f} GiB are needed for {what}, {available / GIB:.1f} GiB are available; "
                "end other programs, add RAM, or set compute.offload_layers and compute.keep_layers lower "
                "(`make plan` shows what each takes)"
            )
        self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
        if self._pinned:
            address = self._whole.data_ptr()
            _check(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
            # A mapping that goes while CUDA still knows its address would make the next one there unusable.
            self._unregister = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes, as a uint8 tensor."""
        start, self._used = self._used, self._used + nbytes
        assert self._used <= self.nbytes, "the pool was made too small"
        return self._whole[start : self._used]

    def close(self) -> None:
        """Let CUDA forget it; nothing may be copied from or to it any more."""
        if self._pinned:
            torch.cuda.synchronize()
            self._unregister()


def _check(code: int) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not register host memory (error {int(code)})")


class EmbeddingTable:
    """The embedding (vocabulary, hidden), mapped from the checkpoint's own file: one copy for all ranks of a host.

    A page of it comes into memory when one of its tokens is met, and the system may take it back: it is page cache,
    not the process's memory. One lookup per token and step is all that it serves.
    """

    def __init__(self, file: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype):
        with open(file, "rb") as opened:
            self._mapping = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._mapping.madvise(mmap.MADV_RANDOM)
        count = shape[0] * shape[1] * dtype.itemsize
        page = memoryview(self._mapping)[offset : offset + count]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "not writable": it is only read
            self._table = torch.frombuffer(page, dtype=dtype).view(shape)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> EmbeddingTable:
        stored = checkpoint.stored(name, shape)
        return cls(stored.file, stored.start, shape, stored.dtype)

    def lookup(self, ids: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """ids (tokens,) on the CPU -> (tokens, hidden) on `device`."""
        return self._table[ids].to(device).to(dtype)
