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
import re
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
from recipe.train.manifest import manifest
from recipe.train.run import Run, Tail, begin_or_continue, read_jsonl

ACCELERATE_CONFIG = Path(__file__).parent.parent / "configs" / "accelerate" / "gpus.yaml"
PACKAGE_PARENT = Path(__file__).parent.parent.parent
POLL_SECONDS = 0.2


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(settings: Settings, name: str | None, prepared: Prepared, machine: Machine, plan: Plan) -> Run:
    """Train to the end, or on from the newest checkpoint of an unfinished run; placed as the plan of today says.

    Raises UserError for a wrong request, Refused where the ranks failed, KeyboardInterrupt-like Stopped on a signal.
    """
    run, goes_on = begin_or_continue(settings, name)
    settings.accumulation(plan.world_size)
    resume = None
    if goes_on:
        resume, notes = checkpoint.newest_sound(run.folder)
        for note in notes:
            say(note)
        say(f"run {run.name} goes on from {resume.name if resume else 'the start: it has no checkpoint yet'}")
    else:
        _begin(run, settings, prepared, machine, plan.world_size)
    with run.locked() as lock:
        _forget_undone(run, checkpoint.read_state(resume)["step"] if resume else 0)
        _supervise(run, settings, plan, resume, lock)
    return run


def check(settings: Settings, world_size: int) -> None:
    """What can be told before the model is fetched and quantised, which takes hours for 70B. Raises UserError."""
    from recipe.engine.devices import attention_kind, compute_dtype, set_accumulation
    from recipe.train.data import read_template
    from recipe.train.rows import read_held_out_rows, read_training_rows

    settings.accumulation(world_size)
    hostenv.read()
    dtype = compute_dtype(settings)
    attention_kind(settings, dtype)
    set_accumulation(settings, dtype)
    if settings.data.chat_template:
        read_template(settings.data)
    read_training_rows(settings.data)
    read_held_out_rows(settings.data)


class Stopped(Exception):
    """Training was stopped by a signal, after saving (a second signal: at once, with the checkpoint before)."""

    def __init__(self, run: Run, number: int):
        saved = checkpoint.checkpoints(run.folder)
        upto = f"saved up to {saved[-1].name}" if saved else "before anything was to be saved"
        super().__init__(f"stopped, {upto}; go on with RUN={run.name}")
        self.number = number


def _begin(run: Run, settings: Settings, prepared: Prepared, machine: Machine, world_size: int) -> None:
    """Tokenise, show what will be trained, and make the run's folder."""
    from recipe.train.data import load_tokenizer, packed, shown_rows, tokenise

    tokenizer = load_tokenizer(prepared.folder, settings.data)
    data = tokenise(settings, tokenizer)
    for note in data.notes:
        say(f"note: {note}")
    needed = settings.train.global_batch_tokens
    if data.tokens < needed:
        raise UserError(
            f"data.path is `{settings.data.path}`: has {data.tokens} tokens in {len(data.train)} rows, expected at least "
            f"one global batch ({needed} tokens); add data or lower train.global_batch_tokens"
        )
    in_loss = sum(label != -100 for labels in data.train["labels"] for label in labels)
    say(
        f"data: {len(data.train)} rows, {data.tokens:,} tokens, {in_loss:,} in the loss; {len(data.held_out)} rows held out"
    )
    say(
        "the first rows as the model sees them"
        + (" (dim: not in the loss)" if sys.stderr.isatty() else " ([[...]]: not in the loss)")
    )
    say(shown_rows(data.train, tokenizer, color=sys.stderr.isatty()))
    require_space(run.folder, 64 * 2**20, "the run")
    try:
        (run.folder / "data").mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", data.train), ("held_out", data.held_out)):
            micro_batches = packed(rows, settings.micro_batch_tokens, settings.train.seed)
            # One file, also where nothing is held out: datasets would write none, and could not read that back.
            micro_batches.save_to_disk(str(run.folder / "data" / name), num_shards=1)
        write_json(run.manifest, manifest(settings, prepared, machine, world_size, data.form))
        write_text(run.config, settings.to_yaml())  # last: its presence makes the folder a run
    except BaseException:
        shutil.rmtree(run.folder, ignore_errors=True)
        raise


def _forget_undone(run: Run, step: int) -> None:
    """Steps after the checkpoint that training goes on from are done again: their old lines go, and lines cut short."""
    for path in (run.metrics, run.events):
        if path.exists():
            kept = [line for line in read_jsonl(path) if path == run.events or line["step"] <= step]
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def command(run: Run, plan: Plan, resume: Path | None, on_gpu: bool) -> list[str]:
    """accelerate launch on GPUs, torchrun on CPUs (accelerate starts several CPU processes through MPI only)."""
    if on_gpu:
        launcher = [
            "accelerate.commands.launch",
            "--config_file",
            str(ACCELERATE_CONFIG),
            "--num_processes",
            str(plan.world_size),
        ]
    else:
        # By its own name a host may not find itself: a container without network has no name server.
        launcher = ["torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        launcher += ["--nproc_per_node", str(plan.world_size)]
    placement = json.dumps(dataclasses.asdict(plan.placement))
    arguments = [str(run.folder), "--placement", placement, *(["--resume", str(resume)] if resume else [])]
    return [sys.executable, "-m", *launcher, "-m", WORKER, *arguments]


def _environment(world_size: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # Collectives that each rank remembers for the day that one hangs (a ring: 2 MB).
        "TORCH_FR_BUFFER_SIZE": "2000",
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
    with open(run.log, "ab") as log:
        process = subprocess.Popen(
            command(run, plan, resume, torch.cuda.is_available()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(plan.world_size),
            start_new_session=True,
            pass_fds=(lock,),  # where this process is killed alone, the ranks go on, and the run stays locked
        )
    say(f"starting {plan.world_size} ranks (log: {run.log})")
    told: set[int] = set()
    watching = Guard(run, process, log_start)
    try:
        with Progress(run, settings.train.log_every) as progress:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                progress.update()
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
                            "stopping after this step, with a checkpoint (again: stop at once, unsaved)"
                        )
                        told.add(process.pid)
                    _signal_workers(process, stops[0], told)
            progress.update()
    finally:
        watching.kill()  # also ranks whose launcher has died
        for number, handler in previous.items():
            signal.signal(number, handler)
    _judge(run, read_jsonl(run.events)[started:], stops, watching, process.returncode)


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
    code, rank = _failed_rank(run, watching.log_start) or (0, 0)
    if code < 0 and not watching.has_reported(rank):
        raise watching.end(watching.died(rank, f"was killed by {signal.Signals(-code).name}", -code))


def _failed_rank(run: Run, log_start: int) -> tuple[int, int] | None:
    """Exit code and rank of the first one that the launcher saw fail."""
    log = run.log.read_bytes()[log_start:].decode(errors="replace")
    found = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", log)
    return (int(found[1]), int(found[2])) if found else None


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
            if event["kind"] != "error":
                self.line(event["message"])
        for line in self.metrics.read():
            self.recent.append(line["step_seconds"])
            self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:.0f} tokens/s")
            self.bar.update(line["step"] - self.bar.n)
            if self.bar.disable and line["step"] % self.log_every == 0:
                self.line(self._summary(line))

    def _summary(self, line: dict[str, Any]) -> str:
        of, left = "", ""
        if self.total:
            of = f"/{self.total}"
            left = f", {clock((self.total - line['step']) * sum(self.recent) / len(self.recent))} left"
        return f"step {line['step']}{of}: loss {line['loss']:.3f}, {line['tokens_per_second']:.0f} tokens/s{left}"

    def line(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)
        sys.stderr.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
