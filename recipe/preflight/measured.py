"""What the checks look at: the request, the machine, and what is measured on it. Each measurement is made once, when the first check asks for it, and may be absent.

A measurement is plain data. `skipped` in it says why it was not made, `error` how it failed. Tests put other values in
its place: `context.__dict__["stack"] = {...}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recipe import hostenv, probe
from recipe.container import in_container
from recipe.hardware import Machine
from recipe.plan import Plan
from recipe.preflight import disks, program
from recipe.preflight import tasks as task_limit
from recipe.settings import Settings

STACK_SECONDS = 120  # importing torch from a cold network disk
RANKS_SECONDS = 40  # NCCL with a broken P2P path hangs rather than fails
AGAIN_SECONDS = 20
COPIES_SECONDS = 30
PEERS_SECONDS = 20
LOAD_SECONDS = 10.0
DISK_MIB = 256
DISK_SECONDS = 20
READING_SECONDS = 30
HASH_SECONDS = 8.0
QUICK = "not measured with --quick"
LOG = "nccl-all-reduce.log"
LOAD_MARK = ".preflight-load"


@dataclass(frozen=True)
class Context:
    """What the checks judge. `prepared` is where the NF4 checkpoint of the model lies or will lie.

    `quick` leaves out all that is measured in processes of its own; `say` gets a line before each slow measurement.
    """

    settings: Settings
    machine: Machine
    plan: Plan
    prepared: Path | None = None
    lock_folder: Path = program.REPOSITORY
    quick: bool = False
    say: Callable[[str], None] = lambda line: None

    @property
    def on_gpu(self) -> bool:
        return self.plan.device == "gpu"

    @cached_property
    def host(self) -> dict[str, Any]:
        """recipe/probe.py's answer about the host; `why` where there is none that counts."""
        file = os.environ.get(probe.PROBE_FILE)
        if file:
            return probe.read_probe(Path(file))
        if in_container():
            return {
                "why": f"the host handed in no probe ({probe.PROBE_FILE}; start the container through make)"
            }
        return probe.gather()

    @cached_property
    def tasks(self) -> dict[str, int]:
        """Tasks that this place allows and has (recipe/preflight/tasks.py)."""
        return task_limit.tasks()

    @cached_property
    def sensors(self) -> dict[str, Any]:
        """`cards`: recipe/sensors.py's answer for the GPUs of this run, in their order."""
        from recipe import sensors

        try:
            by_uuid = {card.uuid: card for card in sensors.read()}
        except sensors.NoSensors as error:
            return {"skipped": str(error)}
        cards = [by_uuid[gpu.uuid] for gpu in self.machine.gpus if gpu.uuid in by_uuid]
        return {"cards": cards} if cards else {"skipped": "NVML knows none of these GPUs"}

    @cached_property
    def stack(self) -> dict[str, Any]:
        """What recipe/preflight/stack.py found: importing torch, CUDA, NF4 against a reference."""
        if self.quick:
            return {"skipped": QUICK}
        self.say("preflight: importing torch, quantising to NF4")
        found = program.run("stack", self.plan.device, seconds=STACK_SECONDS)
        return {"torch_error": found["error"]} if "error" in found and "torch" not in found else found

    @cached_property
    def ranks(self) -> dict[str, Any]:
        """All-reduce, all-gather and a sharded step over the ranks of this run (recipe/preflight/ranks.py).

        Where NCCL fails, it runs again with NCCL_DEBUG=INFO, into a log beside the runs.
        """
        if why := self._unable():
            return {"skipped": why}
        world = self.plan.world_size
        if world < 2:
            return {"skipped": "one rank has nobody to talk to"}
        self.say(f"preflight: all-reduce, all-gather and a sharded step on {world} ranks")
        wrong = wrong_copies(self.peers) if self.on_gpu else None
        settings = {setting.name: setting.value for setting in hostenv.find(self.machine, wrong)}
        command = ("ranks", str(world), *([] if self.on_gpu else ["--cpu"]))
        found = program.run(*command, seconds=RANKS_SECONDS, environment=settings) | {"settings": settings}
        if "error" in found and self.on_gpu:
            found["error"] = f"{found.get('stage', 'start')}: {found['error']}"
            self.say("preflight: that failed; again with NCCL_DEBUG=INFO")
            debug = settings | {"NCCL_DEBUG": "INFO"}
            again = program.run(*command, seconds=AGAIN_SECONDS, environment=debug)
            log = Path(self.settings.paths.runs) / LOG
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(again["log"], encoding="utf-8")
                found["log_file"] = str(log)
            except OSError:  # a place that cannot be written is no reason to hide the answer
                pass
        return found

    @cached_property
    def copies(self) -> dict[str, Any]:
        """Copies between host and each card, pinned and not, and the PCIe link meanwhile (recipe/preflight/copies.py)."""
        if why := self._unable(gpu=True):
            return {"skipped": why}
        self.say("preflight: copies between host and GPUs")
        return program.run("copies", "host", seconds=COPIES_SECONDS)

    @cached_property
    def peers(self) -> dict[str, Any]:
        """Copies from each card to each other one, compared (recipe/preflight/copies.py)."""
        if why := self._unable(gpu=True):
            return {"skipped": why}
        if len(self.machine.gpus) < 2:
            return {"skipped": "one GPU has no peer"}
        self.say("preflight: copies from GPU to GPU")
        return program.run("copies", "peers", seconds=PEERS_SECONDS)

    @cached_property
    def load(self) -> dict[str, Any]:
        """Matmuls on each card alone, then on all at once in bursts (recipe/preflight/load.py).

        Two cards that draw their peak together have switched machines off (AnswerDotAI/fsdp_qlora issue 41). A file marks
        that the load has begun: after a restart it says what a machine that went off could not.
        """
        if why := self._unable(gpu=True):
            return {"skipped": why}
        mark, boot = Path(self.settings.paths.runs) / LOAD_MARK, boot_id()
        try:
            if mark.is_file() and mark.read_text() != boot:
                return {"went_off": str(mark)}
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(boot)
            os.sync()
        except OSError:  # read-only: then a machine that goes off leaves no word
            pass
        self.say(f"preflight: all GPUs loaded in step for {LOAD_SECONDS:.0f} s (their peak power)")
        reading = self._begin_reading()  # the cards are busy, the CPU is not
        try:
            found = program.run("load", "cuda", str(LOAD_SECONDS), seconds=LOAD_SECONDS * 2 + 20)
            self.__dict__["reading"] = reading.result()
            return found
        finally:
            reading.end()
            if os.access(mark.parent, os.W_OK):
                mark.unlink(missing_ok=True)

    @cached_property
    def disk(self) -> dict[str, Any]:
        """How fast paths.models is written and read in a row, and what kind of disk it is."""
        folder = Path(self.settings.paths.models)
        kind = {"kind": disks.kind_of(folder)}
        if self.quick:
            return kind | {"skipped": QUICK}
        self.say(f"preflight: writing and reading {DISK_MIB} MiB in {folder}")
        return kind | program.run("disk_speed", str(folder), str(DISK_MIB), seconds=DISK_SECONDS)

    @cached_property
    def reading(self) -> dict[str, Any]:
        """Rows, lengths, tokenizer, hashes (recipe/preflight/reading.py); `load` has it done meanwhile."""
        return {"skipped": QUICK} if self.quick else self._begin_reading().result()

    def _begin_reading(self) -> program.Running:
        self.say("preflight: reading the data, the tokenizer and the model's files")
        request = {
            "settings": self.settings.to_dict(),
            "prepared": str(self.prepared) if self.prepared else None,
            "hash_seconds": HASH_SECONDS,
        }
        return program.begin("reading", seconds=READING_SECONDS, given=json.dumps(request))

    def _unable(self, gpu: bool = False) -> str | None:
        """Why ranks or GPUs are not measured, or None."""
        if gpu and not (self.on_gpu and self.machine.gpus):
            return "no GPU in this run"
        if self.quick:
            return QUICK
        if "torch_error" in self.stack:
            return "torch does not start"
        if self.on_gpu and self.stack["gpus"] < max(1, self.plan.world_size):
            return "torch does not see the GPUs of this run"
        return None


def wrong_copies(peers: dict[str, Any]) -> str | None:
    """What is wrong with reading one GPU's memory from another, as measured; None where nothing is."""
    wrong = [pair for pair in peers.get("pairs", []) if pair["access"] and not pair["right"]]
    if wrong:
        return f"a copy from GPU {wrong[0]['from']} to GPU {wrong[0]['to']} arrived damaged"
    return "a copy between two GPUs did not end" if "error" in peers and peers.get("trying") else None


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
