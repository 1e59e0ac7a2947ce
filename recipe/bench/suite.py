"""`recipe bench --suite two-cards`: all that is claimed of two cards, measured by one command in some minutes.

A drill (a rank killed, one stopped, resumed, exported) runs while the random checkpoint is written and two ranks are
compared with one; then each speed is measured in a process of its own. FOLDER/two-cards.json is written after each
stage, so that a suite that is cut short keeps what it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe import bench
from recipe.bench import table
from recipe.bench.spec import FIXED_TOKENS, GIB, Spec, base_spec
from recipe.bench.verdicts import HOST_GIB, verdicts
from recipe.errors import UserError
from recipe.files import write_json, write_text
from recipe.hardware import Gpu, Machine, probe

TWO_CARDS = "two-cards"
RANKS = 2
TOKENS, DOCUMENT_TOKENS = (
    8192,
    4096,
)  # documents as long as fsdp_qlora's rows: attention costs the same a token
STEPS = 3
WARM_UP = 1  # the placement is fixed and the kernels are compiled by then
PARITY_LAYERS = 8
PARITY_TOKENS = 2048
DISK_SAMPLE = 8 * 2**30
READERS = 3  # of each rank (recipe/engine/load.py)
DECIDED = ("against", "only", "figure", "profile", "json")  # by the suite itself


def run(arguments: Namespace) -> int:
    """Measure, write FOLDER/two-cards.json, speed.svg, time.svg and report.txt, print the report.

    1 where something failed or a number was missed. Raises UserError where an option cannot be meant.
    """
    machine = probe(".")
    base, output = requested(arguments, machine)
    output.mkdir(parents=True, exist_ok=True)
    gpus = machine.gpus[: base.gpus]
    with bench.stop_on_sigterm(), tempfile.TemporaryDirectory(prefix="recipe-suite-") as scratch:
        suite = Suite(base, gpus, Path(scratch), output, bench.described(base, machine))
        suite.run()
    text = report(suite.document)
    write_text(output / "report.txt", text + "\n")
    write_text(output / "speed.svg", table.figure(suite.document))
    write_text(output / "time.svg", table.time_figure(suite.document))
    print(text)
    failed = any(row["status"] == "failed" for row in suite.document["results"])
    missed = any(verdict["met"] is False for verdict in suite.document["verdicts"])
    return 1 if failed or missed else 0


def requested(arguments: Namespace, machine: Machine) -> tuple[Spec, Path]:
    """What the measurements share, and the folder for the results. Raises UserError."""
    if arguments.suite != TWO_CARDS:
        raise UserError(f"--suite is `{arguments.suite}`, expected {TWO_CARDS} or plan")
    if given := [name for name in DECIDED if getattr(arguments, name)]:
        raise UserError(f"--{given[0]} cannot be given with --suite, which decides it; leave it out")
    if not arguments.output:
        raise UserError("--suite needs --output FOLDER for its results")
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output is `{output}`, which exists; expected a new or an empty folder")
    if arguments.gpus is None:
        arguments.gpus = min(len(machine.gpus), RANKS)
    tokens = arguments.tokens or str(TOKENS)
    if not tokens.isdecimal() or int(tokens) < 2:
        raise UserError(f"--tokens is `{tokens}`, expected one whole number of at least 2 with --suite")
    arguments.steps = arguments.steps or STEPS
    arguments.document_tokens = arguments.document_tokens or DOCUMENT_TOKENS
    arguments.ram_gib = arguments.ram_gib or HOST_GIB
    base = base_spec(arguments, machine)
    if base.ranks != RANKS or base.micro_batches != 1:
        raise UserError(
            f"--suite {TWO_CARDS} measures {RANKS} GPUs with one micro-batch a step, asked for --gpus {base.gpus} and "
            f"--micro-batches {base.micro_batches}; rehearse it with --gpus 0 (CPU ranks) or --gpus 1 --fake-ranks 2"
        )
    offload = 0 if base.offload == "auto" else base.offload
    return dataclasses.replace(base, tokens=int(tokens), offload=offload, warm_up=WARM_UP, p2p=False), output


class Suite:
    """The stages, and the document that they fill."""

    def __init__(self, base: Spec, gpus: list[Gpu], scratch: Path, output: Path, described: dict[str, Any]):
        self.base, self.gpus, self.scratch, self.output = base, gpus, scratch, output
        self.checkpoint = Path(base.checkpoint) if base.checkpoint else scratch / "random"
        self.document = described | {
            "rehearsal": bool(base.fake_ranks or not base.gpus),
            "stages": [],
            "results": [],
            "ratios": [],
        }

    def run(self) -> None:
        with self.drill():
            self.write_checkpoint()
            self.parity()
        self.disk()
        for spec in self.specs():
            with self.stage(f"{spec.name} {spec.tokens}"):
                rows = self.document["results"]
                rows.append(bench.measured(spec, self.gpus))
                self.document["ratios"] = table.ratios(rows)
        self.document["verdicts"] = verdicts(self.document)
        self.keep()

    def specs(self) -> list[Spec]:
        ours = dataclasses.replace(self.base, checkpoint=str(self.checkpoint), profile=True)
        # Peers that do not exist only send to ours.
        others = dataclasses.replace(
            self.base, fake_ranks=0, ranks=self.base.processes, checkpoint=None, offload="auto"
        )
        return [
            ours,
            *(dataclasses.replace(others, variant=name, tokens=FIXED_TOKENS[name]) for name in FIXED_TOKENS),
            dataclasses.replace(ours, p2p=True, cold=False, profile=False),
        ]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.document["stages"].append({"name": name, "seconds": round(time.monotonic() - started, 1)})
        self.keep()

    def keep(self) -> None:
        write_json(self.output / f"{TWO_CARDS}.json", self.document)

    @contextlib.contextmanager
    def drill(self) -> Iterator[None]:
        """The drill, beside what is done within."""
        result = self.scratch / "drill.json"
        command = [sys.executable, "-m", "recipe.bench.drill", str(self.scratch / "drill"), str(result)]
        started = time.monotonic()
        with bench.Watched("drill", command, bench.environment(self.base, self.gpus)) as program:
            yield
            code = program.wait()
        self.document["drill"] = json.loads(result.read_text()) if code == 0 else failure(code, program.log)
        self.document["stages"].append({"name": "drill", "seconds": round(time.monotonic() - started, 1)})
        self.keep()

    def write_checkpoint(self) -> None:
        with self.stage("checkpoint"):
            bench.have_checkpoints([dataclasses.replace(self.base, checkpoint=str(self.checkpoint))])

    def parity(self) -> None:
        """Two ranks against one, on a shallow model of the true layers and the whole vocabulary."""
        from recipe.bench.checkpoint import write_random_checkpoint
        from recipe.bench.parity import DEVIATION

        folder, reference = self.scratch / "shallow", self.scratch / "gradients.safetensors"
        shape = dataclasses.replace(self.base.shape, layers=min(PARITY_LAYERS, self.base.shape.layers))
        with self.stage("parity"):
            write_random_checkpoint(folder, shape, DEVIATION)
            found: dict[str, Any] = {"layers": shape.layers}
            for dtype in ("bf16", "fp32") if self.gpus else ("fp32",):
                reference.unlink(missing_ok=True)
                found[dtype] = []
                for ranks in (1, self.base.processes):
                    spec = dataclasses.replace(
                        self.base,
                        shape=shape,
                        checkpoint=str(folder),
                        tokens=min(self.base.tokens, PARITY_TOKENS),
                        document_tokens=None,
                        dropout=0.0,
                        dtype=dtype,
                        ranks=ranks,
                        fake_ranks=0,
                        gpus=min(self.base.gpus, ranks),
                        keep=0,
                        # One rank has all on its device, two have half of it on the host.
                        offload=0 if ranks == 1 else shape.layers // 2,
                    )
                    found[dtype].append(self._ranks("recipe.bench.parity", spec, reference))
            self.document["parity"] = found

    def _ranks(self, module: str, spec: Spec, *arguments: Path) -> dict[str, Any]:
        spec_file, result = self.scratch / "spec.json", self.scratch / "result.json"
        write_json(spec_file, spec.to_dict())
        result.unlink(missing_ok=True)
        command = bench.launcher(spec.processes, module, *map(str, (spec_file, result, *arguments)))
        bench.say(f"parity: {spec.ranks} of {RANKS} ranks, {spec.dtype}")
        with bench.Watched("parity", command, bench.environment(spec, self.gpus[: spec.gpus])) as program:
            code = program.wait()
        return json.loads(result.read_text()) if code == 0 else failure(code, program.log)

    def disk(self) -> None:
        from recipe.bench.checkpoint import disk_rate

        with self.stage("disk"):
            rate = disk_rate(self.checkpoint, DISK_SAMPLE, READERS * RANKS)
            self.document["disk"] = {"bytes_per_second": rate, "gib_per_second": rate / GIB}


def failure(code: int, log: Any) -> dict[str, Any]:
    sys.stderr.write("".join(log))
    return {"failed": bench.unsaid(code, log), "log": list(log)[-20:]}


def report(document: dict[str, Any]) -> str:
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.0f} s" for stage in document["stages"])
    return "\n".join([table.render(document), "", stages, "", *table.verdict_lines(document["verdicts"])])
