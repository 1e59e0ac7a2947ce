"""The plan: what a run needs, what the machine has, how long it takes, and why it does not fit, if it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.hardware import Machine
from recipe.plan import memory
from recipe.plan.cards import Card
from recipe.plan.choose import Room, choose
from recipe.plan.duration import Duration, duration
from recipe.plan.parts import GIB, Part, total_gib
from recipe.plan.placement import Placement
from recipe.plan.rows import data_tokens
from recipe.plan.shapes import ModelShape, shape_of
from recipe.plan.target import Target, target_of
from recipe.settings import Settings

# GPU memory left free for what the model does not know, and host RAM for the rest of the system.
GPU_SPARE_GIB = 0.5
HOST_SPARE_GIB = 1.0
KEEP_SHARE = 0.75  # of the host RAM at most is filled where it only saves time
CPU_PROCESSES = 2
MOST_PASSES = 64  # micro-batches per step and rank that `auto` looks at
TIE = 1.015  # rates that differ less are alike: the seconds tell nothing finer

NOT_MODELLED = [
    "attention kernels that materialise scores; compute.kernels: plain; other programs",
    "time: disk, start-up, evaluation, checkpoints, hot cards that slow down; documents count as full rows",
]


@dataclass(frozen=True)
class Plan:
    """What a run needs against what there is; all sizes in GiB, device parts per rank."""

    model: str
    parameters: int
    trainable_parameters: int
    device: str
    world_size: int
    vram_gib: float | None  # of the smallest card
    vram_each_gib: tuple[float, ...]
    cards: tuple[str | None, ...]
    cards_assumed: bool
    ram_gib: float | None
    disk_gib: float | None
    micro_batch_tokens: int
    accumulation: int
    tokens_per_step: int
    steps: int | None
    device_parts: list[Part]
    outside_parts: list[Part]
    host_parts: list[Part]
    cache_parts: list[Part]  # host RAM that is used where it is free
    prepare_gib: float
    model_disk_parts: list[Part]
    run_disk_parts: list[Part]
    on_disk_gib: float
    duration: Duration | None  # None where no rate is known
    placement: Placement
    fits: bool = True
    reasons: list[str] = field(default_factory=list)
    not_modelled: list[str] = field(default_factory=lambda: list(NOT_MODELLED))

    @property
    def device_gib(self) -> float:
        """Peak memory of one rank in torch's allocator (on a CPU: its share of host RAM)."""
        return total_gib(self.device_parts)

    @property
    def vram_needed_gib(self) -> float:
        """Memory that one GPU must have: allocator, CUDA and NCCL, and something to spare."""
        return (
            self.device_gib + total_gib(self.outside_parts) + GPU_SPARE_GIB if self.device == "gpu" else 0.0
        )

    @property
    def host_gib(self) -> float:
        """Peak host RAM of the run's processes: training, or preparing the model where that needs more."""
        return max(total_gib(self.host_parts), self.prepare_gib)

    @property
    def ram_needed_gib(self) -> float:
        return self.host_gib + HOST_SPARE_GIB

    @property
    def disk_needed_gib(self) -> float:
        """Free disk space that is still needed: what `prepare` has made already is not needed again."""
        models = 0.0 if self.on_disk_gib else total_gib(self.model_disk_parts)
        return models + total_gib(self.run_disk_parts)

    def decided(self, settings: Settings) -> Settings:
        """The settings with what this plan decides of them for good: how many tokens a micro-batch has."""
        return with_tokens(settings, self.micro_batch_tokens)

    def to_dict(self) -> dict[str, Any]:
        """For --json: every field, and the totals."""
        totals = ("device_gib", "vram_needed_gib", "host_gib", "ram_needed_gib", "disk_needed_gib")
        found = dataclasses.asdict(self) | {name: getattr(self, name) for name in totals}
        if self.duration:
            more = ("run_seconds", "floor_seconds", "epoch_seconds", "run_kwh")
            found["duration"] |= {name: getattr(self.duration, name) for name in more}
        return found


def make_plan(
    settings: Settings,
    machine: Machine | None = None,
    gpus: int | None = None,
    vram_gib: float | Sequence[float] | None = None,
    card_names: str | Sequence[str] | None = None,
    ram_gib: float | None = None,
    disk_gib: float | None = None,
    prepared: Path | None = None,
    measured: dict[str, Card] | None = None,
) -> Plan:
    """Plan a run for `machine`, or for the machine that the other arguments describe (recipe.plan.target).

    `prepared` is where the NF4 checkpoint of this model lies or will lie (recipe.prepare.prepared_folder); its
    config.json gives the shape of a model that the built-in table does not know.

    Raises:
        UserError: unknown model or card, batch sizes that no world size divides, or a GPU without a size.
    """
    target = target_of(machine, gpus, vram_gib, card_names, ram_gib, disk_gib, measured)
    return plan_for(settings, target, prepared)


def plan_for(settings: Settings, target: Target, prepared: Path | None = None) -> Plan:
    """The plan of a run on a target: of the numbers of tokens that `auto` allows, the fastest that fits."""
    shape = shape_of(settings.model.id, [prepared] if prepared else [])
    target = target.first(_world_size(settings, target))
    plans = [_plan(shape, tried, target, prepared) for tried in _with_all_tokens(settings, target)]
    possible = [plan for plan in plans if plan.fits]
    if not possible or any(plan.duration is None for plan in possible):
        return (possible or plans)[0]
    best = max(_rate(plan) for plan in possible)
    as_fast = [plan for plan in possible if _rate(plan) * TIE >= best]
    return min(as_fast, key=lambda plan: (plan.placement.offload_layers, -_rate(plan)))


def _rate(plan: Plan) -> float:
    return plan.duration.tokens_per_second if plan.duration else 0.0


def _with_all_tokens(settings: Settings, target: Target) -> list[Settings]:
    """The settings for each number of tokens per micro-batch that divides a step; the smallest first."""
    if settings.train.micro_batch_tokens != "auto" or not target.gpus:
        return [settings]
    each, over = divmod(settings.train.global_batch_tokens, _world_size(settings, target))
    least = settings.longest_row
    sizes = [] if over else [each // n for n in range(1, MOST_PASSES + 1) if each % n == 0]
    wanted = sorted(size for size in sizes if size >= least) or [least]
    return [with_tokens(settings, size) for size in wanted]


def with_tokens(settings: Settings, tokens: int) -> Settings:
    """The settings with so many tokens per micro-batch."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, micro_batch_tokens=tokens))


def _plan(shape: ModelShape, settings: Settings, target: Target, prepared: Path | None) -> Plan:
    on_gpu = target.gpus > 0
    world_size = _world_size(settings, target)
    ready = target.here and prepared is not None and (prepared / "config.json").is_file()
    placement = choose_placement(
        shape, settings, world_size, target.smallest_gib, target.ram_gib, target.card
    )
    device = memory.device_parts(shape, settings, world_size, on_gpu, placement)
    model_disk, run_disk = memory.disk_parts(shape, settings)
    accumulation = settings.accumulation(world_size)
    lasts = None
    if on_gpu and target.card:
        cards = tuple(card for card in target.cards if card)
        tokens = data_tokens(settings)
        lasts = duration(shape, settings, world_size, cards, target.card, placement, tokens)
    plan = Plan(
        model=settings.model.id or "",
        parameters=shape.parameters,
        trainable_parameters=shape.lora_parameters(settings.lora.rank, settings.lora.target_modules),
        device="gpu" if on_gpu else "cpu",
        world_size=world_size,
        vram_gib=target.smallest_gib,
        vram_each_gib=target.vram_gib,
        cards=tuple(card.name if card else None for card in target.cards),
        cards_assumed=target.cards_assumed,
        ram_gib=target.ram_gib,
        disk_gib=target.disk_gib,
        micro_batch_tokens=settings.micro_batch_tokens,
        accumulation=accumulation,
        tokens_per_step=settings.train.global_batch_tokens,
        steps=settings.train.steps,
        device_parts=device,
        outside_parts=memory.outside_allocator(world_size) if on_gpu else [],
        host_parts=memory.host_parts(shape, settings, device, world_size, on_gpu, placement),
        cache_parts=memory.page_cache_parts(shape, settings, on_gpu),
        prepare_gib=0.0 if ready else memory.prepare_gib(on_gpu),
        model_disk_parts=model_disk,
        run_disk_parts=run_disk,
        on_disk_gib=_size_gib(prepared) if ready and prepared else 0.0,
        duration=lasts,
        placement=placement,
    )
    reasons = _reasons(plan, target.gpus)
    return dataclasses.replace(plan, fits=not reasons, reasons=reasons)


def choose_placement(
    shape: ModelShape,
    settings: Settings,
    world_size: int,
    vram_gib: float | None,
    ram_gib: float | None,
    card: Card | None = None,
) -> Placement:
    """The fastest placement that fits a GPU of `vram_gib` (None: a CPU) and a host of `ram_gib` (None: any)."""
    on_gpu = vram_gib is not None
    # RAM is filled to the brim where it must be, not where it only saves time.
    careful = settings.compute.keep_layers == "auto"

    def device_missing(placement: Placement) -> float:
        if vram_gib is None:
            return 0.0
        device = memory.device_parts(shape, settings, world_size, True, placement)
        return total_gib(device) + total_gib(memory.outside_allocator(world_size)) + GPU_SPARE_GIB - vram_gib

    def host_missing(placement: Placement) -> float:
        if ram_gib is None:
            return 0.0
        device = [] if on_gpu else memory.device_parts(shape, settings, world_size, on_gpu, placement)
        host = memory.host_parts(shape, settings, device, world_size, on_gpu, placement)
        saves_time = careful and placement.keep_layers and (placement.away_layers or not on_gpu)
        limit = ram_gib * KEEP_SHARE if saves_time else ram_gib - HOST_SPARE_GIB
        return total_gib(host) - limit

    return choose(shape, settings, world_size, on_gpu, card, Room(device_missing, host_missing))


def _world_size(settings: Settings, target: Target) -> int:
    if isinstance(settings.compute.processes, int):
        return settings.compute.processes
    return target.gpus or CPU_PROCESSES


def _size_gib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / GIB


def _reasons(plan: Plan, gpus: int) -> list[str]:
    """Why it does not fit: one line each, with the numbers and the biggest parts."""
    reasons = []
    if gpus and plan.world_size > gpus:
        reasons.append(
            f"compute.processes is {plan.world_size}, but there are {gpus} GPUs: a rank needs one of its own"
        )
    if plan.vram_gib is not None and plan.vram_needed_gib > plan.vram_gib:
        unequal = f" on the smallest of {', '.join(f'{size:g}' for size in plan.vram_each_gib)}"
        reasons.append(
            f"GPU memory: {plan.vram_needed_gib:.1f} GiB needed on each GPU, {plan.vram_gib:.1f} there"
            f"{unequal if len(set(plan.vram_each_gib)) > 1 else ''}; {_biggest(plan.device_parts)}"
        )
    if plan.ram_gib is not None and plan.ram_needed_gib > plan.ram_gib:
        training = total_gib(plan.host_parts) >= plan.prepare_gib
        parts = _biggest(plan.host_parts) if training else "the most while preparing the model"
        reasons.append(f"host RAM: {plan.ram_needed_gib:.1f} GiB needed, {plan.ram_gib:.1f} there; {parts}")
    if plan.disk_gib is not None and plan.disk_needed_gib > plan.disk_gib:
        parts = _biggest([*([] if plan.on_disk_gib else plan.model_disk_parts), *plan.run_disk_parts])
        reasons.append(
            f"disk: {plan.disk_needed_gib:.1f} GiB needed, {plan.disk_gib:.1f} free; {parts}; free some, or point "
            "paths.models and paths.runs at a larger disk"
        )
    return reasons


def _biggest(parts: list[Part], count: int = 4) -> str:
    ordered = sorted(parts, key=lambda part: part.gib, reverse=True)[:count]
    return "biggest: " + ", ".join(f"{part.name} {part.gib:.1f}" for part in ordered)
