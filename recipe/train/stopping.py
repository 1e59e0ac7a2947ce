"""SIGINT and SIGTERM end a training within seconds, at any moment, with the last whole step saved.

Between two optimizer steps nothing that a checkpoint holds is changed, however long a micro-batch takes. So a thread of
each rank, woken by the signal itself, keeps the training from the next optimizer step, agrees with the other ranks on
the step that all have done, saves it and ends the process. What was computed since is done again on resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from recipe.train.pulse import Pulse
from recipe.train.run import Run
from recipe.train.saver import Place

if TYPE_CHECKING:
    from recipe.train.trainer import ShardedSFTTrainer

PATIENCE_SECONDS = 60.0  # for a training thread to come to where the others' are
REPORT_SECONDS = 30.0  # that the training's own end waits for this one


class Stopper:
    """Of one rank. The training tells it where it stands; without `arm` there is nothing to save yet."""

    def __init__(self, run: Run, pulse: Pulse, ending: contextlib.ExitStack | None = None):
        """`ending` has what is to be closed before the process ends."""
        self.run, self.pulse = run, pulse
        self.ending = ending or contextlib.ExitStack()
        self.place: Place | None = None  # after the last whole step of this process
        self.asked = False
        self._trainer: ShardedSFTTrainer | None = None
        self._group: Any = None
        self._held = threading.Lock()  # by who may change or copy what is trained
        self._moved = threading.Condition()
        self._position = (
            0,
            0,
        )  # whole steps, and saves begun: the same on ranks that stand at the same place
        self._saved = 0  # the step of the newest checkpoint that was begun or gone on from
        self._all_asked = False
        self._wake = -1
        self._thread = threading.Thread(target=self._wait, name="stopper", daemon=True)

    def install(self) -> None:
        """From now on the signals are heard. In the main thread's Python code they would wait for the GPU."""
        heard, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._heard = heard
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        self._thread.start()

    def arm(self, trainer: ShardedSFTTrainer, step: int) -> None:
        """A stop saves from now on what comes after `step`, whose checkpoint is there (a collective)."""
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._position, self._saved = (step, 0), step
        self._trainer = trainer

    def ask(self) -> None:
        """Another rank was told to stop."""
        if not self.asked and self._wake >= 0:
            os.write(self._wake, b"\0")

    # -- what the training says -----------------------------------------------------------------------------------

    def hold(self) -> None:
        """The optimizer is about to step."""
        self._held.acquire()

    def stepped(self, place: Place) -> None:
        """A whole step is done."""
        self.place = place
        self._move((place.step, self._position[1]))
        self._held.release()

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the beginning of a regular checkpoint."""
        with self._held:
            yield
            self._saved = step
            self._move((self._position[0], self._position[1] + 1))

    def _move(self, position: tuple[int, int]) -> None:
        with self._moved:
            self._position = position
            self._moved.notify_all()

    def let_end(self) -> None:
        """Called where the training ends with an error: if that is only the others' leaving, wait for the own stop."""
        if self._all_asked:
            self._thread.join(REPORT_SECONDS)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        os.read(self._heard, 1)
        self.asked = True
        try:
            code = self._stop()
        except BaseException:
            traceback.print_exc()
            code = 1
        self.pulse.end(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _stop(self) -> int:
        """The exit code."""
        trainer = self._trainer
        if trainer is None:  # still loading; what was there before is there still, and the launcher says so
            return 0
        try:
            self._meet()
        except RuntimeError as error:  # a rank has died, or has left from its loading
            print(f"not saved: another rank is gone ({error})", file=sys.stderr)
            return int(self._position[0] > self._saved)
        self._all_asked = True
        self._agree()
        self.pulse.mark_alone("save before stopping")
        saver, step = trainer.saver, self._position[0]
        saver.wait()
        if self.place is not None and (step > self._saved or saver.failure):
            state = dataclasses.asdict(trainer.state) | {"global_step": step}
            saver.begin(
                self.run.checkpoint(step),
                trainer.optimizer.optimizer,
                self.place,
                json.dumps(state, sort_keys=True),
                done=trainer.saved,
            )
            saver.wait()
        if dist.get_rank() == 0:
            of = f" of {trainer.state.max_steps}" if trainer.state.max_steps else ""
            failed = f"; its checkpoint could not be written ({saver.failure})" if saver.failure else ""
            self.run.event("stopped", f"stopped after step {step}{of}{failed}", step=step)
        self.ending.close()
        self._meet()
        return 0

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _agree(self) -> None:
        """Keep the training where all ranks have done the same steps and begun the same saves."""
        self._held.acquire()
        while self._group is not None:
            positions: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
            dist.all_gather_object(positions, self._position, group=self._group)
            furthest = max(positions)
            if positions.count(furthest) == len(positions):
                return
            if self._position < furthest:  # all that it needs of the others is under way
                self._held.release()
                self._come_to(furthest)
                self._held.acquire()

    def _come_to(self, position: tuple[int, int]) -> None:
        with self._moved:
            if not self._moved.wait_for(lambda: self._position >= position, PATIENCE_SECONDS):
                raise TimeoutError(f"this rank stays at {self._position}, another is at {position}")
