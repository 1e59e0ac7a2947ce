"""Several trainings by one pair of ranks: what a rank of `recipe train` does, without its start for each of them.

Everything but the launcher is that of a real run: checks, preparation, tokens and manifest here, recipe.train.worker's
own `train` on real ranks.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from recipe.commands import machine_here
from recipe.plan import plan_for, target_of
from recipe.plan.placement import Placement
from recipe.prepare import prepare, prepared_folder
from recipe.settings import load
from recipe.train import launch
from recipe.train.pulse import Pulse
from recipe.train.run import Run, begin_or_continue
from recipe.train.stopping import Stopper
from tests.models import run_ranks

WORLD = 2


def begun(config: Path, name: str, overrides: dict[str, object]) -> tuple[Run, Placement]:
    """A run's folder, ready for its ranks."""
    settings = load(config, [f"{key}={value}" for key, value in overrides.items()])
    machine = machine_here(settings)
    plan = plan_for(settings, target_of(machine), prepared_folder(settings))
    settings = plan.decided(settings)
    assert plan.world_size == WORLD
    launch.check(settings, plan.world_size)
    prepared = prepare(settings)
    run, _ = begin_or_continue(settings, name)
    launch._begin(run, settings, prepared, machine, plan.world_size)
    return run, plan.placement


def train_all(cases: list[tuple[Run, Placement]], killed: Sequence[tuple[int, int]] = ()) -> list[Run]:
    """killed: number of a case and step; copies of those runs as they were after that step are resumed, and returned."""
    resumed = [
        (Run(run.folder.with_name(f"{run.name}-resumed")), placement)
        for run, placement in (cases[number] for number, _ in killed)
    ]
    copied = [None] * len(cases) + [(cases[number][0], step) for number, step in killed]
    everything = [*cases, *resumed]
    run_ranks(WORLD, _train_all, everything, copied, [_free_port() for _ in everything])
    return [run for run, _ in resumed]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train_all(mesh, cases, copied, ports) -> None:
    from recipe.train.worker import train

    rank = mesh.get_local_rank()
    for (run, placement), source, port in zip(cases, copied, ports, strict=True):
        resume = None
        if source is not None:
            whole, step = source
            resume = run.checkpoint(step)
            if rank == 0:
                left = shutil.ignore_patterns("summary.json", "metrics.jsonl", "events.jsonl")
                shutil.copytree(whole.folder, run.folder, ignore=left)
            dist.barrier()
        dist.destroy_process_group()  # the rank makes its own
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        pulse = Pulse(run, rank)
        with ExitStack() as ending:  # its stopper hears no signal, as none comes
            train(run, placement, resume, pulse, Stopper(run, pulse, ending), ending)
