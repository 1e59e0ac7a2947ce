"""A training step, twice: by recipe.engine on real ranks, and by plain transformers + PEFT, one document at a time.

What the tests of this folder compare. The reference shares no line with the engine: other attention, other loss, other
memory, autograd's own backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from recipe.data.encode import IGNORED
from recipe.data.pack import PackedCollator
from recipe.engine.build import Build, peft_config
from recipe.engine.engine import Batch
from recipe.engine.load import load_sharded
from recipe.export.plain import load_plain
from recipe.plan.placement import Placement
from recipe.settings import PROJECTIONS, Lora
from recipe.train.checkpoint import adapter_name
from tests.models import VOCAB

CPU = torch.device("cpu")
LAYERS = 4
# Rank 4 over three ranks is 2, 2 and 0 rows of each A: the last rank holds nothing of it.
LORA = Lora(rank=4, alpha=8, dropout=0.0)
SEED = 7
# Packed rows, by the lengths of their documents: 6 micro-batches of a step, in turn to the ranks.
ROWS = [[5, 17, 9], [30], [2, 3, 4, 20], [12, 12], [8], [21, 6]]
WITHOUT_LABELS = 4  # a row none of whose tokens are in the loss
LONGEST = max(sum(row) for row in ROWS)
TOLERANCE = 1e-5  # absolute for the loss, relative for each gradient
LEARNING_RATE = 0.05
CLIP = 0.05


def packed_row(number: int) -> dict[str, Any]:
    """input_ids, labels (a prompt of a third of each document is not in the loss) and seq_lengths."""
    generator = torch.Generator().manual_seed(number)
    ids: list[int] = []
    labels: list[int] = []
    for length in ROWS[number]:
        document = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        ids += document
        prompt = length if number == WITHOUT_LABELS else max(1, length // 3)
        labels += [IGNORED] * prompt + document[prompt:]
    return {"input_ids": ids, "labels": labels, "seq_lengths": ROWS[number]}


def documents(number: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The documents of a packed row: place of the first token in the row, ids, labels."""
    row, start = packed_row(number), 0
    for length in row["seq_lengths"]:
        piece = slice(start, start + length)
        yield start, torch.tensor(row["input_ids"][piece]), torch.tensor(row["labels"][piece])
        start += length


LABELS = sum(int((labels[1:] != IGNORED).sum()) for n in range(len(ROWS)) for _, _, labels in documents(n))


def batch(number: int) -> Batch:
    return Batch.of(PackedCollator()([packed_row(number)]), CPU)


def adapter(name: str, shape: torch.Size) -> torch.Tensor:
    """A value for each adapter, B too, so that no gradient is zero."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {adapter_name(name): p for name, p in model.named_parameters() if p.requires_grad}


# -- the other tool -----------------------------------------------------------------------------------------------


def plain_model(folder: Path, lora: Lora = LORA) -> nn.Module:
    """Plain transformers + PEFT on the checkpoint, in fp32, with the adapters of `adapter`."""
    model = get_peft_model(load_plain(folder, torch.float32, None), peft_config(lora)).train()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes rounds to the checkpoint's dtype in the backward pass only, whatever it computes in.
            module.weight.quant_state.dtype = torch.float32
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(adapter(name, parameter.shape))
    return model


def plain_loss(model: nn.Module, number: int) -> torch.Tensor:
    """The sum of the losses of a row's tokens."""
    total = torch.zeros(())
    for _, ids, labels in documents(number):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
    return total


def plain_steps(folder: Path) -> SimpleNamespace:
    """Two steps, with an optimizer's between them: losses, gradients, and the first ones clipped."""
    model = plain_model(folder)
    parameters = trained(model)
    found = SimpleNamespace(losses=[], gradients=[], norm=0.0, clipped={})
    for step in range(2):
        loss = sum(plain_loss(model, number) for number in range(len(ROWS))) / LABELS
        loss.backward()
        found.losses.append(loss.item())
        found.gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        if step == 0:
            torch.optim.SGD(parameters.values(), lr=LEARNING_RATE).step()
            found.norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP).item()
            found.clipped = {name: p.grad.clone() for name, p in parameters.items()}
            model.zero_grad()
    return found


# -- ours: a rank of a real process group -------------------------------------------------------------------------


def sharded_model(
    mesh, folder: Path, placement: Placement, kernels: str = "fused", lora: Lora = LORA, dtype=torch.float32
) -> nn.Module:
    return load_sharded(folder, Build(lora, mesh, CPU, dtype, "sdpa", placement, LONGEST, kernels), SEED)


def set_adapters(model: nn.Module, mesh) -> None:
    with torch.no_grad():
        for name, parameter in trained(model).items():
            whole = adapter(name, parameter.shape)
            parameter.to_local().copy_(distribute_tensor(whole, mesh, [Shard(0)]).to_local())


def accumulate(model: nn.Module, mesh) -> float:
    """The micro-batches of this rank, as the trainer runs them: each has its share of the mean over all labels."""
    loss = 0.0
    for number in range(mesh.get_local_rank(), len(ROWS), mesh.size()):
        part = model.engine.loss(batch(number), training=True) * mesh.size() / LABELS
        part.backward()
        loss += part.item()
    return loss


def slices_of_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The rows that this rank holds."""
    return {name: parameter.grad.to_local().clone() for name, parameter in trained(model).items()}


def sharded_steps(mesh, model: nn.Module) -> SimpleNamespace:
    """What plain_steps does, by one rank of `mesh`; of the gradients, what this rank holds."""
    set_adapters(model, mesh)
    found = SimpleNamespace(losses=[], gradients=[], norm=0.0, clipped={})
    for step in range(2):
        found.losses.append(accumulate(model, mesh))
        found.gradients.append(slices_of_gradients(model))
        if step == 0:
            with torch.no_grad():
                for parameter in trained(model).values():
                    parameter.to_local().sub_(parameter.grad.to_local(), alpha=LEARNING_RATE)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            found.norm, found.clipped = norm.full_tensor().item(), slices_of_gradients(model)
            model.zero_grad()
    return found


# -- the comparison -----------------------------------------------------------------------------------------------


def error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient; there are as many as adapters, and none is zero."""
    assert ours.keys() == theirs.keys() and len(ours) == LAYERS * len(PROJECTIONS) * 2
    assert all(expected.norm() > 0 for expected in theirs.values())
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


def whole(slices: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What the ranks hold, one below another."""
    return {name: torch.cat([part[name] for part in slices]) for name in slices[0]}


def differences(ranks: list[SimpleNamespace], plain: SimpleNamespace) -> dict[str, float]:
    """What all ranks together computed and plain did not, beyond the tolerance: a name and how far off."""
    found = {}
    for step, (loss, gradients) in enumerate(zip(plain.losses, plain.gradients, strict=True)):
        mean = sum(rank.losses[step] for rank in ranks) / len(ranks)
        found[f"loss {step + 1}"] = abs(mean - loss)
        found[f"gradients {step + 1}"] = error(whole([rank.gradients[step] for rank in ranks]), gradients)
    found["norm"] = max(abs(rank.norm / plain.norm - 1) for rank in ranks)
    found["clipped"] = error(whole([rank.clipped for rank in ranks]), plain.clipped)
    return {name: value for name, value in found.items() if not value < TOLERANCE}
