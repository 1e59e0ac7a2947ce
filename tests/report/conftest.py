"""What the tests of reports share: one real run, a browser, and a run's folder as an accident or two GPUs leave it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.machine import lacks
from tests.report.browser import Browser, chromium
from tests.train.faults import put_fault
from tests.train.tiny_run import make_place, train

TOKENS = {
    "HF_TOKEN": "hf_plantedPlantedPlantedPlanted0001",
    "WANDB_API_KEY": "planted00planted00planted00planted00wandb",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token-0003",
}
STEPS = 12
SLOW_DAY_SECONDS = (
    300.0  # that all trackers get here for what is still to be told, however loaded the machine is
)


@pytest.fixture(scope="session")
def real_run(tmp_path_factory):
    """A finished run of two ranks that told all four trackers of itself, with secrets in its environment."""
    root = tmp_path_factory.mktemp("reported")
    config = make_place(root, STEPS, eval_every=4, save_every=6, keep_checkpoints=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOKENS.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB__SERVICE_WAIT", str(SLOW_DAY_SECONDS))
        limit = f"CLOSE_SECONDS = {SLOW_DAY_SECONDS}"
        patient = put_fault(tmp_path_factory.mktemp("patient"), "recipe.train.trackers", limit)
        patch.setenv(*patient.popitem())
        patch.setattr(
            "recipe.train.guard.SILENT_SECONDS", SLOW_DAY_SECONDS
        )  # it would end a rank that closes
        tracked = {
            "wandb": "project",
            "mlflow": root / "runs/tracked/mlflow",
            "prometheus": root / "runs/tracked/r.prom",
        }
        options = [word for name, value in tracked.items() for word in ("--set", f"track.{name}={value}")]
        code, _, err = train(config, "tracked", "--set", "lora.dropout=0", *options)
    assert code == 0, err
    return root / "runs" / "tracked"


@pytest.fixture(scope="session")
def browser():
    if not chromium():
        lacks("needs Chromium (Debian: chromium-headless-shell)")
    running = Browser()
    yield running
    running.close()


@pytest.fixture
def runs(real_run, tmp_path):
    """A folder of runs with a copy of the real one, to be changed."""
    shutil.copytree(
        real_run,
        tmp_path / "runs" / "tracked",
        ignore=shutil.ignore_patterns("checkpoints", "wandb", "mlflow"),
    )
    return tmp_path / "runs"


def on_two_gpus(run: Path, steps: int = 300) -> None:
    """Turn a copy of a run into one of a 70B on two cards that was killed, with metrics as such a run writes them."""
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "loss": 2 - step / steps + (step % 7) / 50,
                "learning_rate": 1e-4 * (1 - step / steps),
                "grad_norm": 0.5 + (step % 5) / 20 if step != 7 else float("inf"),
                "tokens": 16384,
                "tokens_per_second": 300.0 + step % 3,
                "step_seconds": 54.0,
                "vram_allocated_gib": 20.5,
                "vram_reserved_gib": 21.75,
                "host_ram_gib": 23.5,
                "temperature_celsius": [70 + step % 4, None],
                "power_watts": [340, 260],
            }
            file.write(json.dumps(line) + "\n")
    plan = json.loads((run / "plan.json").read_text())
    plan |= {"device": "gpu", "device_gib": 21.9, "tokens_per_step": 16384}
    plan["duration"] = {"step_seconds": 52.8, "floor_step_seconds": 26.4, "tokens_per_second": 310.3}
    (run / "plan.json").write_text(json.dumps(plan))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"gpus": ["NVIDIA GeForce RTX 3090"] * 2}))
    (run / "summary.json").unlink()
    events = (run / "events.jsonl").read_text().splitlines()
    events = [line for line in events if json.loads(line)["kind"] not in ("finished", "stopped")]
    events.append(json.dumps({"time": 1.8e9, "kind": "error", "message": "rank 1 was killed by SIGKILL"}))
    (run / "events.jsonl").write_text("\n".join(events) + "\n")
