"""Do the ranks of this machine work together? All-reduce, all-gather and a sharded training step; prints JSON.

    python -m recipe.preflight.ranks 2            # NCCL over two GPUs
    python -m recipe.preflight.ranks 2 --cpu      # gloo over two processes

How to read it: a line per part, as soon as it is done. `stage` names the part that has begun: where nothing follows it,
that part hung or died. Bandwidths are "bus" ones, as nccl-tests counts them: of a 12 GB/s link expect 8 or more with
P2P, 4 to 6 without. Exit code 1 where a part fails; NCCL_DEBUG=INFO makes NCCL say what it does, on standard error.
The ranks meet in a file, so no port and no name of the host is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from recipe.preflight.program import say

MIB = 2**20
SIZES_MIB = {"nccl": 64, "gloo": 4}
REPEATS = 5
POLL_SECONDS = 0.05
# After one rank has died the others wait for it in vain.
MOURNING_SECONDS = 2


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meet", type=Path)
    wanted = parser.parse_args(argv)
    if wanted.rank is not None:
        one_rank(wanted.rank, wanted.ranks, "gloo" if wanted.cpu else "nccl", wanted.meet)
        return 0
    return all_ranks(wanted.ranks, wanted.cpu)


def all_ranks(ranks: int, cpu: bool) -> int:
    """Start the ranks and wait for them; where one fails, the others are ended. Who starts this sets the time limit."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if cpu else {})
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "recipe.preflight.ranks", str(ranks), *(["--cpu"] if cpu else [])]
        command += ["--meet", f"{scratch}/meet", "--rank"]
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)]
        died = None
        while any(process.poll() is None for process in processes):
            if died is None and any(process.returncode for process in processes):
                died = time.monotonic()
            if died is not None and time.monotonic() - died > MOURNING_SECONDS:
                for process in processes:
                    process.kill()
            time.sleep(POLL_SECONDS)
        codes = [process.returncode for process in processes]
    if any(codes):
        say(error=f"ranks ended with {', '.join(map(str, codes))}")
        return 1
    return 0


def one_rank(rank: int, ranks: int, backend: str, meet: Path) -> None:
    """All parts on one rank; rank 0 says what was measured, and each rank ends with an error where it saw one."""
    import torch
    from torch import distributed

    from recipe.preflight.shard_step import shard_step

    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    distributed.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=ranks)
    count = SIZES_MIB[backend] * MIB // 4
    parts = {
        "all_reduce": lambda: all_reduce(rank, ranks, count, device),
        "all_gather": lambda: all_gather(rank, ranks, count, device),
        "shard_step": lambda: shard_step(rank, ranks, device),
    }
    for name, part in parts.items():
        if rank == 0:
            say(stage=name)
        found = part()
        if rank == 0:
            say(**{name: found})
    distributed.destroy_process_group()


def all_reduce(rank: int, ranks: int, count: int, device: Any) -> dict[str, float]:
    """Sum numbers that only the right sum of all ranks gives."""
    import torch
    from torch import distributed

    base = torch.arange(count, dtype=torch.float32, device=device).remainder_(1021)
    best = float("inf")
    for turn in range(REPEATS):
        values = base + rank
        best = min(best, _timed(partial(distributed.all_reduce, values), device))
        _compare(values, base * ranks + ranks * (ranks - 1) / 2, f"rank {rank}, turn {turn}: sums")
    return _rate(best, count * 4 * 2 * (ranks - 1) / ranks)


def all_gather(rank: int, ranks: int, count: int, device: Any) -> dict[str, float]:
    """Every rank's part must arrive at every rank, in its place: so FSDP2 gathers a layer."""
    import torch
    from torch import distributed

    part = count // ranks
    own = torch.arange(part, dtype=torch.float32, device=device).remainder_(1021) + 2000 * rank
    whole = torch.empty(part * ranks, dtype=torch.float32, device=device)
    expected = torch.cat([own - 2000 * rank + 2000 * other for other in range(ranks)])
    best = float("inf")
    for turn in range(REPEATS):
        whole.zero_()
        best = min(best, _timed(partial(distributed.all_gather_into_tensor, whole, own), device))
        _compare(whole, expected, f"rank {rank}, turn {turn}: gathered values")
    return _rate(best, part * ranks * 4 * (ranks - 1) / ranks)


def _timed(collective: Any, device: Any) -> float:
    import torch
    from torch import distributed

    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    collective()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _compare(found: Any, expected: Any, what: str) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise SystemExit(f"{what}: {wrong} of {expected.numel()} are wrong")


def _rate(seconds: float, size: float) -> dict[str, float]:
    return {"seconds": seconds, "gib_per_second": size / 2**30 / seconds}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
