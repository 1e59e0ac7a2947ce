"""`recipe bench --decode`: tokens per second of answers, as chat and eval give them, at a model's true shape.

The weights are random bytes in memory. Where the GPU's cap is smaller than the model, layers pass through the buffers
of recipe/export/streamed.py; then a step can be no faster than their bytes cross the link to the GPU, which is measured
in the same run: `share of the link` is that time divided by the step's.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import StoppingCriteria, StoppingCriteriaList

from recipe.bench import described, say
from recipe.bench.sample import GIB, TreeMemory
from recipe.bench.spec import Spec, base_spec
from recipe.engine.layout import MODULES, Constants, Layout
from recipe.engine.memory import EmbeddingTable
from recipe.engine.random import DEVIATION, NF4_DEVIATION, random_config, random_table
from recipe.export.plain import GREEDY, adapters_off
from recipe.export.spread import CPU, HOST, Sizes, Spread, Work, place, rooms
from recipe.export.streamed import LayerStream, assemble
from recipe.hardware import probe
from recipe.plan.placement import spread as evenly
from recipe.plan.shapes import ModelShape

PROMPT_TOKENS, NEW_TOKENS = 128, 32
BATCHES = (1, 8)
COPIES = 8  # of a layer, for the link's rate
REPEATED_BYTES = 64 * 2**20  # of randomness, written over and over
LORA_RANK = 16


def run(arguments: Namespace) -> int:
    """Measure and print: one sequence and eight, with the adapters on and off."""
    machine = probe(".")
    spec = base_spec(arguments, machine)
    gpus = machine.gpus[: spec.gpus]
    # Before CUDA begins in this process.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid or str(gpu.index) for gpu in gpus)
    document = described(spec, machine) | {"decode": measure(spec)}
    print(json.dumps(document, indent=2, ensure_ascii=False) if arguments.json else render(document))
    return 0


def measure(spec: Spec) -> dict[str, Any]:
    started = time.perf_counter()
    model, spread = build(spec)
    say(f"built in {time.perf_counter() - started:.0f} s: {spread.describe()}")
    streams: list[LayerStream] = [s for s in model.get_base_model().streams if s.bytes_per_pass]
    link = [link_rate(stream) for stream in streams]
    copying = max((s.bytes_per_pass / rate for s, rate in zip(streams, link, strict=True)), default=0.0)
    rows, host = [], TreeMemory(os.getpid())
    host_bytes = []  # between the measurements: a thread that looks would take its share of the interpreter
    for batch in BATCHES:
        for adapters in (True, False):
            row = answer(model, spec, batch, adapters)
            row["share_of_link"] = copying / row["step_seconds"] if link else None
            say(
                f"{batch} at once, adapters {'on' if adapters else 'off'}: {row['tokens_per_second']:.2f} tokens/s"
            )
            rows.append(row)
            host_bytes.append(host.read().total)
    return {
        "spread": spread.describe(),
        "layers": spec.shape.layers,
        "layers_in_host_ram": sum(spread.streamed),
        "streamed_gib_per_step": sum(stream.bytes_per_pass for stream in streams) / GIB,
        "link_gb_per_second": [rate / 1e9 for rate in link],
        "cap_gib": spec.cap_gib if spec.on_gpu else None,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "peak_allocated_gib": _peak(torch.cuda.max_memory_allocated, spec.gpus),
        "peak_reserved_gib": _peak(torch.cuda.max_memory_reserved, spec.gpus),
        "host_ram_gib": max(host_bytes) / GIB,
        "rows": rows,
    }


def build(spec: Spec) -> tuple[PeftModel, Spread]:
    """The model with LoRA on all matrices, placed as chat would place it under the cap."""
    shape, dtype = spec.shape, torch.bfloat16 if spec.on_gpu else torch.float32
    adapter_bytes = shape.lora_parameters(LORA_RANK, MODULES) * 4
    for index in range(spec.gpus):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.cap_gib * GIB / total), index)
    if spec.offload == "auto":
        spread = place(Sizes.of(shape, True, dtype, Work(), adapter_bytes), rooms()[: spec.gpus])
    else:
        device = "cuda:0" if spec.on_gpu else CPU
        away = evenly(shape.layers, int(spec.offload))
        host_bytes = sum(away) * Layout.of(shape, 1, nested=True).size
        spread = Spread((device,) * shape.layers, away, HOST, device, host_bytes)
    config = random_config(shape)
    config.use_cache = True
    base = assemble(config, shape, dtype, spread, RandomBytes(shape))
    base.generation_config.eos_token_id = None  # so that every answer has its length
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
    return model, spread


class RandomBytes:
    """A Source of recipe.export.streamed: as recipe.engine.random, but made in the time of a copy."""

    nested = True

    def __init__(self, shape: ModelShape, deviation: float = DEVIATION):
        self.shape, self.scale = shape, deviation / NF4_DEVIATION
        self._layout = Layout.of(shape, 1, nested=True)
        size = min(REPEATED_BYTES, self._layout.size)
        self._bytes = torch.randint(0, 256, (size,), dtype=torch.uint8)
        self._code = create_dynamic_map()

    def fill(self, index: int, run: torch.Tensor) -> None:
        for part in run.split(len(self._bytes)):
            torch.bitwise_xor(self._bytes[: len(part)], index % 256, out=part)  # no layer is like another
        for piece in self._layout.pieces.values():
            if piece.key.endswith("nested_absmax"):
                run[piece.start : piece.end].view(torch.float32).fill_(self.scale / 4)

    def constants(self, index: int, module: str, device: torch.device) -> Constants:
        return Constants(self._code.to(device), self.scale)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.randn(shape, dtype=torch.bfloat16) * DEVIATION

    def embedding_table(self) -> EmbeddingTable:
        return random_table(self.shape, torch.device("cuda" if torch.cuda.is_available() else CPU))


def link_rate(stream: LayerStream) -> float:
    """Bytes a second from host RAM to that device: the very copies that answering makes, one after another."""
    target = stream.slots[0].run
    seconds = []
    for count in range(COPIES + 1):
        _synchronize()
        started = time.perf_counter()
        for run in (stream.runs[count % stream.count], stream.runs[(count + 1) % stream.count]):
            target.copy_(run, non_blocking=True)
        _synchronize()
        seconds.append((time.perf_counter() - started) / 2)
    return stream.layout.size / statistics.median(seconds[1:])


class Clock(StoppingCriteria):
    """When each token was there; it stops nothing."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[0, -1].item()  # wait for it
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(model: PeftModel, spec: Spec, batch: int, adapters: bool) -> dict[str, Any]:
    """One generation after a short one that warms up: its time to the first token, and per token after that."""
    prompt = torch.randint(0, spec.shape.vocab, (batch, PROMPT_TOKENS), device=model.device)
    with adapters_off(model, not adapters), torch.inference_mode():
        for new_tokens in (2, NEW_TOKENS):
            clock = Clock()
            _synchronize()
            started = time.perf_counter()
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
                **GREEDY,
            )
    steps = [after - before for before, after in zip(clock.moments, clock.moments[1:], strict=False)]
    step = statistics.mean(steps)
    return {
        "batch": batch,
        "adapters": adapters,
        "tokens_per_second": batch / step,
        "step_seconds": step,
        "step_seconds_min": min(steps),
        "step_seconds_max": max(steps),
        "first_token_seconds": clock.moments[0] - started,
    }


def render(document: dict[str, Any]) -> str:
    found = document["decode"]
    link = ", ".join(f"{rate:.1f}" for rate in found["link_gb_per_second"])
    lines = [
        f"{document['model']['name']}, {found['spread']}",
        f"{found['streamed_gib_per_step']:.2f} GiB a step from host RAM"
        + (f" over a link of {link} GB/s" if link else ""),
        f"{found['new_tokens']} tokens after {found['prompt_tokens']}:",
        "",
        "at once  adapters   tokens/s   s per step   share of link   first token, s",
    ]
    for row in found["rows"]:
        share = f"{row['share_of_link']:.0%}" if row["share_of_link"] else "-"
        lines.append(
            f"{row['batch']:>7}  {'on' if row['adapters'] else 'off':<8}{row['tokens_per_second']:>11.2f}"
            f"{row['step_seconds']:>13.4f}{share:>16}{row['first_token_seconds']:>17.2f}"
        )
    peak = (
        ""
        if found["peak_allocated_gib"] is None
        else (
            f"GPU {found['peak_allocated_gib']:.2f} GiB allocated, {found['peak_reserved_gib']:.2f} reserved, cap "
            f"{found['cap_gib']:g}; "
        )
    )
    return "\n".join([*lines, "", f"peak: {peak}host RAM {found['host_ram_gib']:.1f} GiB"])


def _peak(measure, gpus: int) -> float | None:
    return max(measure(index) for index in range(gpus)) / GIB if gpus else None


def _synchronize() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
