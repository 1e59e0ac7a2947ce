"""`recipe train`: check, prepare, tokenise, then start the ranks and show how they get on.

All that can be wrong with a request is found here, before a rank starts and before the run's folder exists. The ranks
write metrics.jsonl and events.jsonl; what the terminal shows is read from there, so a log file, a pipe and a terminal
all see the same, and the launcher's own output goes to train.log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe import hostenv
from recipe.errors import Refused, UserError
from recipe.files import require_space, write_json, write_text
from recipe.hardware import Machine
from recipe.plan import Plan
from recipe.prepare import Prepared
from recipe.settings import Settings
from recipe.train import checkpoint, guard
from recipe.train.guard import WORKER, Guard, ranks_of
from recipe.train.manifest import manifest, threads_per_rank
from recipe.train.resume import resume_point
from recipe.train.run import Run, Tail, begin_or_continue, keep_room, read_jsonl

ACCELERATE_CONFIG = Path(__file__).parent.parent / "configs" / "accelerate" / "gpus.yaml"
PACKAGE_PARENT = Path(__file__).parent.parent.parent
POLL_SECONDS = 0.2
FULL_BYTES = 2**20  # less of a disk is left where not even a line could be written
# Causes of errors that another start may not meet again; whatever else a rank reports would come again.
PASSING = ("unexpected", "rank_died", "rank_stopped", "rank_hung", "rank_behind", "out_of_host_memory")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(settings: Settings, name: str | None, prepared: Prepared, machine: Machine, plan: Plan) -> Run:
    """Train to the end, or on from the newest checkpoint of an unfinished run; placed as the plan of today says.

    Raises UserError for a wrong request, Refused where the ranks failed, KeyboardInterrupt-like Stopped on a signal.
    """
    run, goes_on = begin_or_continue(settings, name)
    settings.accumulation(plan.world_size)
    if not goes_on:
        _begin(run, settings, prepared, machine, plan.world_size)
    with run.locked() as lock:
        write_json(run.plan, plan.to_dict())
        resume, notes = resume_point(run)
        for note in notes:
            say(note)
        if goes_on:
            say(
                f"run {run.name} goes on from {resume.name if resume else 'the start: it has no checkpoint yet'}"
            )
            _go_on(run, settings, resume, plan.world_size)
        _supervise(run, settings, plan, resume, lock)
    return run


def _go_on(run: Run, settings: Settings, resume: Path | None, world_size: int) -> None:
    """What may be otherwise than when the run was begun is written down, and what that changes is said."""
    if run.settings() != settings:
        write_text(run.config, settings.to_yaml())
    before = checkpoint.read_state(resume)["world_size"] if resume else world_size
    if before != world_size:
        text = (
            f"{resume.name if resume else ''} was written by {before} ranks, and {world_size} go on: the global batch and its "
            "rows stay, sums are rounded otherwise and dropout draws other numbers"
        )
        run.event("warning", text, cause="world_size_changed")
        say(text)


def check(settings: Settings, world_size: int) -> None:
    """What can be told before the model is fetched and quantised, which takes hours for 70B. Raises UserError."""
    from recipe.data.encode import read_template
    from recipe.data.preference import check_row
    from recipe.data.prepare import is_cached
    from recipe.data.rows import held_out_rows, training_rows
    from recipe.engine.devices import attention_kind, compute_dtype, set_accumulation
    from recipe.prepare import prepared_folder
    from recipe.train.start import find

    find(settings)
    settings.accumulation(world_size)
    hostenv.read()
    dtype = compute_dtype(settings)
    attention_kind(settings, dtype)
    set_accumulation(settings, dtype)
    if settings.data.chat_template:
        read_template(settings.data)
    if is_cached(settings, prepared_folder(settings)):
        return
    for rows in (training_rows(settings.data), held_out_rows(settings.data)):
        for row in rows:
            check_row(row, settings.train.method)


class Stopped(Exception):
    """Training was stopped by a signal, after saving (a second signal: at once, with the checkpoint before)."""

    def __init__(self, run: Run, number: int):
        saved = checkpoint.checkpoints(run.folder)
        upto = f"saved up to {saved[-1].name}" if saved else "before anything was to be saved"
        super().__init__(f"stopped, {upto}; go on with RUN={run.name}")
        self.number = number


def _begin(run: Run, settings: Settings, prepared: Prepared, machine: Machine, world_size: int) -> None:
    """Tokenise, show what will be trained, and make the run's folder."""
    from recipe.data import prepare
    from recipe.data.encode import load_tokenizer
    from recipe.data.show import shown_rows
    from recipe.data.sources import names

    tokenizer = load_tokenizer(prepared.folder, settings.data, settings.lora.new_tokens)
    with prepare.prepared(settings, tokenizer, prepared.folder) as data:
        for note in data.notes:
            say(f"note: {note}")
        stats, needed = data.stats, settings.train.global_batch_tokens
        if stats["epoch_tokens"] < needed:
            raise UserError(
                f"data.{'sources are' if settings.data.sources else 'path is'} {names(settings.data)}: has {stats['epoch_tokens']} tokens in {stats['rows']} rows, expected at least "
                f"one global batch ({needed} tokens); add data or lower train.global_batch_tokens"
            )
        say(
            f"data: {stats['rows']} rows, {stats['tokens']:,} tokens, {stats['in_loss']:,} in the loss; "
            f"{stats['held_out_rows']} rows held out; {stats['fill']:.1%} of the slots used"
        )
        say(
            "the first rows as the model sees them"
            + (" (dim: not in the loss)" if sys.stderr.isatty() else " ([[...]]: not in the loss)")
        )
        say(shown_rows(data.first(3), tokenizer, color=sys.stderr.isatty()))
        require_space(run.folder, 64 * 2**20, "the run")
        try:
            data.link_into(run.folder / "data")
            if settings.lora.new_tokens:
                tokenizer.save_pretrained(run.folder / "tokenizer")
            write_json(
                run.manifest, manifest(settings, prepared, machine, world_size, data.form, data.hashes)
            )
            write_text(run.config, settings.to_yaml())  # last: its presence makes the folder a run
        except BaseException:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise


def command(run: Run, plan: Plan, resume: Path | None, on_gpu: bool, restarts: int = 0) -> list[str]:
    """accelerate launch on GPUs, torchrun on CPUs (accelerate starts several CPU processes through MPI only)."""
    if on_gpu:
        launcher = [
            "accelerate.commands.launch",
            "--config_file",
            str(ACCELERATE_CONFIG),
            "--num_processes",
            str(plan.world_size),
            "--max_restarts",
            str(restarts),
        ]
    else:
        # By its own name a host may not find itself: a container without network has no name server.
        launcher = ["torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        launcher += ["--nproc_per_node", str(plan.world_size), "--max-restarts", str(restarts)]
    placement = json.dumps(dataclasses.asdict(plan.placement))
    arguments = [str(run.folder), "--placement", placement, *(["--resume", str(resume)] if resume else [])]
    return [sys.executable, "-m", *launcher, "-m", WORKER, *arguments]


# One order of adding up between GPUs, and in cuBLAS a workspace of its own for each stream.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def _environment(world_size: int, deterministic: bool = False) -> dict[str, str]:
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": str(threads_per_rank(world_size)),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # Collectives that each rank remembers for the day that one hangs (a ring: 2 MB).
        "TORCH_FR_BUFFER_SIZE": "2000",
        # Else ranks that start again find the addresses of those before them (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **(DETERMINISTIC if deterministic else {}),
        **hostenv.read(),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


def _supervise(run: Run, settings: Settings, plan: Plan, resume: Path | None, lock: int) -> None:
    import torch

    stops: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _frame: stops.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    started = len(read_jsonl(run.events))
    log_start = run.log.stat().st_size if run.log.exists() else 0
    guard.prepare(run)
    keep_room(run)
    with open(run.log, "ab") as log:
        process = subprocess.Popen(
            command(run, plan, resume, torch.cuda.is_available(), settings.train.restarts),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(plan.world_size, settings.train.deterministic),
            start_new_session=True,
            pass_fds=(lock,),  # where this process is killed alone, the ranks go on, and the run stays locked
        )
    say(f"starting {plan.world_size} ranks (log: {run.log})")
    told: set[int] = set()
    watching = Guard(run, process, log_start, settings.train.restarts)
    try:
        with Progress(run, settings.train.log_every) as progress:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                progress.update()
                if watching.restarts_left and any(e["cause"] not in PASSING for e in progress.errors):
                    watching.kill()  # it would end so again
                if verdict := watching.look():
                    if run.finished:  # only the way out hangs
                        watching.kill()
                        break
                    raise watching.end(verdict)
                if len(stops) > 1:
                    watching.kill()
                elif stops:
                    if not told:
                        progress.line(
                            "stopping, with a checkpoint of the last step (again: at once, unsaved)"
                        )
                        told.add(process.pid)
                    _signal_workers(process, stops[0], told)
            progress.update()
    finally:
        watching.kill()  # also ranks whose launcher has died
        for number, handler in previous.items():
            signal.signal(number, handler)
    events = read_jsonl(run.events)[started:]
    # What was before the last restart is told and over.
    over = max((number for number, event in enumerate(events, 1) if event["kind"] == "restarted"), default=0)
    _judge(run, events[over:], stops, watching, process.returncode)


def _judge(run: Run, events: list[dict[str, Any]], stops: list[int], watching: Guard, code: int) -> None:
    """How a training of these events and signals has ended: returns where it is finished, else raises.

    What the ranks have written counts, not how their processes ended: one that dies after its work is done has done it.
    """
    kinds = {event["kind"] for event in events}
    if run.finished:
        return
    if stops and (len(stops) > 1 or "loaded" not in kinds or "stopped" in kinds):
        raise _stopped(run, kinds, stops)  # what ranks say that were ended so is no error
    _raise_if_killed(run, watching)
    if errors := [event for event in events if event["kind"] == "error"]:
        _raise(errors[0], run)
    if stops:
        raise _stopped(run, kinds, stops)
    text = f"training ended without a result (launcher's exit code {code}); see {run.log}"
    if shutil.disk_usage(run.folder).free < FULL_BYTES:
        text += f"; the disk is full there, free some space, then go on with RUN={run.name}"
    run.event("error", text, cause="rank_died", exit_code=1)
    raise Refused(text)


def _stopped(run: Run, kinds: set[str], stops: list[int]) -> Stopped:
    """Stopped, with an event that says so; the ranks write it only where they were training."""
    if "stopped" not in kinds:
        when = "at once, without a new checkpoint" if "loaded" in kinds else "before the model was loaded"
        run.event("stopped", f"stopped by {signal.Signals(stops[0]).name} {when}")
    return Stopped(run, stops[0])


def _raise_if_killed(run: Run, watching: Guard) -> None:
    """Where the launcher saw a rank end by a signal first, the others' complaints about lost connections say nothing."""
    code, rank = watching.failed_rank() or (0, 0)
    if code < 0 and not watching.has_reported(rank):
        raise watching.end(watching.died(rank, f"was killed by {signal.Signals(-code).name}", -code))


def _raise(error: dict[str, Any], run: Run) -> None:
    if error["exit_code"] == 2:
        raise UserError(error["message"])
    if "traceback" in error:
        say(error["traceback"])
    summary = (error["message"].splitlines() or [""])[0]
    raise Refused(
        f"training failed on rank {error['rank']}: {summary} (log: {run.log}); "
        f"after a fix go on with RUN={run.name}"
    )


def _signal_workers(process: subprocess.Popen, number: int, told: set[int]) -> None:
    """To the ranks only, each once, also to those that start later: the launchers would end them at once, unsaved."""
    for pid, _ in ranks_of(process):
        if pid not in told:
            told.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Progress:
    """The terminal's view of a run: a bar where there is a terminal, a line every `log_every` steps elsewhere."""

    def __init__(self, run: Run, log_every: int):
        self.log_every = log_every
        self.events, self.metrics = Tail(run.events), Tail(run.metrics)
        self.errors: list[dict[str, Any]] = []
        self.events.read()  # those of earlier starts were told then
        done = self.metrics.read()
        self.recent = deque((line["step_seconds"] for line in done), maxlen=20)
        self.bar = tqdm(
            initial=len(done),
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            desc="train",
        )
        self.total: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def update(self) -> None:
        for event in self.events.read():
            if event["kind"] == "begun":
                self.total = self.bar.total = event["steps"]
            if event["kind"] == "restarted":
                self.errors.clear()
            if event["kind"] == "error":
                self.errors.append(event)
            else:
                self.line(event["message"])
        for line in self.metrics.read():
            self.recent.append(line["step_seconds"])
            self.bar.set_postfix_str(f"{loss_of(line)}, {line['tokens_per_second']:.0f} tokens/s")
            self.bar.update(line["step"] - self.bar.n)
            if self.bar.disable and line["step"] % self.log_every == 0:
                self.line(self._summary(line))

    def _summary(self, line: dict[str, Any]) -> str:
        of, left = "", ""
        if self.total:
            of = f"/{self.total}"
            left = f", {clock((self.total - line['step']) * sum(self.recent) / len(self.recent))} left"
        return f"step {line['step']}{of}: {loss_of(line)}, {line['tokens_per_second']:.0f} tokens/s{left}"

    def line(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)
        sys.stderr.flush()


def loss_of(line: dict[str, Any]) -> str:
    return "no loss" if line["loss"] is None else f"loss {line['loss']:.3f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
