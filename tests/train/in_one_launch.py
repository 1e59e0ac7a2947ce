"""Several trainings by one pair of ranks: what a rank of `recipe train` does, without its start for each of them.

Everything but the launcher is that of a real run: checks, preparation, tokens and manifest here, recipe.train.worker's
own `train` on real ranks.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from recipe.cli import _machine
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
    machine = _machine(settings)
    plan = plan_for(settings, target_of(machine), prepared_folder(settings))
    settings = plan.decided(settings)
    assert plan.world_size == WORLD
    launch.check(settings, plan.world_size)
    prepared = prepare(settings)
    run, _ = begin_or_continue(settings, name)
    launch._begin(run, settings, prepared, machine, plan.world_size)
    return run, plan.placement


def train_all(cases: list[tuple[Run, Placement]], killed: tuple[int, int] | None = None) -> Run | None:
    """killed: number of a case and step; a copy of that run as it was after that step is resumed, and returned."""
    resumed = None
    if killed is not None:
        run, placement = cases[killed[0]]
        resumed = Run(run.folder.with_name(f"{run.name}-resumed"))
        cases = [*cases, (resumed, placement)]
    run_ranks(WORLD, _train_all, cases, killed, [_free_port() for _ in cases])
    return resumed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train_all(mesh, cases, killed, ports) -> None:
    from recipe.train.worker import train

    rank = mesh.get_local_rank()
    for number, ((run, placement), port) in enumerate(zip(cases, ports, strict=True)):
        resume = None
        if killed is not None and number == len(cases) - 1:
            resume = run.checkpoint(killed[1])
            if rank == 0:
                left = shutil.ignore_patterns("summary.json", "metrics.jsonl", "events.jsonl")
                shutil.copytree(cases[killed[0]][0].folder, run.folder, ignore=left)
            dist.barrier()
        dist.destroy_process_group()  # the rank makes its own
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        pulse = Pulse(run, rank)
        with ExitStack() as ending:  # its stopper hears no signal, as none comes
            train(run, placement, resume, pulse, Stopper(run, pulse, ending), ending)
