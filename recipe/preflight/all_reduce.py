"""An all-reduce over every rank, as training does it: right, and how fast? Prints JSON.

    python -m recipe.preflight.all_reduce 2            # NCCL over two GPUs
    python -m recipe.preflight.all_reduce 2 --cpu      # gloo over two processes

The ranks meet in a file, so no port and no name of the host is needed. Exit code 1 where it fails; NCCL_DEBUG=INFO
makes NCCL say what it does, on standard error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
SIZES_MIB = {"nccl": 64, "gloo": 4}
REPEATS = 5
# NCCL with a broken P2P path hangs rather than fails.
SECONDS = 60


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
    """Start the ranks and wait for them; none outlives this function."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "recipe.preflight.all_reduce",
            str(ranks),
            "--meet",
            f"{scratch}/meet",
        ]
        command += ["--cpu"] if cpu else []
        started = time.monotonic()
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.wait(timeout=max(1.0, SECONDS - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            print(json.dumps({"error": f"no answer within {SECONDS} s"}))
            return 1
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        said = processes[0].stdout.read() if processes[0].stdout else b""
        codes = [process.returncode for process in processes]
        if any(codes):
            print(json.dumps({"error": f"ranks ended with {', '.join(map(str, codes))}"}))
            return 1
        print(said.decode().strip().splitlines()[-1])
        return 0


def one_rank(rank: int, ranks: int, backend: str, meet: Path) -> None:
    """Sum numbers that only the right sum of all ranks gives; rank 0 prints what it measured."""
    import torch
    from torch import distributed

    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=ranks)
    count = SIZES_MIB[backend] * MIB // 4
    for repeat in range(REPEATS):
        values = torch.arange(count, dtype=torch.float32, device=device).remainder_(1021).add_(rank)
        expected = torch.arange(count, dtype=torch.float32, device=device).remainder_(1021)
        expected = expected * ranks + ranks * (ranks - 1) / 2
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if not torch.equal(values, expected):
            wrong = int((values != expected).sum())
            raise SystemExit(f"rank {rank}, turn {repeat}: {wrong} of {count} sums are wrong")
    distributed.destroy_process_group()
    if rank == 0:
        # The bus bandwidth, as nccl-tests counts it.
        gib = SIZES_MIB[backend] / 1024 * 2 * (ranks - 1) / ranks
        print(json.dumps({"seconds": seconds, "gib_per_second": gib / seconds}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
