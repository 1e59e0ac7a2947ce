"""One rank of one measurement: started by `recipe bench` through torchrun.

    torchrun --nproc_per_node N -m recipe.bench.worker SPEC.json RESULT.json

Rank 0 writes RESULT.json, rank R writes RESULT.R.json, whatever happens: {"status": ...} and what was measured, so
that the parent can tell an exhausted memory from a bug. Lines that begin with PROGRESS are for the reader.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipe.bench import profile
from recipe.bench.emulate import VARIANTS, compute_dtype
from recipe.bench.spec import GIB, ONE_RANK, Spec
from recipe.files import write_json

PROGRESS = "progress: "
# A collective that waits longer hangs; without a limit so would the benchmark.
COLLECTIVE_SECONDS = 300
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def main(argv: list[str]) -> int:
    spec = Spec.from_dict(json.loads(Path(argv[0]).read_text()))
    rank = int(os.environ.get("RANK", 0))
    result_file = result_path(Path(argv[1]), rank)
    try:
        result = {"status": "measured", **measure(spec, rank)}
    except BaseException as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        result = {"status": status_of(error, spec), "note": note_of(error, spec), "time": time.monotonic()}
        write_json(result_file, result)
        return 1
    write_json(result_file, result)
    return 0


def result_path(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_suffix(f".{rank}{path.suffix}")


def status_of(error: BaseException, spec: Spec) -> str:
    # CUDA's own and the host allocator's complaints are plain RuntimeErrors.
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and re.search(r"out of memory|can't allocate memory", str(error))
    ):
        return "out_of_memory"
    return "failed"


def note_of(error: BaseException, spec: Spec) -> str:
    first = (str(error).splitlines() or [""])[0]
    status = status_of(error, spec)
    if status == "out_of_memory":
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        return f"asked for {asked[1]}" if asked else first[:200]
    return f"{type(error).__name__}: {first}"[:200]


def measure(spec: Spec, rank: int) -> dict[str, Any]:
    """What this rank saw; times are rank 0's, whose clock waits for all."""
    device, mesh = join(spec)
    cap_gib = cap_allocator(spec, device)
    matmul_tflops = matmul_rate(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    say(rank, f"building, matmul {matmul_tflops:.{0 if matmul_tflops > 10 else 3}f} TFLOP/s")
    read_before = bytes_read()
    started = time.perf_counter()
    program = VARIANTS[spec.variant](spec, device, mesh)
    clock = Clock(spec, device, rank)
    clock.synchronize()
    build_seconds = time.perf_counter() - started
    built, read = memory_of(device), bytes_read() - read_before
    say(rank, f"built in {build_seconds:.1f} s")
    losses = program.train(clock) if hasattr(program, "train") else drive(program, spec, clock)
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss) and not spec.fake_ranks:  # what fake peers send is anything
            raise FloatingPointError(f"loss is {loss} in step {step}")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "cap_gib": cap_gib,
        "matmul_tflops": matmul_tflops,
        "matmul_size": MATMUL_SIZE[device.type],
        "build_seconds": build_seconds,
        "build_peak_allocated_gib": built["peak_allocated_gib"],
        "read_gib": read / GIB,
        "first_step_seconds": clock.first_seconds,
        "step_seconds": clock.seconds,
        "timed_from": clock.timed_from,
        "timed_to": clock.timed_to,
        "losses": losses,
        "details": program.describe(),
        "profile": clock.profile,
        **clock.memory,
    }


def join(spec: Spec) -> tuple[torch.device, Any]:
    """This rank's device, and the mesh of all ranks; none where the variant knows of one process only."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if spec.on_gpu else torch.device("cpu")
    if spec.on_gpu:
        torch.cuda.set_device(device)
    if spec.variant in ONE_RANK:
        # accelerate would see the launcher and wrap the model in DDP.
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        return device, None
    if spec.fake_ranks:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=spec.ranks)
        return device, dist.init_device_mesh(device.type, (spec.ranks,))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if spec.on_gpu else "gloo",
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    return device, dist.init_device_mesh(device.type, (spec.ranks,))


def cap_allocator(spec: Spec, device: torch.device) -> float | None:
    """Limit torch's allocator to the cap, or to the card where that is smaller; GiB."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, spec.cap_gib * GIB / total), device)
    return min(spec.cap_gib, total / GIB)


def matmul_rate(device: torch.device, blocks: int = 5, repeats: int = 10) -> float:
    """TFLOP/s of a large square product of random numbers (zeros draw less power and run faster); median block."""
    size, dtype = MATMUL_SIZE[device.type], compute_dtype(device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(blocks + 1):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds[1:])[blocks // 2]  # the first block warms up
    return repeats * 2 * size**3 / median / 1e12


def drive(program: Any, spec: Spec, clock: Clock) -> list[float]:
    """The training loop of a Program; the loss of each step."""
    losses = []
    for _ in range(spec.total_steps):
        rows = [clock.row() for _ in range(spec.micro_batches)]
        clock.begin()
        parts = [program.step(row, spec.document_lengths) for row in rows]
        program.optimizer_step()
        clock.end()
        losses.append(sum(float(part) for part in parts) / len(parts))
    return losses


class Clock:
    """Times the steps of all ranks together: some to warm up, some that count, at last one under the profiler."""

    def __init__(self, spec: Spec, device: torch.device, rank: int):
        self.spec, self.device, self.rank = spec, device, rank
        self.seconds: list[float] = []
        self.first_seconds = 0.0
        self.memory: dict[str, Any] = {}
        self.profile: dict[str, Any] | None = None
        self.timed_from = self.timed_to = 0.0  # time.monotonic(), which is the same clock in the parent
        self._index = 0
        self._profiler: Any = None
        self._generator = torch.Generator().manual_seed(spec.seed + rank)

    def row(self) -> torch.Tensor:
        """Token ids of the next micro-batch on this rank."""
        return torch.randint(0, self.spec.shape.vocab, (self.spec.tokens,), generator=self._generator)

    def synchronize(self) -> None:
        _synchronize(self.device)
        if dist.is_initialized():
            dist.barrier()

    def begin(self) -> None:
        if self._index == self.spec.warm_up + self.spec.steps and self.rank == 0:
            self._profiler = profile.start(self.device)
        self.synchronize()
        self._started = time.perf_counter()
        if self._index == self.spec.warm_up:
            self.timed_from = time.monotonic()

    def end(self) -> None:
        self.synchronize()
        seconds = time.perf_counter() - self._started
        index, last = self._index, self.spec.warm_up + self.spec.steps - 1
        self._index += 1
        if index > last:
            if self._profiler is not None:
                self.profile = profile.summary(self._profiler, self.device, seconds)
            return
        if index == 0:
            self.first_seconds = seconds
        kind = "warm-up" if index < self.spec.warm_up else "step"
        say(self.rank, f"{kind} {index + 1} of {last + 1}: {seconds:.3f} s")
        if kind == "step":
            self.seconds.append(seconds)
        if index == last:
            self.timed_to = time.monotonic()
            self.memory = memory_of(self.device)


def bytes_read() -> int:
    """That this process has asked the system for."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def memory_of(device: torch.device) -> dict[str, Any]:
    """Peaks of torch's allocator since the model began to be built; None on a CPU, which has no such allocator."""
    if device.type != "cuda":
        return {"peak_allocated_gib": None, "peak_reserved_gib": None, "allocator_retries": None}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "allocator_retries": torch.cuda.memory_stats(device)["num_alloc_retries"],
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(f"{PROGRESS}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # The result is written. A rank that fails must not wait for the others, and gloo's threads have aborted
    # interpreters that were taken down beside them.
    os._exit(code)
