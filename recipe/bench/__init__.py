"""`recipe bench`: tokens per second, memory and host RAM at a model's true shapes, with random weights.

Ours and the ways of others are measured in one run on one machine, each at each length in a fresh process, so that
ratios hold whatever the machine. recipe/bench/worker.py is one rank of a measurement; this module starts them, looks
at them from outside and makes rows of what they say.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from recipe import __version__
from recipe.bench import table
from recipe.bench.sample import GIB, Sampler, Samples
from recipe.bench.spec import Spec, specs_of
from recipe.files import write_json, write_text
from recipe.hardware import Gpu, Machine, probe

WORKER = "recipe.bench.worker"
PROGRESS = "progress: "
PACKAGES = (
    "torch",
    "bitsandbytes",
    "peft",
    "transformers",
    "trl",
    "accelerate",
    "triton",
    "nvidia-nccl-cu13",
)
PACKAGE_PARENT = Path(__file__).parent.parent.parent
LOG_LINES = 500  # of a worker that failed
STOP_SECONDS = 10.0
DRAIN_SECONDS = 5.0  # a compiler process that outlives its rank keeps the pipe open
# Environment that changes what is measured, and stands in the results.
TELLING = re.compile(r"^(NCCL|PYTORCH|CUDA|TORCH|OMP)_")


def run(arguments: Namespace) -> int:
    """Measure all that was asked for and print it. 1 where a worker failed; running out of memory is a result."""
    if arguments.suite:
        from recipe.bench import planned, suite

        return (planned if arguments.suite == planned.PLAN else suite).run(arguments)
    if arguments.decode:
        from recipe.bench import decode

        return decode.run(arguments)
    machine = probe(".")
    specs = specs_of(arguments, machine)
    say(f"{len(specs)} measurements: " + ", ".join(f"{spec.name} {spec.tokens}" for spec in specs))
    with stop_on_sigterm():
        have_checkpoints(specs)
        rows = [measured(spec, machine.gpus[: spec.gpus]) for spec in specs]
    document = described(specs[0], machine) | {"results": rows, "ratios": table.ratios(rows)}
    if arguments.figure:
        write_text(Path(arguments.figure), table.figure(document))
        say(f"figure: {arguments.figure}")
    print(json.dumps(document, indent=2, ensure_ascii=False) if arguments.json else table.render(document))
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def described(spec: Spec, machine: Machine) -> dict[str, Any]:
    """What was run where: the head of the results."""
    return {
        "command": shlex.join(["recipe", *sys.argv[1:]]),
        "machine": describe(machine, spec.gpus),
        "versions": versions(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if TELLING.match(name)},
        "model": {
            "name": spec.model_shape,
            "parameters": spec.shape.parameters,
            "flop_per_token": spec.flop_per_token,
            **dataclasses.asdict(spec.shape),
        },
    }


def have_checkpoints(specs: list[Spec]) -> None:
    """Make the random checkpoints that are asked for and not there. Raises UserError where something else is."""
    for folder, shape in {spec.checkpoint: spec.shape for spec in specs if spec.checkpoint}.items():
        from recipe.bench.checkpoint import ensure_checkpoint

        started = time.monotonic()
        say(f"checkpoint {folder}")
        ensure_checkpoint(Path(folder), shape)
        say(f"checkpoint is there after {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def measured(spec: Spec, gpus: list[Gpu]) -> dict[str, Any]:
    """One row, by starting the ranks of one measurement, or saying why not."""
    name = f"{spec.name} {spec.tokens}"
    if spec.checkpoint and spec.cold:
        from recipe.bench.checkpoint import drop_from_cache

        drop_from_cache(Path(spec.checkpoint))
    if reason := spec.skip_reason():
        say(f"{name}: skipped, {reason}")
        return row_of(spec, [{"status": "skipped", "note": reason}], Samples())
    with tempfile.TemporaryDirectory(prefix="recipe-bench-") as scratch:
        spec_file, result_file = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        write_json(spec_file, spec.to_dict())
        command = launcher(spec.processes, WORKER, str(spec_file), str(result_file))
        with (
            Watched(name, command, environment(spec, gpus)) as program,
            Sampler(program.process.pid, [gpu.uuid for gpu in gpus]) as samples,
        ):
            code = program.wait()
        results = read_results(result_file, spec.processes)
    row = row_of(spec, results or [{"status": "failed", "note": unsaid(code, program.log)}], samples)
    if row["status"] == "failed":
        sys.stderr.write("".join(program.log))
    say(f"{name}: {table.verdict(row)}")
    return row


def launcher(processes: int, module: str, *arguments: str) -> list[str]:
    ranks = ["--standalone", "--local-addr", "localhost", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", module, *arguments]


class Watched:
    """A program that runs beside this one: its progress is shown, the rest of its output kept; ended at the latest here."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name = name
        self.log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(PROGRESS):
                say(f"{self.name}: {line.removeprefix(PROGRESS).rstrip()}")
            else:
                self.log.append(line)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait()
        self._reader.join(DRAIN_SECONDS)
        return code

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exc: object) -> None:
        end(self.process)


def environment(spec: Spec, gpus: list[Gpu]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    links = {} if spec.p2p is None else {"NCCL_P2P_DISABLE": "0" if spec.p2p else "1"}
    return {
        "OMP_NUM_THREADS": str(max(1, cores // spec.ranks)),  # torchrun's 1 would slow AdamW in host RAM
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        **links,
        # Trainer would spread over every GPU that it sees.
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid or str(gpu.index) for gpu in gpus),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


def end(process: subprocess.Popen) -> None:
    """Stop what still runs: the launcher, which ends its ranks, then whoever is left."""
    if process.poll() is not None:
        return
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@contextlib.contextmanager
def stop_on_sigterm():
    """SIGTERM ends the ranks too, and this command with 143."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def read_results(path: Path, ranks: int) -> list[dict[str, Any]]:
    """What the ranks wrote: of all of them, or only of those that failed, the first to fail in front; else nothing."""
    paths = [path, *(path.with_suffix(f".{rank}{path.suffix}") for rank in range(1, ranks))]
    found = [json.loads(each.read_text()) for each in paths if each.exists()]
    # A rank whose peer has run out of memory fails on the broken connection, perhaps before it.
    order = ("out_of_memory", "failed")
    wrong = sorted(
        (result for result in found if result["status"] != "measured"),
        key=lambda result: (order.index(result["status"]), result["time"]),
    )
    return wrong or (found if len(found) == ranks else [])


def unsaid(code: int, log: collections.deque[str]) -> str:
    """Why a worker ended without a result."""
    if killed := re.search(r"exitcode\s*:? -(\d+)", "".join(log)):
        name = signal.Signals(int(killed[1])).name
        return f"a rank was killed by {name}" + (", often for lack of host RAM" if name == "SIGKILL" else "")
    return f"ended with {code} and without a result"


def row_of(spec: Spec, results: list[dict[str, Any]], samples: Samples) -> dict[str, Any]:
    """One row of the results, from what the ranks said and what was seen from outside."""
    first = results[0]
    row: dict[str, Any] = {
        "variant": spec.variant,
        "name": spec.name,
        "status": first["status"],
        "note": first.get("note"),
        "tokens": spec.tokens,
        "document_tokens": spec.document_tokens,
        "ranks": spec.ranks,
        "cap_gib": spec.cap_gib if spec.on_gpu else None,
        "p2p": spec.p2p,
        "checkpoint": spec.checkpoint and ("cold" if spec.cold else "in the page cache"),
        "dropout": spec.dropout,
        "micro_batches": spec.micro_batches,
        "host_ram_gib": samples.peak.total / GIB or None,
        "host_ram_anonymous_gib": samples.peak.anonymous / GIB or None,
        "host_ram_shared_gib": samples.peak.shared / GIB if samples.peak.total else None,
        "host_mapped_files_gib": samples.peak.files / GIB if samples.peak.total else None,
    }
    if first["status"] != "measured":
        return row
    seconds = first["step_seconds"]
    tokens = spec.tokens * spec.micro_batches * spec.processes
    speed = tokens / statistics.median(seconds)
    limit = sum(result["matmul_tflops"] for result in results) * 1e12 / spec.flop_per_token
    return row | {
        "cap_gib": first["cap_gib"],
        "dtype": first["dtype"],
        "tokens_per_second": speed,
        "tokens_per_second_min": tokens / max(seconds),
        "tokens_per_second_max": tokens / min(seconds),
        "seconds_per_micro_batch": statistics.median(seconds) / spec.micro_batches,
        "step_seconds": seconds,
        "peak_allocated_gib": _largest(results, "peak_allocated_gib"),
        "peak_reserved_gib": _largest(results, "peak_reserved_gib"),
        "allocator_retries": _largest(results, "allocator_retries"),
        "build_seconds": first["build_seconds"],
        "build_peak_allocated_gib": _largest(results, "build_peak_allocated_gib"),
        "first_step_seconds": first["first_step_seconds"],
        "read_gib": sum(result["read_gib"] for result in results),
        "gpu_utilisation_percent": samples.mean_utilisation(first["timed_from"], first["timed_to"]),
        "matmul_tflops": statistics.mean(result["matmul_tflops"] for result in results),
        "matmul_size": first["matmul_size"],
        "roofline_tokens_per_second": limit,
        "share_of_roofline": speed / limit,
        # Of peers that do not exist come numbers that mean nothing, NaN among them, which no JSON knows.
        "loss_first": None if spec.fake_ranks else first["losses"][0],
        "loss_last": None if spec.fake_ranks else first["losses"][-1],
        "details": first["details"],
        "profile": first["profile"],
    }


def _largest(results: list[dict[str, Any]], key: str) -> Any:
    """Of all ranks: the card that is fullest is the one that counts."""
    values = [result[key] for result in results if result[key] is not None]
    return max(values) if values else None


def describe(machine: Machine, gpus: int) -> dict[str, Any]:
    return {
        "gpus": [gpu.name for gpu in machine.gpus[:gpus]],
        "gpu_memory_gib": [gpu.memory_total_gib for gpu in machine.gpus[:gpus]],
        "driver": machine.gpus[0].driver_version if machine.gpus else None,
        "cpu": machine.cpu_model,
        "cores": machine.cores,
        "ram_gib": machine.usable_ram_gib,
        "kernel": machine.kernel,
        "distribution": machine.distribution,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"recipe": __version__, "git_commit": _git_commit()}
    found["python"] = sys.version.split()[0]
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _git_commit() -> str | None:
    """With a plus sign where files have been changed since."""
    git = ["git", "-C", str(PACKAGE_PARENT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if not commit.returncode else None
