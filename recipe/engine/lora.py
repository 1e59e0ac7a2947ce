"""The trained part: LoRA matrices as fp32 masters, sharded over the ranks, gathered in the compute dtype layer by layer.

A layer's matrices lie in one run, those that share an input side by side (the A of q, k and v are one matrix of three
times the rank), so that one product serves them all. Each rank holds rows of every matrix, cut as torch.chunk cuts
them, in one run of its own: one cast, one gather and one reduction per layer. The parameters that an optimizer and a
checkpoint see are DTensors, views of that run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from recipe.engine.rows import rows_of_rank, rows_per_rank
from recipe.engine.tokens import NewTokens
from recipe.plan.shapes import ModelShape
from recipe.settings import Lora

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
# The linear layers that read the same input.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Matrix:
    """One LoRA matrix: where it lies in a layer's whole run, and where its rows lie in a rank's run."""

    module: str
    kind: str  # A (rank, in) or B (out, rank)
    rows: int
    columns: int
    start: int
    local_start: int
    world: int

    def rows_of(self, rank: int) -> tuple[int, int]:
        return rows_of_rank(self.rows, self.world, rank)

    @property
    def local_size(self) -> int:
        """Values that every rank has room for, whether it holds so many rows or fewer."""
        return rows_per_rank(self.rows, self.world) * self.columns

    @property
    def size(self) -> int:
        return self.rows * self.columns


class LoraView:
    """The LoRA matrices of one layer, whole: `a[group]` (ranks of the group, in) and `b[module]` (out, rank)."""

    def __init__(self, run: torch.Tensor, matrices: list[Matrix], rank: int):
        self.run = run
        self.rank = rank
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        self.members: dict[str, list[str]] = {}
        by_key = {(m.module, m.kind): m for m in matrices}
        for group, modules in GROUPS.items():
            found = [by_key[module, "A"] for module in modules if (module, "A") in by_key]
            if not found:
                continue
            self.members[group] = [m.module for m in found]
            first, last = found[0], found[-1]
            self.a[group] = run[first.start : last.start + last.size].view(-1, first.columns)
            for m in found:
                b = by_key[m.module, "B"]
                self.b[m.module] = run[b.start : b.start + b.size].view(b.rows, b.columns)

    def columns_of(self, group: str, module: str) -> slice:
        """The columns of x @ a[group].T that belong to `module`."""
        first = self.members[group].index(module) * self.rank
        return slice(first, first + self.rank)


class Adapters:
    """All LoRA matrices of a model: masters (layers, local) fp32, their gradients, and the parameters over them.

    tokens: what else is trained, the rows of new tokens, where there are some.
    """

    def __init__(
        self,
        shape: ModelShape,
        lora: Lora,
        mesh: DeviceMesh,
        device: torch.device,
        dtype: torch.dtype,
        token_ids: tuple[int, ...] = (),
    ):
        self.lora, self.mesh, self.device, self.dtype = lora, mesh, device, dtype
        self.tokens = (
            NewTokens(token_ids, shape.tied, shape.hidden, mesh, device, dtype) if token_ids else None
        )
        self.world, self.place = mesh.size(), mesh.get_local_rank()
        self.group = mesh.get_group()
        self.scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        self.matrices = _matrices(shape, lora, self.world)
        self.size = sum(m.size for m in self.matrices)
        self.local_size = sum(m.local_size for m in self.matrices)
        # All of a rank's masters in one tensor, which is what the optimizer gets: one kernel steps them all.
        self.flat = nn.Parameter(torch.zeros(shape.layers, self.local_size, device=device))
        self.masters = self.flat.detach()
        self.gradients = torch.zeros_like(self.masters)
        self.parameters: dict[tuple[int, str, str], nn.Parameter] = {}  # by layer, module and kind
        self._places: dict[int, tuple[int, Matrix]] = {}  # by id of the parameter: its layer and matrix
        for layer in range(shape.layers):
            for m in self.matrices:
                parameter = nn.Parameter(self._sharded(self.masters[layer], m))
                self.parameters[layer, m.module, m.kind] = parameter
                self._places[id(parameter)] = layer, m
        self._gradients_of = [(p, self.part_of(self.gradients, p)) for p in self.parameters.values()]
        self._pending: list[tuple[dist.Work, torch.Tensor, int]] = []
        self._frozen: torch.Tensor | None = None

    @property
    def flats(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [self.flat, *([self.tokens.flat] if self.tokens else [])]

    @property
    def first_of_b(self) -> int:
        """Where in each layer's local run the B matrices begin: all A come before them."""
        return next(m.local_start for m in self.matrices if m.kind == "B")

    def _sharded(self, run: torch.Tensor, m: Matrix) -> DTensor:
        start, end = m.rows_of(self.place)
        local = run[m.local_start : m.local_start + (end - start) * m.columns].view(end - start, m.columns)
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=(m.rows, m.columns), stride=(m.columns, 1)
        )

    def part_of(self, runs: torch.Tensor, parameter: nn.Parameter) -> DTensor:
        """What of `runs` (layers, local), laid out as the masters are, belongs to a parameter: a view of it."""
        layer, matrix = self._places[id(parameter)]
        return self._sharded(runs[layer], matrix)

    def part_of_state(self, states: list[torch.Tensor], parameter: nn.Parameter) -> torch.Tensor:
        """As `part_of`, of tensors that are each laid out as one of `flats` is."""
        if id(parameter) in self._places:
            return self.part_of(states[0], parameter)
        assert self.tokens is not None
        side = next(i for i, rows in enumerate(self.tokens.parameters.values()) if rows is parameter)
        return states[1][side]

    # -- the way to a layer ---------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Keep a copy of the adapters as they are now, in the compute dtype: what they began with is the reference."""
        self._frozen = self.masters.to(self.dtype, copy=True)
        if self.tokens is not None:
            self.tokens.freeze()

    def has_reference(self) -> bool:
        """Whether the reference has adapters; else it is the model without any."""
        return self._frozen is not None

    def local_half(self, layer: int, reference: bool = False) -> torch.Tensor:
        """This rank's run of a layer in the compute dtype."""
        if reference:
            assert self._frozen is not None
            return self._frozen[layer]
        return self.masters[layer].to(self.dtype)

    def off(self) -> LoraView:
        """A layer without adapters."""
        return LoraView(torch.empty(0, device=self.device, dtype=self.dtype), [], self.lora.rank)

    def view(self, gathered: torch.Tensor) -> LoraView:
        """The whole matrices from all ranks' runs (world, local)."""
        return LoraView(self.whole(gathered.view(self.world, self.local_size)), self.matrices, self.lora.rank)

    def empty_gradient(self) -> LoraView:
        """Zeros in fp32 for the gradients of one layer."""
        run = torch.zeros(self.size, device=self.device)
        return LoraView(run, self.matrices, self.lora.rank)

    def whole(self, runs: torch.Tensor) -> torch.Tensor:
        """A layer's whole run (size,) from all ranks' runs (world, local)."""
        if self.world == 1:
            return runs[0]
        whole = torch.empty(self.size, device=runs.device, dtype=runs.dtype)
        for rank, start, end, low in self._pieces():
            whole[start:end] = runs[rank, low : low + end - start]
        return whole

    def _pieces(self):
        """(rank, start and end in the whole run, place in the rank's run) of every matrix's rows."""
        for m in self.matrices:
            for rank in range(self.world):
                first, last = m.rows_of(rank)
                if first < last:
                    yield rank, m.start + first * m.columns, m.start + last * m.columns, m.local_start

    # -- and back -------------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """Gradients add up over micro-batches; they start at zero where the optimizer has let go of them."""
        while self._pending:  # what an interrupted backward has left
            self._pending.pop(0)[0].wait()
        if self.flat.grad is None or next(iter(self.parameters.values())).grad is None:
            self.gradients.zero_()
            self.flat.grad = self.gradients
            for parameter, gradient in self._gradients_of:
                parameter.grad = gradient
            if self.tokens is not None:
                self.tokens.begin_backward()

    def zero_gradients(self) -> None:
        self.gradients.zero_()
        if self.tokens is not None:
            self.tokens.gradients.zero_()

    def forget_gradients(self) -> None:
        """As before any backward."""
        self.zero_gradients()
        rows = self.tokens.parameters.values() if self.tokens else ()
        for parameter in (*self.flats, *self.parameters.values(), *rows):
            parameter.grad = None

    def add_gradient(self, layer: int, gradient: LoraView) -> None:
        """Add the mean over the ranks of a layer's whole gradients (fp32) to what this rank holds of them."""
        if self.world == 1:
            self.gradients[layer].add_(gradient.run)
            return
        runs = torch.zeros(self.world, self.local_size, device=self.device)
        for rank, start, end, low in self._pieces():
            runs[rank, low : low + end - start] = gradient.run[start:end]
        mine = torch.empty(self.local_size, device=self.device)
        work = dist.reduce_scatter_tensor(mine, runs.flatten(), group=self.group, async_op=True)
        self._pending.append((work, mine, layer))
        if len(self._pending) > 1:
            self._finish(self._pending.pop(0))

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients of all ranks to a norm of at most `max_norm`; the norm they had (a collective)."""
        norm = torch.linalg.vector_norm(self.gradients)
        if self.world > 1:
            squares = norm.pow(2)
            dist.all_reduce(squares, group=self.group)
            norm = squares.sqrt()
        if self.tokens is not None:  # whole on every rank, so they count once
            norm = torch.hypot(norm, torch.linalg.vector_norm(self.tokens.gradients))
        if max_norm != float("inf"):
            factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
            self.gradients.mul_(factor)
            if self.tokens is not None:
                self.tokens.gradients.mul_(factor)
        return norm

    def end_backward(self) -> None:
        while self._pending:
            self._finish(self._pending.pop(0))

    def _finish(self, pending: tuple[dist.Work, torch.Tensor, int]) -> None:
        work, mine, layer = pending
        work.wait()
        self.gradients[layer].add_(mine, alpha=1 / self.world)


def _matrices(shape: ModelShape, lora: Lora, world: int) -> list[Matrix]:
    matrices: list[Matrix] = []
    start = local_start = 0
    for kind in ("A", "B"):
        for modules in GROUPS.values():
            for module in modules:
                if module not in lora.target_modules:
                    continue
                outputs, inputs = shape.linears[module]
                rows, columns = (lora.rank, inputs) if kind == "A" else (outputs, lora.rank)
                matrix = Matrix(module, kind, rows, columns, start, local_start, world)
                matrices.append(matrix)
                start += matrix.size
                local_start += matrix.local_size
    return matrices
