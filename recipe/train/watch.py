"""What is written down while training runs, one line per step in metrics.jsonl, and what is done about a bad step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from recipe import sensors
from recipe.hardware import resident_bytes
from recipe.sensors import NoSensors
from recipe.settings import Train
from recipe.train import checkpoint
from recipe.train.alarms import (
    Alarm,
    Curve,
    Lamps,
    SaveFailed,
    not_finite,
    skipped_step,
    vram_alarms,
    warn,
)
from recipe.train.pulse import Pulse
from recipe.train.run import Run, append_json, read_jsonl
from recipe.train.saver import Place
from recipe.train.stopping import Stopper

GIB = 2**30
SKIPS_IN_A_ROW = 10  # then it is not the rows: every step would be one that is left out


class Watch(TrainerCallback):
    """Collects each step's numbers over all ranks and lets rank 0 write them; sees to it that all ranks do alike."""

    def __init__(self, run: Run, stopper: Stopper, train: Train, pulse: Pulse):
        self.run, self.stopper, self.train, self.pulse = run, stopper, train, pulse
        self.curve = Curve(read_jsonl(run.metrics))
        self.lamps = Lamps()
        self.retries = 0
        self.skipped_in_a_row = 0
        self.told_failure = False
        self.trainer: Any = None
        self.started = 0.0
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.event("begun", f"training to step {state.max_steps}", steps=state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self.pulse.step, self.pulse.micro_batch = state.global_step + 1, 0
        self.pulse.enter("train")
        self.started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.pulse.mark("optimizer step")
        self.stopper.hold()

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.stopper.stepped(Place.here(state.global_step, trainer.lr_scheduler.state_dict()))
        seconds = time.perf_counter() - self.started
        tokens, trainer.step_tokens = trainer.step_tokens, 0
        failed = trainer.saver.failure is not None and dist.get_rank() == 0
        shared = torch.tensor(
            [
                tokens,
                resident_bytes() / GIB,
                float(self.stopper.asked),
                float(failed and not self.told_failure),
            ],
            dtype=torch.float64,
        )
        self.pulse.mark("all-reduce of the step's numbers")
        dist.all_reduce(shared)
        tokens, host_gib, stopping, failed = shared.tolist()
        self.last = {
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds, 2),
            "step_seconds": round(seconds, 4),
            **_vram(),
            "host_ram_gib": round(host_gib, 3),
            **_gpu_sensors(),
        }
        self._watch_vram(state.global_step)
        if stopping:
            self.stopper.ask()
        if failed:
            self._save_failed(state.global_step)
        control.should_save = control.should_training_stop or state.global_step % self.train.save_every == 0
        return control

    def on_save(self, args, state, control, **kwargs):
        self.told_failure = False

    def _save_failed(self, step: int) -> None:
        """A checkpoint could not be written: go on with a warning, or end as long as the one before is there."""
        self.told_failure = True
        self.trainer.saver.wait(self.pulse.mark)
        found = f"step {step}: the checkpoint could not be written: {self.trainer.saver.failure}"
        saved = checkpoint.checkpoints(self.run.folder)
        newest = f"{saved[-1].name} is untouched" if saved else "there is none before it"
        if self.train.on_save_error == "stop":
            raise SaveFailed(
                f"{found}; {newest}; free some space there, and the same command goes on (train.on_save_error: stop)"
            )
        if dist.get_rank() == 0:
            text = f"{found}; {newest}; training goes on and tries again after {self.train.save_every} steps: free some space"
            warn(self.run, Alarm("save_failed", text), rank=0, step=step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called on all ranks, with the loss over all of them, before a checkpoint of that step would be written."""
        if not logs or "loss" not in logs or "grad_norm" not in logs:
            return
        loss, norm = logs["loss"], logs["grad_norm"]
        if not math.isfinite(loss) and not self._may_skip():
            saved = checkpoint.checkpoints(self.run.folder)
            rate, newest = args.learning_rate, saved[-1].name if saved else None
            raise not_finite(state.global_step, loss, rate, newest, self.skipped_in_a_row)
        if not math.isfinite(loss):
            # transformers takes it off itself, which leaves NaN: no later step would have a loss.
            self.trainer._tr_loss.zero_()
        skipped = self.trainer.skips
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not state.is_world_process_zero:
            return
        line = {
            "step": state.global_step,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": logs["learning_rate"],
            "grad_norm": norm if math.isfinite(norm) else None,
            **self.last,
        }
        append_json(self.run.metrics, line | ({"skipped": True} if skipped else {}))
        alarms = [skipped_step(state.global_step, loss)] if skipped else []
        if math.isfinite(loss):
            alarms += self.curve.step(state.global_step, loss, norm)
        for alarm in alarms:
            warn(self.run, alarm, rank=0, step=state.global_step)

    def _may_skip(self) -> bool:
        return self.train.on_nan == "skip" and self.skipped_in_a_row < SKIPS_IN_A_ROW - 1

    def _watch_vram(self, step: int) -> None:
        if not torch.cuda.is_available():
            return
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        reserved = torch.cuda.max_memory_reserved()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        for alarm in vram_alarms(reserved / GIB, total / GIB, retries, self.retries, self.lamps):
            warn(self.run, alarm, step=step, rank=self.pulse.rank)
        self.retries = retries


def _vram() -> dict[str, float | None]:
    if not torch.cuda.is_available():
        return {"vram_allocated_gib": None, "vram_reserved_gib": None}
    return {
        "vram_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "vram_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def _gpu_sensors() -> dict[str, list[float | None]]:
    """Temperature in degrees Celsius and power in watts of every GPU, where NVML tells."""
    if not torch.cuda.is_available():
        return {}
    try:
        gpus = sensors.read()
    except NoSensors:
        return {}
    return {
        "temperature_celsius": [gpu.temperature_celsius for gpu in gpus],
        "power_watts": [gpu.power_watts for gpu in gpus],
    }
