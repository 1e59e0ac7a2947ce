"""Two ranks against one: the loss and every LoRA gradient of the same rows, at a model's true layer shapes.

    torchrun --nproc_per_node N -m recipe.bench.parity SPEC.json RESULT.json GRADIENTS.safetensors

The first run writes the gradients, the next one compares its own with them. What differs between the two is where the layers
lie and the order of sums: the head's over the vocabulary, and those over rows and ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recipe.bench.ours import Ours
from recipe.bench.spec import Spec
from recipe.bench.worker import cap_allocator, join
from recipe.engine.build import initial_lora
from recipe.engine.rows import rows_of_rank
from recipe.files import write_json

ROWS = 2
# Of the decoder layers' weights. As large as trained ones, random weights amplify every rounding.
DEVIATION = 0.002
B_DEVIATION = 0.02  # times what A starts with: B at zero would leave A without a gradient


def main(spec_file: str, result_file: str, reference: str) -> int:
    spec = Spec.from_dict(json.loads(Path(spec_file).read_text()))
    device, mesh = join(spec)
    cap_allocator(spec, device)
    program = Ours(spec, device, mesh)
    start_b(program)
    loss, gradients = step(program, spec)
    if dist.get_rank() == 0:
        found: dict[str, Any] = {"ranks": spec.ranks, "loss": loss, "rows": ROWS, "tokens": spec.tokens}
        if not Path(reference).exists():
            save_file(gradients, reference)
        else:
            found |= distance(gradients, load_file(reference, device=str(device)))
        write_json(Path(result_file), found)
    dist.barrier()
    return 0


def start_b(program: Ours) -> None:
    """Random B matrices, the same on any number of ranks."""
    adapters = program.engine.adapters
    for (layer, module, kind), parameter in adapters.parameters.items():
        if kind == "B":
            whole = initial_lora(f"{layer} {module}", tuple(parameter.shape), program.spec.seed) * B_DEVIATION
            start, end = rows_of_rank(len(whole), adapters.world, adapters.place)
            parameter.detach().to_local().copy_(whole[start:end])


def step(program: Ours, spec: Spec) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of all rows, and its whole gradients (fp32) by layer, module and matrix, on every rank."""
    adapters = program.engine.adapters
    losses = []
    for row in range(adapters.place, ROWS, adapters.world):
        generator = torch.Generator().manual_seed(spec.seed + row)
        ids = torch.randint(0, spec.shape.vocab, (spec.tokens,), generator=generator)
        losses.append(program.step(ids, spec.document_lengths))
    total = torch.stack(losses).sum()
    dist.all_reduce(total)
    # A rank has added up its rows, and the ranks have been averaged.
    scale = adapters.world / ROWS
    gradients = {
        f"{layer}.{module}.{kind}": parameter.grad.full_tensor() * scale
        for (layer, module, kind), parameter in adapters.parameters.items()
    }
    return total.item() / ROWS, gradients


def distance(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far gradients are from the reference, relative to it: the worst matrix, and all as one vector."""
    if gradients.keys() != reference.keys():
        raise ValueError("the reference has the gradients of other matrices")
    apart = {name: (gradients[name] - reference[name]).norm().item() for name in reference}
    size = {name: reference[name].norm().item() for name in reference}
    if not all(size.values()):
        raise ValueError("a gradient of the reference is zero: nothing can be compared with it")
    worst = max(apart, key=lambda name: apart[name] / size[name])
    return {
        "matrices": len(apart),
        "worst_matrix": worst,
        "worst": apart[worst] / size[worst],
        "all": sum(value**2 for value in apart.values()) ** 0.5 / sum(v**2 for v in size.values()) ** 0.5,
    }


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as recipe.bench.worker
