"""Who else is told how a run gets on: TensorBoard, Weights & Biases, MLflow, a Prometheus textfile.

The first three are transformers' own callbacks. They run on rank 0 in a thread of their own, behind a queue: a server
that is slow or gone holds no step, and a tracker that fails is dropped with one warning. Nothing is imported for what
is off. Tokens come from the environment, or from a file that it names, and stay there.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recipe.files import write_text
from recipe.secret import without_secrets
from recipe.settings import Settings, Track
from recipe.train.run import Run
from recipe.train.watch import Watch

CLOSE_SECONDS = 15.0  # for what is still to be sent; W&B's and TensorBoard's files hold it in any case
# Each may be replaced by NAME_FILE, a file with it.
TOKENS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
OF_A_STEP = ("loss", "learning_rate", "grad_norm")


def trackers(settings: Settings, run: Run, watch: Watch) -> list[Tracking]:
    """A callback that tells all that settings.track names, or none. `watch` comes before it among the callbacks."""
    makers: dict[str, Callable[[], Any]] = {}
    track = settings.track
    if track.tensorboard:
        makers["tensorboard"] = lambda: tensorboard(run)
    if track.wandb:
        makers["wandb"] = lambda: wandb(track, run)
    if track.mlflow:
        makers["mlflow"] = lambda: mlflow(track, run)
    if track.prometheus:
        makers["prometheus"] = lambda: Textfile(Path(track.prometheus or ""), run.name)
    return [Tracking(run, watch, makers)] if makers else []


class Tracking(TrainerCallback):
    """Hands on steps and evaluations to trackers, in their thread."""

    def __init__(self, run: Run, watch: Watch, makers: dict[str, Callable[[], Any]]):
        self.run, self.watch, self.makers = run, watch, makers
        self.told: dict[str, Any] = {}
        self.queue: queue.SimpleQueue[tuple[Any, Any, dict[str, Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._tell, name="trackers", daemon=True)
        self.thread.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and all(name in logs for name in OF_A_STEP):
            self._put(args, state, {name: logs[name] for name in OF_A_STEP} | self.watch.last)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._put(args, state, dict(metrics or {}))

    def close(self) -> None:
        """Wait for what is still to be told, not for ever."""
        self.queue.put(None)
        self.thread.join(CLOSE_SECONDS)

    def _put(self, args: Any, state: Any, numbers: dict[str, Any]) -> None:
        self.queue.put((args, copy.copy(state), numbers))  # the step may be another when it is told

    # -- the thread -----------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        for name, make in self.makers.items():
            with self._dropped_if_it_fails(name):
                self.told[name] = make()
        while (item := self.queue.get()) is not None:
            args, state, numbers = item
            for name, tracker in list(self.told.items()):
                with self._dropped_if_it_fails(name):
                    tracker.on_log(args, state, None, logs=flat(numbers), numbers=numbers)
        for name, tracker in list(self.told.items()):
            with self._dropped_if_it_fails(name):
                ENDS[name](tracker)

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        """It is told nothing more, which one warning says."""
        try:
            yield
        except BaseException as error:  # SystemExit too, which W&B's client may raise
            self.told.pop(name, None)
            said = without_secrets(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            self.run.event(
                "warning",
                f"track.{name}: {said}; it is told nothing more, the training goes on",
                cause="tracker",
            )


def flat(numbers: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; of a list each one, as `name_0`. What is not known or not finite is left out."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        for key, number in (
            [(f"{name}_{i}", item) for i, item in enumerate(value)]
            if isinstance(value, list)
            else [(name, value)]
        ):
            if isinstance(number, (int, float)) and math.isfinite(number):
                found[key] = number
    return found


# -- each of them -----------------------------------------------------------------------------------------------------


def tensorboard(run: Run) -> Any:
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(run.folder / "tensorboard")
    return callback


def wandb(track: Track, run: Run) -> Any:
    """Offline where no key is at hand: `wandb sync runs/NAME/wandb/offline-*` sends it later."""
    sys.modules.pop("wandb", None)  # a rank hides it until somebody wants it
    read_token_files()
    born = hashlib.sha256(run.manifest.read_bytes()).hexdigest()[:8]  # two machines may use one name
    os.environ |= {"WANDB_PROJECT": track.wandb or "", "WANDB_NAME": run.name, "WANDB_DIR": str(run.folder)}
    for name, value in {
        "WANDB_MODE": "online" if os.environ.get("WANDB_API_KEY") else "offline",
        "WANDB_RUN_ID": f"{run.name}-{born}",
        "WANDB_RESUME": "allow",  # a run that goes on is the same one there
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        # Nobody's business: a remote's address may have a token in it.
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
    }.items():
        os.environ.setdefault(name, value)
    from transformers.integrations import WandbCallback

    return WandbCallback()


def mlflow(track: Track, run: Run) -> Any:
    read_token_files()
    where = track.mlflow or ""
    os.environ["MLFLOW_TRACKING_URI"] = where if "://" in where else Path(where).resolve().as_uri()
    for name, value in {
        "MLFLOW_EXPERIMENT_NAME": "recipe",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # its other local store is a database, which needs another package
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow as library
    from transformers.integrations import MLflowCallback

    class Begun(MLflowCallback):
        """In the run that is there already, where a training goes on."""

        def setup(self, args, state, model):
            known = run.folder / "mlflow-run-id"
            library.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
            library.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
            begun = library.start_run(
                run_id=known.read_text().strip() if known.exists() else None,
                run_name=run.name,
                tags={"mlflow.source.git.repoURL": ""},  # nobody's business: it may have a token in it
            )
            write_text(known, f"{begun.info.run_id}\n")
            super().setup(args, state, model)

    return Begun()


def read_token_files() -> None:
    """NAME_FILE in place of NAME, as containers and systemd hand over secrets. Raises OSError where it is not there."""
    for name in TOKENS:
        file = os.environ.get(f"{name}_FILE")
        if file and not os.environ.get(name):
            os.environ[name] = Path(file).read_text().strip()


class Textfile(TrainerCallback):
    """For Prometheus' node exporter: the newest numbers, in one file that is replaced as a whole."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        self.values: dict[str, Any] = {}

    def on_log(self, args, state, control, logs=None, numbers=None, **kwargs):
        self.values |= numbers or {}
        self.values["step"] = state.global_step
        self.values["last_log_timestamp_seconds"] = round(time.time(), 3)
        lines = []
        for name, value in self.values.items():
            each = (
                {f',gpu="{i}"': item for i, item in enumerate(value)}
                if isinstance(value, list)
                else {"": value}
            )
            known = {label: item for label, item in each.items() if isinstance(item, (int, float))}
            if known:
                lines.append(f"# TYPE recipe_{name} gauge")
            lines += [f'recipe_{name}{{run="{self.run}"{label}}} {item}' for label, item in known.items()]
        write_text(self.path, "\n".join(lines) + "\n")


ENDS: dict[str, Callable[[Any], Any]] = {
    "tensorboard": lambda callback: callback.tb_writer and callback.tb_writer.close(),
    "wandb": lambda callback: callback._wandb.finish(),
    "mlflow": lambda callback: callback._ml_flow.end_run(),
    "prometheus": lambda callback: None,
}
