"""`recipe bench --suite plan`: what `recipe plan` foresees against what `recipe train` then takes, over many settings.

Each setting is a real training of a few steps, placed for cards of 24 GB, on a random checkpoint of a true shape: GPU
memory and step times come from the run's own metrics, host RAM from the tree of its processes, looked at from outside.
FOLDER/plan.json is written after each; a suite that was cut short goes on with what is missing. What is foreseen is
computed for the report, of the settings and the placement that were measured: by today's plan, whenever they were.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipe import bench
from recipe.bench.sample import GIB, Sampler, Samples
from recipe.bench.spec import TINY
from recipe.errors import UserError
from recipe.files import write_json, write_text
from recipe.hardware import Machine, probe
from recipe.plan import memory
from recipe.plan.cards import card_in
from recipe.plan.duration import duration
from recipe.plan.parts import total_gib
from recipe.plan.placement import Placement
from recipe.plan.shapes import ModelShape, shape_of
from recipe.settings import from_dict
from recipe.train.run import read_jsonl

PLAN = "plan"
STEPS, CPU_STEPS = 8, 3
WARM_UP = 1  # the first step compiles kernels
MEMORY, TIME = 0.03, 0.15  # how far a prediction may be off
CPU_MEMORY = 0.15  # small processes, of which Python's own memory is most
TRAINED = "recipe.bench.trained"


@dataclass(frozen=True)
class Setting:
    """One training. offload, keep: as compute.offload_layers and compute.keep_layers."""

    name: str
    shape: str
    tokens: int
    document: int
    ranks: int = 1
    vram_gib: float | None = 24.0
    ram_gib: float = 100.0
    offload: int | str = "auto"
    keep: int | str = "auto"
    rank: int = 16

    @property
    def steps(self) -> int:
        return CPU_STEPS if self.vram_gib is None else STEPS


SETTINGS = [
    Setting("70B, 1,024 tokens", "llama-3.1-70b", 1024, 1024, ram_gib=64),
    Setting("70B, 2,048 tokens, 60 offloaded", "llama-3.1-70b", 2048, 2048, offload=60, keep=0),
    Setting("70B, 4,096 tokens", "llama-3.1-70b", 4096, 4096, ram_gib=42),
    Setting("70B, 8,192 tokens, packed", "llama-3.1-70b", 8192, 2048, ram_gib=64),
    Setting("70B, 16,384 tokens, packed, 64 offloaded", "llama-3.1-70b", 16384, 4096, offload=64, keep=0),
    Setting("70B, 4,096 tokens, rank 32", "llama-3.1-70b", 4096, 4096, ram_gib=64, rank=32),
    Setting("70B, 4,096 tokens, card of 80 GB", "llama-3.1-70b", 4096, 4096, vram_gib=79.2, offload=0),
    Setting("8B, 2,048 tokens", "llama-3.1-8b", 2048, 2048),
    Setting("8B, 4,096 tokens, 16 offloaded", "llama-3.1-8b", 4096, 4096, offload=16),
    Setting("8B, 8,192 tokens", "llama-3.1-8b", 8192, 8192),
    Setting("8B, 8,192 tokens, nothing kept", "llama-3.1-8b", 8192, 8192, keep=0),
    Setting("8B, 16,384 tokens, packed", "llama-3.1-8b", 16384, 4096),
    Setting("8B, 8,192 tokens, card of 12 GB", "llama-3.1-8b", 8192, 2048, vram_gib=12.0),
    Setting("70B, 2 ranks, 4,096 tokens", "llama-3.1-70b", 4096, 4096, ranks=2, ram_gib=64),
    Setting("70B, 2 ranks, 8,192 tokens, packed", "llama-3.1-70b", 8192, 4096, ranks=2, ram_gib=64),
    Setting("8B, 2 ranks, 2,048 tokens", "llama-3.1-8b", 2048, 2048, ranks=2),
    Setting("8B, 2 ranks, 8,192 tokens", "llama-3.1-8b", 8192, 8192, ranks=2),
]
ON_CPU = [
    Setting("tiny, 2 ranks, 256 tokens", "tiny", 256, 128, ranks=2, vram_gib=None),
    Setting("135M, 512 tokens", "smollm2-135m", 512, 256, vram_gib=None),
]


def run(arguments: Namespace) -> int:
    """Measure what is missing, write FOLDER/plan.json and report.md, print the table. 1 where a prediction was off."""
    machine = probe(".")
    output = Path(arguments.output or "")
    if not arguments.output:
        raise UserError("--suite needs --output FOLDER for its results")
    result = output / f"{PLAN}.json"
    if output.exists() and not result.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"--output is `{output}`, which holds something else; expected a new or an empty folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    gpus = len(machine.gpus) if arguments.gpus is None else arguments.gpus
    head = {
        "command": shlex.join(["recipe", *sys.argv[1:]]),
        "machine": bench.describe(machine, gpus),
        "versions": bench.versions(),
    }
    document: dict[str, Any] = json.loads(result.read_text()) if result.exists() else head | {"results": []}
    document["results"] = [
        row for row in document["results"] if row["status"] == "measured"
    ]  # what failed is tried again
    there = {row["name"] for row in document["results"]}
    wanted = [setting for setting in SETTINGS if setting.ranks <= gpus] if gpus else ON_CPU
    with bench.stop_on_sigterm(), tempfile.TemporaryDirectory(prefix="recipe-plan-") as scratch:
        for number, setting in enumerate(wanted, 1):
            if setting.name in there:
                continue
            bench.say(f"{number} of {len(wanted)}: {setting.name}")
            document["results"].append(measured(setting, machine, Path(scratch), arguments.checkpoint))
            write_json(result, document)
    text = report(document)
    write_text(output / "report.md", text)
    print(text)
    return 0 if all(met(row) for row in document["results"]) else 1


def measured(setting: Setting, machine: Machine, scratch: Path, keep_in: str | None) -> dict[str, Any]:
    """A training of that setting: how it was placed, and what it took."""
    model = Path(keep_in or scratch) / setting.shape
    have_model(model, _shape(setting.shape))
    folder = scratch / setting.name.replace(" ", "-").replace(",", "")
    config = write_config(folder, model, setting)
    gpus = machine.gpus[: setting.ranks] if setting.vram_gib else []
    wanted = {"config": str(config)} | {
        name: getattr(setting, name) for name in ("vram_gib", "ram_gib", "ranks")
    }
    write_json(folder / "wanted.json", wanted)
    # As many as it names are visible, so that nothing else is used.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid or str(gpu.index) for gpu in gpus)}
    command = [sys.executable, "-m", TRAINED, str(folder / "wanted.json"), str(folder / "planned.json")]
    started = time.monotonic()
    with (
        bench.Watched(setting.name, command, environment) as program,
        Sampler(program.process.pid, []) as samples,
    ):
        code = program.wait()
    row: dict[str, Any] = dataclasses.asdict(setting) | {"seconds": time.monotonic() - started}
    if code:
        log = list(program.log)[-20:]
        return row | {"status": "failed", "note": bench.unsaid(code, program.log), "log": log}
    planned = json.loads((folder / "planned.json").read_text())
    metrics, events = (read_jsonl(folder / f"runs/run/{name}.jsonl") for name in ("metrics", "events"))
    pauses = [event["paused_seconds"] for event in events if event["kind"] == "checkpoint"]
    shutil.rmtree(folder)  # its checkpoints
    row |= {"status": "measured", "placement": planned["placement"], "card": gpus[0].name if gpus else None}
    return row | {"measured": taken(metrics, samples, bool(gpus)) | {"save_pause_seconds": max(pauses)}}


def taken(metrics: list[dict[str, Any]], samples: Samples, on_gpu: bool) -> dict[str, Any]:
    """GiB of rank 0's GPU and of the whole tree, and the median step after the first."""
    found: dict[str, Any] = {"host_gib": samples.peak.total / GIB}
    if on_gpu:
        steps = [line["step_seconds"] for line in metrics[WARM_UP:]]
        found |= {
            "vram_gib": max(line["vram_reserved_gib"] for line in metrics),
            "allocated_gib": max(line["vram_allocated_gib"] for line in metrics),
            "step_seconds": statistics.median(steps),
            "step_seconds_min_max": [min(steps), max(steps)],
            "timed_steps": len(steps),
        }
    return found


def foreseen(row: dict[str, Any]) -> dict[str, float]:
    """What the plan says of a measured row: GiB of a GPU's allocator and of host RAM, seconds of a step."""
    setting = Setting(**{field.name: row[field.name] for field in dataclasses.fields(Setting)})
    shape, on_gpu = _shape(setting.shape), row["card"] is not None
    settings = from_dict(config_of(setting))
    placement = Placement(**row["placement"])
    device = memory.device_parts(shape, settings, setting.ranks, on_gpu, placement)
    host = memory.host_parts(shape, settings, device, setting.ranks, on_gpu, placement)
    found = {"host_gib": total_gib(host)}
    if on_gpu:
        found["vram_gib"] = total_gib(device)
    if card := card_in(row["card"] or ""):
        lasts = duration(shape, settings, setting.ranks, (card,) * setting.ranks, card, placement)
        found["step_seconds"] = lasts.step_seconds
    return found


def deviations(row: dict[str, Any]) -> dict[str, float]:
    """How far what was foreseen is off, as shares of what was measured.

    A row without `host_gib` was measured when each rank gathered a checkpoint whole; its host RAM is to be measured again.
    """
    measured = row["measured"]
    return {name: value / measured[name] - 1 for name, value in foreseen(row).items() if name in measured}


def met(row: dict[str, Any]) -> bool:
    if row["status"] != "measured":
        return False
    limits = {"vram_gib": MEMORY, "host_gib": MEMORY if row["card"] else CPU_MEMORY, "step_seconds": TIME}
    return all(abs(off) <= limits[name] for name, off in deviations(row).items())


def _shape(name: str) -> ModelShape:
    return TINY if name == "tiny" else shape_of(name)


def have_model(folder: Path, shape: ModelShape) -> None:
    from recipe.bench.checkpoint import ensure_checkpoint
    from recipe.bench.drill import byte_tokenizer

    ensure_checkpoint(folder, shape)
    byte_tokenizer().save_pretrained(folder)


def write_config(folder: Path, model: Path, setting: Setting) -> Path:
    """A config with as many rows, each of one document's length, as the steps take."""
    folder.mkdir(parents=True)
    text = "".join(chr(97 + number % 26) for number in range(setting.document - 1))  # and its end
    rows = (setting.steps + 1) * setting.ranks * -(-setting.tokens // setting.document)
    (folder / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * rows)
    values = config_of(setting)
    values["model"]["id"] = str(model)
    values["data"]["path"] = str(folder / "rows.jsonl")
    values["paths"] = {"models": str(folder / "models"), "runs": str(folder / "runs")}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def config_of(setting: Setting) -> dict[str, Any]:
    return {
        "model": {"id": setting.shape},
        "lora": {"rank": setting.rank},
        "data": {
            "path": "rows.jsonl",
            "max_length": setting.document,
            "eval_fraction": 0.0,
            "train_on": "all",
        },
        "train": {
            "steps": setting.steps,
            "micro_batch_tokens": setting.tokens,
            "global_batch_tokens": setting.tokens * setting.ranks,
            "save_every": setting.steps,
            "keep_checkpoints": 1,
        },
        "compute": {
            "offload_layers": setting.offload,
            "keep_layers": setting.keep,
            "processes": setting.ranks,
        },
    }


def report(document: dict[str, Any]) -> str:
    """A table in Markdown, as docs/benchmarks.md has it."""
    lines = [
        "| setting | GPU memory reserved, GiB | host RAM, GiB | seconds a step | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["results"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | {row['status']}: {row['note']} | | | |")
            continue
        plan, off = foreseen(row), deviations(row)
        cells = []
        for name, form in (("vram_gib", ".2f"), ("host_gib", ".2f"), ("step_seconds", ".3f")):
            if name in off:
                cells.append(
                    f"{plan[name]:{form}} for {row['measured'][name]:{form}}, {100 * off[name]:+.1f} %"
                )
            else:
                cells.append(f"{plan[name]:{form}}, to be measured" if name in plan else "")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {'met' if met(row) else '**missed**'} |")
    return "\n".join(lines) + "\n"
