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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from recipe import hostenv
from recipe.errors import Refused, UserError
from recipe.files import require_space, write_json, write_text
from recipe.hardware import Machine
from recipe.plan import Plan
from recipe.prepare import Prepared
from recipe.settings import Settings
from recipe.train import checkpoint
from recipe.train.manifest import manifest
from recipe.train.run import Run, Tail, begin_or_continue, read_jsonl

ACCELERATE_CONFIG = Path(__file__).parent.parent / "configs" / "accelerate" / "gpus.yaml"
PACKAGE_PARENT = Path(__file__).parent.parent.parent
WORKER = "recipe.train.worker"
POLL_SECONDS = 0.2
# A rank that has lost its peers fails within one. One that waits for them inside NCCL does not hear the launcher either,
# which would give it 30 seconds (33 were measured on two GPUs).
ALONE_SECONDS = 5.0
# torchrun's word to the others; who has failed it says when all are gone.
CLOSING = re.compile(rb"Sending process \d+ closing signal")
STOPPED_SECONDS = 20.0  # the others wait for a rank that stands still, their GPUs at work, without a word


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
            packed(rows, settings.micro_batch_tokens, settings.train.seed).save_to_disk(
                str(run.folder / "data" / name)
            )
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
    standing, alone = Standing(), Alone(run, log_start)
    try:
        with Progress(run, settings.train.log_every) as progress:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                progress.update()
                alone.look(process)
                if stopped := standing.look(process):
                    rank, pid = stopped
                    _kill(process)
                    raise Refused(
                        f"training ended: rank {rank} (process {pid}) was stopped (SIGSTOP) for {STOPPED_SECONDS:.0f} s "
                        f"while the others waited for it; find out what stopped it, then go on with RUN={run.name}"
                    )
                if len(stops) > 1:
                    _kill(process)
                elif stops:
                    if not told:
                        progress.line(
                            "stopping after this step, with a checkpoint (again: stop at once, unsaved)"
                        )
                        told.add(process.pid)
                    _signal_workers(process, stops[0], told)
            progress.update()
    finally:
        if process.poll() is None:
            _kill(process)
        for number, handler in previous.items():
            signal.signal(number, handler)
    _judge(run, read_jsonl(run.events)[started:], stops, log_start, process.returncode)


def _judge(run: Run, events: list[dict[str, Any]], stops: list[int], log_start: int, code: int) -> None:
    """How a training of these events and signals has ended: returns where it is finished, else raises.

    What the ranks have written counts, not how their processes ended: one that dies after its work is done has done it.
    """
    kinds = {event["kind"] for event in events}
    if run.finished:
        return
    if stops and (len(stops) > 1 or "loaded" not in kinds or "stopped" in kinds):
        raise Stopped(run, stops[0])  # what ranks say that were ended so is no error
    _raise_if_killed(run, log_start)
    if errors := [event for event in events if event["kind"] == "error"]:
        _raise(errors[0], run)
    if stops:
        raise Stopped(run, stops[0])
    raise Refused(f"training ended without a result (launcher's exit code {code}); see {run.log}")


def _raise_if_killed(run: Run, log_start: int) -> None:
    """Where the launcher saw a rank end by a signal first, the others' complaints about lost connections say nothing."""
    code, rank = _failed_rank(run, log_start) or (0, 0)
    if code < 0:
        number = -code
        why = "; often the kernel's, when RAM runs out (see dmesg)" if number == signal.SIGKILL else ""
        raise Refused(
            f"training ended: rank {rank} was killed by {signal.Signals(number).name}{why}; log: {run.log}; "
            f"go on with RUN={run.name}"
        )


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


class Alone:
    """Ends the ranks that a failed one has left behind, once the launcher has seen it fail and given them time."""

    def __init__(self, run: Run, log_start: int):
        self.log, self.position = run.log, log_start
        self.since: float | None = None
        self.next_look = 0.0

    def look(self, process: subprocess.Popen) -> None:
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + 1
        if self.since is None:
            self.since = now if self._closing() else None
        elif now - self.since >= ALONE_SECONDS:
            for pid, _ in ranks_of(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _closing(self) -> bool:
        """Whether the log's new whole lines have the launcher's word."""
        with open(self.log, "rb") as log:
            log.seek(self.position)
            lines, newline, _ = log.read().rpartition(b"\n")
        self.position += len(lines) + len(newline)
        return CLOSING.search(lines) is not None


class Standing:
    """Finds a rank whose process was stopped while others go on: no collective ends then, and none fails for minutes.

    Where all ranks are stopped, somebody wants the GPUs for a while.
    """

    def __init__(self) -> None:
        self.since: dict[int, float] = {}  # by process
        self.next_look = 0.0

    def look(self, process: subprocess.Popen) -> tuple[int, int] | None:
        """(rank, process) of one that has stood still for STOPPED_SECONDS. Cheap to ask: it looks once a second."""
        now = time.monotonic()
        if now < self.next_look:
            return None
        self.next_look = now + 1
        ranks = dict(ranks_of(process))
        stopped = {pid: rank for pid, rank in ranks.items() if _is_stopped(pid)}
        self.since = {pid: self.since.get(pid, now) for pid in stopped} if len(stopped) < len(ranks) else {}
        return next(
            ((stopped[pid], pid) for pid, since in self.since.items() if now - since >= STOPPED_SECONDS), None
        )


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def ranks_of(process: subprocess.Popen) -> Iterator[tuple[int, int]]:
    """(process, rank) of the ranks that run now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if _is_rank(child.cmdline()) and "RANK" in (environment := child.environ()):
                    yield child.pid, int(environment["RANK"])


def _signal_workers(process: subprocess.Popen, number: int, told: set[int]) -> None:
    """To the ranks only, each once, also to those that start later: the launchers would end them at once, unsaved."""
    for pid, _ in ranks_of(process):
        if pid not in told:
            told.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _is_rank(arguments: list[str]) -> bool:
    launchers = ("torch.distributed.run", "accelerate.commands.launch")
    return WORKER in arguments and not any(name in arguments for name in launchers)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


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
