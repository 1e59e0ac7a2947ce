"""One rank of a run: started by `recipe train` through torchrun (CPUs) or accelerate launch (GPUs).

    torchrun --nproc_per_node 2 -m recipe.train.worker runs/NAME --placement JSON [--resume .../step-000010]

Everything about the run stands in its folder: config.yaml and the tokenised rows under data/.
"""

from __future__ import annotations

import gc

gc.disable()  # what is imported stays: to look for garbage among it would be a sixth of a rank's start

import argparse
import json
import math
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import set_seed

from recipe.engine.build import Build
from recipe.engine.devices import attention_kind, compute_device, compute_dtype, set_accumulation
from recipe.engine.load import load_sharded
from recipe.errors import Refused, UserError
from recipe.files import read_json, write_json
from recipe.plan.budget import GPU_SPARE_GIB
from recipe.plan.memory import layer_bytes
from recipe.plan.parts import GIB
from recipe.plan.placement import Placement
from recipe.plan.shapes import ModelShape, shape_of
from recipe.settings import Settings
from recipe.train.alarms import HostWatch, NotFinite
from recipe.train.data import PackedCollator, load_tokenizer
from recipe.train.pulse import Pulse
from recipe.train.rehearsal import rehearse
from recipe.train.run import Run, read_jsonl
from recipe.train.trainer import ShardedSFTTrainer, training_arguments
from recipe.train.watch import StopRequest, Watch

gc.freeze()
gc.enable()

BLAME_SECONDS = 1.0  # ten looks of the launcher
# What torch's allocator for the host and the system say where RAM or its limit is full.
HOST_IS_FULL = re.compile(r"can't allocate memory|Cannot allocate memory|DefaultCPUAllocator")


def main() -> int:
    """Train, and say in the run's events what went wrong. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--placement", type=json.loads, required=True, help="JSON, as recipe.plan decides it")
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    pulse = Pulse(run, _rank())
    pulse.start()
    code = 1
    try:
        train(run, Placement(**arguments.placement), arguments.resume, pulse)
        code = 0
    except BaseException as error:
        code = _report(error, run, Placement(**arguments.placement), pulse)
    finally:
        pulse.enter("end")
        pulse.ended = code  # now already: the way out may hang
        pulse.mark("leave the process group")
        if dist.is_initialized():
            dist.destroy_process_group()
        pulse.end(code)
    return code


def _report(error: BaseException, run: Run, placement: Placement, pulse: Pulse) -> int:
    """Write the event of what ended this rank; the exit code."""
    before = "in the rehearsal before step 1: " if pulse.phase == "rehearsal" else ""
    where = {"rank": _rank(), "host": socket.gethostname(), "step": pulse.step, "operation": pulse.doing}
    if isinstance(error, (UserError, Refused)):
        run.event("error", before + str(error), cause=_cause(error), exit_code=error.exit_code, **where)
        return error.exit_code
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        shape = shape_of(read_json(run.manifest)["model"]["folder"])
        said = out_of_memory(error, run.settings(), placement, shape)
        run.event("error", before + said, cause="out_of_memory", exit_code=1, **where)
    elif isinstance(error, MemoryError) or HOST_IS_FULL.search(str(error)):
        said = (str(error).splitlines() or ["MemoryError"])[0]
        available = psutil.virtual_memory().available / GIB
        run.event(
            "error",
            f"{before}host RAM is full on rank {_rank()} ({available:.1f} GiB are left): {said[:200]}; "
            "end other programs, add RAM, or set compute.offload_layers lower",
            cause="out_of_host_memory",
            exit_code=1,
            **where,
        )
    else:
        said = f"{before}{type(error).__name__}: {error}"
        run.event("error", said, cause="unexpected", exit_code=1, traceback=text, **where)
        # Where another rank was killed, this one has only lost its connection. The launcher blames who ends first.
        time.sleep(BLAME_SECONDS)
    return 1


def _cause(error: UserError | Refused) -> str:
    """The event's cause: a request that was wrong, or what the engine and the alarms refuse to go on with."""
    if isinstance(error, UserError):
        return "request"
    if isinstance(error, NotFinite):
        return "nan_loss"
    return "out_of_host_memory" if str(error).startswith("host RAM") else "unexpected"


def train(run: Run, placement: Placement, resume: Path | None, pulse: Pulse) -> None:
    stop = StopRequest()
    stop.install()
    started = time.perf_counter()
    settings = run.settings()
    pulse.enter("load")
    pulse.mark("join the process group")
    device = join_process_group()
    pulse.follow(device)
    set_seed(settings.train.seed)
    dtype = compute_dtype(settings)
    kind = attention_kind(settings, dtype)
    model_folder = Path(read_json(run.manifest)["model"]["folder"])
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    set_accumulation(settings, dtype)
    build = Build(
        lora=settings.lora,
        mesh=mesh,
        device=device,
        dtype=dtype,
        attention=kind,
        placement=placement,
        max_tokens=settings.micro_batch_tokens,
        kernels=settings.compute.kernels,
        mark=pulse.mark,
    )
    model = load_sharded(model_folder, build, settings.train.seed)
    pulse.mark("load tokenizer and rows")
    tokenizer = load_tokenizer(model_folder, settings.data)
    train_rows, held_out = (
        Dataset.load_from_disk(str(run.folder / "data" / name)) for name in ("train", "held_out")
    )
    pulse.mark("make the trainer")
    watch = Watch(run, stop, settings.train, pulse)
    trainer = ShardedSFTTrainer(
        model=model,
        args=training_arguments(settings, run, dist.get_world_size(), evaluates=len(held_out) > 0),
        data_collator=PackedCollator(),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch],
        run=run,
        keep_checkpoints=settings.train.keep_checkpoints,
        pulse=pulse,
    )
    watch.trainer = trainer
    first = dist.get_rank() == 0
    if first:
        run.event(
            "loaded",
            f"model sharded over {dist.get_world_size()} ranks in {time.perf_counter() - started:.0f} s "
            f"({str(dtype).removeprefix('torch.')}, attention {kind}; {placement.offload_layers} of "
            f"{placement.layers} layers offloaded, {placement.keep_layers} keep their activations)",
        )
    if settings.train.rehearsal:
        rehearse(trainer, run, pulse, settings.train.keep_checkpoints)
    if resume is None and len(held_out):
        trainer.evaluate()
    pulse.enter("load")
    if int(os.environ["LOCAL_RANK"]) == 0:
        HostWatch(run, pulse, device.type == "cuda").start()
    # Each run of the same seed draws the same dropout, whether or not it evaluated before.
    set_seed(settings.train.seed + dist.get_rank())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step < trainer.state.max_steps:  # on all ranks alike, unlike stop.signal
        if first:
            run.event(
                "stopped",
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}",
                step=trainer.state.global_step,
            )
        return
    if not run.checkpoint(trainer.state.global_step).exists():
        trainer._save_checkpoint(trainer.model, None)
    held_out_loss = trainer.evaluate()["eval_loss"] if len(held_out) else None
    if first:
        losses = [line["loss"] for line in read_jsonl(run.metrics)]
        write_json(
            run.summary,
            {
                "steps": trainer.state.global_step,
                # The trainer's own mean forgets the steps before a resume.
                "train_loss": sum(losses) / len(losses),
                "held_out_loss": held_out_loss,
                "checkpoint": run.checkpoint(trainer.state.global_step).name,
                "compute_dtype": str(dtype).removeprefix("torch."),
            },
        )
        run.event("finished", f"finished {trainer.state.global_step} steps", step=trainer.state.global_step)


def out_of_memory(error: Exception, settings: Settings, placement: Placement, shape: ModelShape) -> str:
    """One line for a full GPU: what was allocated, what was asked for, and the setting that would fit."""
    asked = re.search(r"Tried to allocate ([\d.]+) (MiB|GiB)", str(error))
    asked_gib = float(asked[1]) / (1024 if asked[2] == "MiB" else 1) if asked else 1.0
    held = re.search(r"([\d.]+ [MG]iB) is allocated by PyTorch", str(error))
    world = int(os.environ.get("WORLD_SIZE", 1))
    per_layer = layer_bytes(shape, settings) / world / GIB
    more = placement.offload_layers + math.ceil((asked_gib + GPU_SPARE_GIB) / per_layer)
    if more <= placement.layers:
        remedy = f"compute.offload_layers={more} (now {placement.offload_layers})"
    else:
        remedy = (
            f"train.micro_batch_tokens={settings.micro_batch_tokens // 2} (now {settings.micro_batch_tokens})"
        )
    return (
        f"GPU memory is full on rank {_rank()}: {asked_gib:.2f} GiB were asked for with "
        f"{held[1] if held else 'nearly all'} allocated; end other programs on the GPU, or make it fit with "
        f"--set {remedy}"
    )


def join_process_group() -> torch.device:
    """gloo for what lies on CPUs and NCCL between GPUs; also for a single process without a launcher."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    device = compute_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and synced. Taking the interpreter down beside gloo's threads has aborted a rank now and then
    # ("terminate called without an active exception", about one exit in thirty under load).
    os._exit(code)
