"""The plan: what a run needs, what the machine has, and if it does not fit, why and what would help."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.hardware import Machine
from recipe.plan import memory
from recipe.plan.cards import Card, card_called, card_with, floor_seconds, slowest_card
from recipe.plan.choose import Room, choose
from recipe.plan.parts import GIB, Part, total_gib
from recipe.plan.placement import Placement
from recipe.plan.seconds import step_seconds
from recipe.plan.shapes import ModelShape, shape_of
from recipe.settings import Settings

# GPU memory left free for what the model does not know, and host RAM for the rest of the system.
GPU_SPARE_GIB = 0.5
HOST_SPARE_GIB = 1.0
KEEP_SHARE = 0.75  # of the host RAM at most is filled where it only saves time
CPU_PROCESSES = 2
LARGEST_GROUP = 16  # GPUs that a remedy suggests at most
SHORTEST_MICRO_BATCH = 128  # tokens that a remedy suggests at least

NOT_MODELLED = [
    "the embedding: mapped from its file, its pages are the system's cache (2 GiB for 70B, once per host)",
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
    vram_gib: float | None
    ram_gib: float | None
    disk_gib: float | None
    micro_batch_tokens: int
    accumulation: int
    tokens_per_step: int
    steps: int | None
    device_parts: list[Part]
    outside_parts: list[Part]
    host_parts: list[Part]
    prepare_gib: float
    model_disk_parts: list[Part]
    run_disk_parts: list[Part]
    on_disk_gib: float
    card: str | None
    card_assumed: bool
    predicted_seconds: float | None
    floor_seconds: float | None
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

    def to_dict(self) -> dict[str, Any]:
        """For --json: every field, and the totals."""
        totals = ("device_gib", "vram_needed_gib", "host_gib", "ram_needed_gib", "disk_needed_gib")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in totals}


def make_plan(
    settings: Settings,
    machine: Machine | None = None,
    gpus: int | None = None,
    vram_gib: float | None = None,
    card_name: str | None = None,
    ram_gib: float | None = None,
    disk_gib: float | None = None,
    prepared: Path | None = None,
) -> Plan:
    """Plan a run for `machine`, or for the machine that the other arguments describe.

    Args:
        gpus: GPUs to plan for; 0 is a CPU run; None: those of the machine.
        vram_gib: memory of each GPU; None: the machine's smallest.
        card_name: which card they are, as recipe.plan.cards knows it; None: the machine's, or by its memory.
        ram_gib: host RAM; None: the machine's, or its container's limit. Where gpus and vram_gib describe
            another machine, RAM and disk that are not given are not judged.
        disk_gib: free disk; None: as for RAM.
        prepared: where the NF4 checkpoint of this model lies or will lie (recipe.prepare.prepared_folder);
            its config.json gives the shape of a model that the built-in table does not know.

    Raises:
        UserError: unknown model or card, batch sizes that no world size divides, or a GPU without a size.
    """
    # Cards described by number and size are another machine's, and so are the RAM and the disk beside them.
    here = None if gpus and vram_gib is not None else machine
    gpus, vram_gib = _gpus(machine, gpus, vram_gib)
    shape = shape_of(settings.model.id, [prepared] if prepared else [])
    on_gpu = gpus > 0
    world_size = _world_size(settings, gpus)
    model_disk, run_disk = memory.disk_parts(shape, settings)
    ready = here is not None and prepared is not None and (prepared / "config.json").is_file()
    steps, tokens = settings.train.steps, settings.train.global_batch_tokens
    card: Card | None
    if card_name is not None:
        card = card_called(card_name)
    else:
        card = slowest_card([gpu.name for gpu in here.gpus]) if here else card_with(vram_gib or 0)
    if ram_gib is None and here:
        ram_gib = here.usable_ram_gib
    placement = choose_placement(shape, settings, world_size, vram_gib, ram_gib, card)
    device = memory.device_parts(shape, settings, world_size, on_gpu, placement)
    predicted, floor = _seconds(shape, settings, world_size, card if on_gpu else None, placement)
    plan = Plan(
        model=settings.model.id or "",
        parameters=shape.parameters,
        trainable_parameters=shape.lora_parameters(settings.lora.rank, settings.lora.target_modules),
        device="gpu" if on_gpu else "cpu",
        world_size=world_size,
        vram_gib=vram_gib,
        ram_gib=ram_gib,
        disk_gib=disk_gib if disk_gib is not None else (here.disk_free_gib if here else None),
        micro_batch_tokens=settings.micro_batch_tokens,
        accumulation=settings.accumulation(world_size),
        tokens_per_step=tokens,
        steps=steps,
        device_parts=device,
        outside_parts=memory.outside_allocator(world_size) if on_gpu else [],
        host_parts=memory.host_parts(shape, settings, device, world_size, on_gpu, placement),
        prepare_gib=0.0 if ready else memory.prepare_gib(on_gpu),
        model_disk_parts=model_disk,
        run_disk_parts=run_disk,
        on_disk_gib=_size_gib(prepared) if ready and prepared else 0.0,
        card=card.name if card and on_gpu else None,
        card_assumed=here is None or card_name is not None,
        predicted_seconds=predicted,
        floor_seconds=floor,
        placement=placement,
    )
    reasons = _reasons(plan, shape, settings, gpus)
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
        return _vram_needed_gib(shape, settings, world_size, placement) - vram_gib

    def host_missing(placement: Placement) -> float:
        if ram_gib is None:
            return 0.0
        device = [] if on_gpu else memory.device_parts(shape, settings, world_size, on_gpu, placement)
        host = memory.host_parts(shape, settings, device, world_size, on_gpu, placement)
        saves_time = careful and placement.keep_layers and (placement.away_layers or not on_gpu)
        limit = ram_gib * KEEP_SHARE if saves_time else ram_gib - HOST_SPARE_GIB
        return total_gib(host) - limit

    return choose(shape, settings, world_size, on_gpu, card, Room(device_missing, host_missing))


def _seconds(
    shape: ModelShape, settings: Settings, world_size: int, card: Card | None, placement: Placement
) -> tuple[float | None, float | None]:
    """About how long the run takes, and at least; None where the card or the number of steps is not known."""
    steps, tokens = settings.train.steps, settings.train.global_batch_tokens
    if card is None or steps is None:
        return None, None
    kept, accumulate = placement.keep_layers, settings.compute.accumulate
    return (
        steps * step_seconds(shape, settings, world_size, card, placement),
        floor_seconds(shape, steps * tokens, card, world_size, kept, accumulate),
    )


def _vram_needed_gib(shape: ModelShape, settings: Settings, world_size: int, placement: Placement) -> float:
    device = memory.device_parts(shape, settings, world_size, True, placement)
    return total_gib(device) + total_gib(memory.outside_allocator(world_size)) + GPU_SPARE_GIB


def _gpus(machine: Machine | None, gpus: int | None, vram_gib: float | None) -> tuple[int, float | None]:
    """How many GPUs of which size to plan for."""
    if gpus is None:
        gpus = len(machine.gpus) if machine else 0
        if vram_gib is not None and not gpus:
            raise UserError("--vram-gib is given, but this machine has no GPU; expected --gpus as well")
    if gpus < 0:
        raise UserError(f"--gpus is {gpus}, expected a whole number of at least 0")
    if gpus == 0:
        return 0, None
    if vram_gib is None:
        if machine is None or not machine.gpus:
            raise UserError(
                f"--gpus is {gpus}, but this machine has no GPU to take its size from; add --vram-gib"
            )
        vram_gib = _smallest(machine)
    if vram_gib <= 0:
        raise UserError(f"--vram-gib is {vram_gib:g}, expected GiB above 0")
    return gpus, vram_gib


def _smallest(machine: Machine) -> float:
    return min(gpu.memory_total_gib for gpu in machine.gpus)


def _world_size(settings: Settings, gpus: int) -> int:
    if isinstance(settings.compute.processes, int):
        return settings.compute.processes
    return gpus or CPU_PROCESSES


def _size_gib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / GIB


def _reasons(plan: Plan, shape: ModelShape, settings: Settings, gpus: int) -> list[str]:
    """Why it does not fit: one line each, with the numbers, the biggest parts and what would help."""
    reasons = []
    if gpus and plan.world_size > gpus:
        reasons.append(
            f"compute.processes is {plan.world_size}, but there are {gpus} GPUs: a rank needs one of its own"
        )
    if plan.vram_gib is not None and plan.vram_needed_gib > plan.vram_gib:
        reasons.append(
            f"GPU memory: {plan.vram_needed_gib:.1f} GiB needed on each GPU, {plan.vram_gib:.1f} there; "
            f"{_biggest(plan.device_parts)}; "
            + _what_would_fit(
                plan, shape, settings, f"GPUs with {math.ceil(plan.vram_needed_gib)} GiB or more"
            )
        )
    if plan.ram_gib is not None and plan.ram_needed_gib > plan.ram_gib:
        training = total_gib(plan.host_parts) >= plan.prepare_gib
        parts = _biggest(plan.host_parts) if training else "the most while preparing the model"
        if plan.device == "cpu" and training:
            help = "take a smaller model, or a machine with GPUs: --gpus N --vram-gib G asks which would do"
        elif training:
            help = _what_would_fit(plan, shape, settings, f"{math.ceil(plan.ram_needed_gib)} GiB of RAM")
        else:
            help = "more RAM would help"
        reasons.append(
            f"host RAM: {plan.ram_needed_gib:.1f} GiB needed, {plan.ram_gib:.1f} there; {parts}; {help}"
        )
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


def _what_would_fit(plan: Plan, shape: ModelShape, settings: Settings, larger: str) -> str:
    """The nearest changes under which it fits the GPUs and the RAM; `larger` is the one that always does."""

    if settings.compute.keep_layers == "auto":  # whether it fits, not how fast
        compute = dataclasses.replace(settings.compute, keep_layers=0)
        settings = dataclasses.replace(settings, compute=compute)

    def fits(world_size: int, settings: Settings) -> bool:
        placement = choose_placement(shape, settings, world_size, plan.vram_gib, plan.ram_gib)
        host = memory.host_parts(shape, settings, [], world_size, True, placement)
        assert plan.vram_gib is not None
        return _vram_needed_gib(shape, settings, world_size, placement) <= plan.vram_gib and (
            plan.ram_gib is None or total_gib(host) + HOST_SPARE_GIB <= plan.ram_gib
        )

    ways = []
    tokens = plan.micro_batch_tokens // 2
    while tokens >= SHORTEST_MICRO_BATCH:
        if fits(plan.world_size, _with_tokens(settings, tokens)):
            ways.append(f"train.micro_batch_tokens and data.max_length of {tokens}")
            break
        tokens //= 2
    for world_size in range(plan.world_size + 1, LARGEST_GROUP + 1):
        if fits(world_size, settings):
            batch = settings.nearest_global_batch(world_size)
            same = batch == settings.train.global_batch_tokens
            ways.append(f"{world_size} such GPUs{'' if same else f' (train.global_batch_tokens={batch})'}")
            break
    return "would fit: " + ", or ".join([*ways, larger])


def _with_tokens(settings: Settings, tokens: int) -> Settings:
    return dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, micro_batch_tokens=tokens),
        data=dataclasses.replace(settings.data, max_length=min(tokens, settings.data.max_length)),
    )
