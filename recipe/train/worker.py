"""One rank of a run: started by `recipe train` through torchrun (CPUs) or accelerate launch (GPUs).

    torchrun --nproc_per_node 2 -m recipe.train.worker runs/NAME --placement JSON [--resume .../step-000010]

Everything about the run stands in its folder: config.yaml and the tokenised rows under data/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from recipe.train import imports  # noqa: F401  # before everything else

import argparse
import gc
import json
import math
import os
import re
import socket
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import set_seed

from recipe.data.encode import load_tokenizer
from recipe.data.new_tokens import token_ids
from recipe.data.pack import MicroBatches, PackedCollator
from recipe.engine.build import Build
from recipe.engine.devices import (
    attention_kind,
    compute_device,
    compute_dtype,
    set_accumulation,
    set_deterministic,
)
from recipe.engine.load import load_sharded
from recipe.engine.lora import Adapters
from recipe.errors import Refused, UserError
from recipe.files import read_json, write_json
from recipe.plan.budget import GPU_SPARE_GIB
from recipe.plan.memory import layer_bytes
from recipe.plan.parts import GIB
from recipe.plan.placement import Placement
from recipe.plan.shapes import ModelShape, shape_of
from recipe.settings import Settings
from recipe.train import checkpoint, start
from recipe.train.alarms import HostWatch, NotFinite, SaveFailed
from recipe.train.dpo import ShardedDPOTrainer
from recipe.train.heldout import EarlyStop, perplexity
from recipe.train.pulse import Pulse
from recipe.train.rehearsal import rehearse
from recipe.train.resume import resume_point
from recipe.train.run import Run, read_jsonl
from recipe.train.stopping import Stopper
from recipe.train.trackers import trackers
from recipe.train.trainer import ShardedSFTTrainer, training_arguments
from recipe.train.watch import Watch

BLAME_SECONDS = 1.0  # ten looks of the launcher
# What torch's allocator for the host and the system say where RAM or its limit is full.
HOST_IS_FULL = re.compile(r"can't allocate memory|Cannot allocate memory|DefaultCPUAllocator")


def main() -> int:
    """Train, and say in the run's events what went wrong. Returns the exit code."""
    gc.freeze()  # what is imported by now is never looked through again
    gc.enable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--placement", type=json.loads, required=True, help="JSON, as recipe.plan decides it")
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    pulse = Pulse(run, _rank())
    pulse.start()
    ending = ExitStack()
    stopper = Stopper(run, pulse, ending)
    stopper.install()
    code = 1
    try:
        train(run, Placement(**arguments.placement), arguments.resume, pulse, stopper, ending)
        code = 0
    except BaseException as error:
        stopper.let_end()
        code = _report(error, run, Placement(**arguments.placement), pulse)
    finally:
        pulse.enter("end")
        pulse.ended = code  # now already: the way out may hang
        ending.close()
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
    if isinstance(error, SaveFailed):
        return "save_failed"
    return "out_of_host_memory" if str(error).startswith("host RAM") else "unexpected"


def train(
    run: Run, placement: Placement, resume: Path | None, pulse: Pulse, stopper: Stopper, ending: ExitStack
) -> None:
    """`ending` gets what has to be closed however this ends."""
    started = time.perf_counter()
    settings = run.settings()
    pulse.enter("load")
    pulse.mark("join the process group")
    device = join_process_group()
    pulse.follow(device)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        resume = resume_after_restart(run)
    set_seed(settings.train.seed)
    set_deterministic(settings.train.deterministic)
    dtype = compute_dtype(settings)
    kind = attention_kind(settings, dtype)
    model_folder = Path(read_json(run.manifest)["model"]["folder"])
    mesh = torch.distributed.init_device_mesh(device.type, (dist.get_world_size(),))
    set_accumulation(settings, dtype)
    pulse.mark("load the tokenizer")
    tokenizer = load_tokenizer(model_folder, settings.data, settings.lora.new_tokens)
    build = Build(
        lora=settings.lora,
        mesh=mesh,
        device=device,
        dtype=dtype,
        attention=kind,
        placement=placement,
        max_tokens=settings.micro_batch_tokens,
        kernels=settings.compute.kernels,
        neftune_alpha=settings.train.neftune_alpha,
        token_ids=token_ids(tokenizer, settings.lora.new_tokens),
        mark=pulse.mark,
    )
    model = load_sharded(model_folder, build, settings.train.seed)
    pulse.mark("load the adapters to start with")
    start_with(run, model.engine.adapters, settings)
    pulse.mark("load rows")
    train_rows, held_out = (MicroBatches.open(run.folder / "data", name) for name in ("train", "held_out"))
    pulse.mark("make the trainer")
    watch = Watch(run, stopper, settings.train, pulse)
    told = trackers(settings, run, watch) if dist.get_rank() == 0 else []
    for tracker in told:
        ending.callback(tracker.close)
    early = EarlyStop(run, settings.train.early_stopping) if settings.train.early_stopping else None
    dpo = settings.train.method == "dpo"
    trainer = (ShardedDPOTrainer if dpo else ShardedSFTTrainer)(
        model=model,
        args=training_arguments(settings, run, dist.get_world_size(), evaluates=len(held_out) > 0),
        data_collator=PackedCollator(),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch, *([early] if early else []), *told],
        run=run,
        keep_checkpoints=settings.train.keep_checkpoints,
        pulse=pulse,
        stopper=stopper,
        **({"beta": settings.train.dpo_beta} if dpo else {}),
    )
    watch.trainer = trainer
    stopper.arm(trainer, checkpoint.read_state(resume)["step"] if resume else 0)
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
    trainer.saver.wait(pulse.mark)
    if stopper.place is not None and not run.checkpoint(trainer.state.global_step).exists():
        trainer._save_checkpoint(trainer.model, None)
        trainer.saver.wait(pulse.mark)
    if trainer.saver.failure:
        raise SaveFailed(
            f"training is done, but its last checkpoint could not be written: {trainer.saver.failure}; free some space "
            "there, and the same command goes on from the checkpoint before"
        )
    measured = trainer.evaluate() if len(held_out) else {}
    held_out_loss = measured.get("eval_chosen_loss", measured.get("eval_loss"))
    if first:
        stopper.hold()  # for good: from here on the run is finished, not stopped
        lines = read_jsonl(run.metrics)
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        ended = run.checkpoint(trainer.state.global_step)
        write_json(
            run.summary,
            {
                "steps": trainer.state.global_step,
                # The trainer's own mean forgets the steps before a resume.
                "train_loss": sum(losses) / len(losses),
                "skipped_steps": sum(line.get("skipped", False) for line in lines),
                # Per token, of answers that are to be given: what the export compares, whatever was trained.
                "held_out_loss": held_out_loss,
                "held_out_perplexity": None if held_out_loss is None else perplexity(held_out_loss),
                **(_preference(measured) if dpo else {}),
                "stopped_early": trainer.state.global_step < trainer.state.max_steps,
                "checkpoint": ended.name,
                "adapters_sha256": checkpoint.read_state(ended)["sha256"][checkpoint.ADAPTERS],
                "compute_dtype": str(dtype).removeprefix("torch."),
            },
        )
        run.event("finished", f"finished {trainer.state.global_step} steps", step=trainer.state.global_step)


def start_with(run: Run, adapters: Adapters, settings: Settings) -> None:
    """The adapters of `lora.start`, which DPO measures the trained ones by. A resume then loads its own over them."""
    if settings.lora.start is not None:
        start.load(read_json(run.manifest)["start"], adapters)
        if settings.train.method == "dpo":
            adapters.freeze()


def _preference(measured: dict[str, float]) -> dict[str, float | None]:
    """DPO's own numbers on the held-out pairs: its loss, and the share of pairs told apart rightly."""
    return {
        "held_out_dpo_loss": measured.get("eval_loss"),
        "held_out_dpo_accuracy": measured.get("eval_accuracy"),
    }


def resume_after_restart(run: Run) -> Path | None:
    """Where all ranks go on after one of them has failed (a collective)."""
    found: list[Any] = [None, []]
    if dist.get_rank() == 0:
        found = list(resume_point(run))
        for note in found[1]:
            run.event("warning", note, cause="checkpoint_damaged")
    dist.broadcast_object_list(found, src=0)
    return found[0]


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
