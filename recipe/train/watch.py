"""What is written down while training runs: one line per step in metrics.jsonl; and how a signal becomes a clean stop."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from recipe import sensors
from recipe.sensors import NoSensors
from recipe.settings import Train
from recipe.train import checkpoint
from recipe.train.alarms import Curve, Lamps, not_finite, vram_alarms, warn
from recipe.train.pulse import Pulse
from recipe.train.run import Run, append_json, read_jsonl

GIB = 2**30


class StopRequest:
    """Set by SIGINT or SIGTERM; training then ends at the next step, with a checkpoint."""

    def __init__(self) -> None:
        self.signal = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = number


class Watch(TrainerCallback):
    """Collects each step's numbers over all ranks and lets rank 0 write them; agrees on stopping."""

    def __init__(self, run: Run, stop: StopRequest, train: Train, pulse: Pulse):
        self.run, self.stop, self.save_every, self.pulse = run, stop, train.save_every, pulse
        self.curve = Curve(read_jsonl(run.metrics))
        self.lamps = Lamps()
        self.retries = 0
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

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.started
        tokens, self.trainer.step_tokens = self.trainer.step_tokens, 0
        shared = torch.tensor(
            [tokens, psutil.Process().memory_info().rss / GIB, float(self.stop.signal > 0)],
            dtype=torch.float64,
        )
        self.pulse.mark("all-reduce of the step's numbers")
        dist.all_reduce(shared)
        tokens, host_gib, stopping = shared.tolist()
        self.last = {
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds, 2),
            "step_seconds": round(seconds, 4),
            **_vram(),
            "host_ram_gib": round(host_gib, 3),
            **_gpu_sensors(),
        }
        self._watch_vram(state.global_step)
        control.should_training_stop = control.should_training_stop or bool(stopping)
        control.should_save = control.should_training_stop or state.global_step % self.save_every == 0
        return control

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.pulse.mark("optimizer step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called on all ranks, with the loss over all of them, before a checkpoint of that step would be written."""
        if not logs or "loss" not in logs or "grad_norm" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            saved = checkpoint.checkpoints(self.run.folder)
            rate, newest = args.learning_rate, saved[-1].name if saved else None
            raise not_finite(state.global_step, logs["loss"], rate, newest)
        if state.is_world_process_zero:
            append_json(
                self.run.metrics,
                {
                    "step": state.global_step,
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": logs["grad_norm"],
                    **self.last,
                },
            )
            for alarm in self.curve.step(state.global_step, logs["loss"], logs["grad_norm"]):
                warn(self.run, alarm, rank=0, step=state.global_step)

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
