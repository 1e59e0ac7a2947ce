"""What is written down while training runs: one line per step in metrics.jsonl; and how a signal becomes a clean stop."""

from __future__ import annotations

import signal
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from recipe.train.run import Run, append_json

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

    def __init__(self, run: Run, stop: StopRequest, save_every: int):
        self.run, self.stop, self.save_every = run, stop, save_every
        self.trainer: Any = None
        self.started = 0.0
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.event("begun", f"training to step {state.max_steps}", steps=state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
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
        control.should_training_stop = control.should_training_stop or bool(stopping)
        control.should_save = control.should_training_stop or state.global_step % self.save_every == 0
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs and "grad_norm" in logs:
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


def _vram() -> dict[str, float | None]:
    if not torch.cuda.is_available():
        return {"vram_allocated_gib": None, "vram_reserved_gib": None}
    return {
        "vram_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "vram_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def _gpu_sensors() -> dict[str, list[float]]:
    """Temperature in degrees Celsius and power in watts of every GPU, where NVML tells."""
    if not torch.cuda.is_available():
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {
            "temperature_celsius": [
                pynvml.nvmlDeviceGetTemperature(h, pynvml.NVML_TEMPERATURE_GPU) for h in handles
            ],
            "power_watts": [pynvml.nvmlDeviceGetPowerUsage(h) / 1000 for h in handles],
        }
    except pynvml.NVMLError:
        return {}
