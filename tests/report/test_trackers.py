"""Who else is told of a run: TensorBoard, Weights & Biases, MLflow and a Prometheus textfile, each read by its own library."""

import hashlib
import json
import re
import struct
import threading
import time

import pytest
from transformers import TrainerState

from recipe.cli import main
from recipe.errors import UserError
from recipe.settings import Settings, Track, Train, from_dict
from recipe.train.pulse import Pulse
from recipe.train.run import Run
from recipe.train.stopping import Stopper
from recipe.train.trackers import CLOSE_SECONDS, Textfile, Tracking, mlflow, trackers
from recipe.train.watch import Watch
from tests.report.conftest import STEPS, TOKENS
from tests.train.tiny_run import jsonl, plain_run

BLOCK = 2**15  # of W&B's file
TOLD = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "host_ram_gib")


def watch_of(run):
    pulse = Pulse(run, 0)
    return Watch(run, Stopper(run, pulse), Train(), pulse)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "told"
    folder.mkdir(parents=True)
    (folder / ".pulse").mkdir()
    (folder / "manifest.json").write_text("{}")
    return Run(folder)


def tracking(run, makers):
    return Tracking(run, watch_of(run), makers)


def numbers(run, name):
    return {line["step"]: line[name] for line in jsonl(run / "metrics.jsonl")}


def held_out(run):
    return {
        event["step"]: event["loss"] for event in jsonl(run / "events.jsonl") if event["kind"] == "evaluation"
    }


def test_tensorboard_has_every_step_and_evaluation(real_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(real_run / "tensorboard"))
    found.Reload()
    for name in TOLD:
        told = {point.step: point.value for point in found.Scalars(f"train/{name}")}
        assert told == pytest.approx(numbers(real_run, name), rel=1e-6), name
    assert {point.step: point.value for point in found.Scalars("eval/loss")} == pytest.approx(
        held_out(real_run), rel=1e-6
    )


def wandb_records(path):
    """What W&B's client wrote: protobuf messages in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_every_step_and_evaluation_offline(real_run):
    (file,) = real_run.glob("wandb/offline-run-*/*.wandb")
    told = {}
    for record in wandb_records(file):
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        if "train/global_step" in items:
            told.setdefault(items["train/global_step"], {}).update(items)
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("project", "tracked")
    for name in TOLD:
        there = {step: values[f"train/{name}"] for step, values in told.items() if f"train/{name}" in values}
        assert there == pytest.approx(numbers(real_run, name)), name
    assert {step: values["eval/loss"] for step, values in told.items() if "eval/loss" in values} == held_out(
        real_run
    )


def test_mlflow_has_every_step_and_evaluation(real_run):
    (folder,) = real_run.glob("mlflow/*/*/metrics")
    assert folder.parent.name == (real_run / "mlflow-run-id").read_text().strip()
    told = {name: numbers(real_run, name) for name in TOLD}
    told["eval_loss"] = held_out(real_run)
    for name, expected in told.items():
        lines = [line.split() for line in (folder / name).read_text().splitlines()]
        assert {int(step): float(value) for _, value, step in lines} == pytest.approx(expected), name


def test_prometheus_has_the_newest_numbers(real_run):
    text = (real_run / "r.prom").read_text()
    found = dict(re.findall(r'^recipe_(\w+)\{run="tracked"\} (\S+)$', text, re.MULTILINE))
    assert text.count("# TYPE") == len(found) and text.endswith("\n")
    assert float(found["step"]) == STEPS and float(found["eval_loss"]) == held_out(real_run)[STEPS]
    assert {name: float(found[name]) for name in TOLD} == {
        name: numbers(real_run, name)[STEPS] for name in TOLD
    }


def test_trackers_change_nothing_of_the_training(real_run):
    """The same training without them, and without evaluations on the way, ends with the same bytes."""
    with_them, without = (
        hashlib.sha256((run / f"checkpoints/step-{STEPS:06d}/adapters.safetensors").read_bytes()).hexdigest()
        for run in (real_run, plain_run())
    )
    assert with_them == without


def test_no_token_is_in_any_file_of_a_run(real_run, monkeypatch):
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    assert main(["report", "--run", "tracked", "--set", f"paths.runs={real_run.parent}"]) == 0
    files = [path for path in real_run.parent.parent.rglob("*") if path.is_file()]
    kinds = {
        "report.html",
        "train.log",
        "manifest.json",
        "config.yaml",
        "events.jsonl",
        "r.prom",
        "meta.yaml",
        "debug.log",
    }
    assert kinds <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for name, token in TOKENS.items():
            assert token.encode() not in content, (name, path)


def test_per_gpu_numbers_of_the_textfile(tmp_path):
    file = Textfile(tmp_path / "x.prom", "told")
    file.on_log(
        None, TrainerState(global_step=3), None, numbers={"power_watts": [340.5, None, 260], "loss": 1.5}
    )
    assert (
        'recipe_power_watts{run="told",gpu="0"} 340.5\nrecipe_power_watts{run="told",gpu="2"} 260\n'
        in (tmp_path / "x.prom").read_text()
    )


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_no_token(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-secret-words")

    def refuses():
        raise SystemExit("401 for planted-secret-words")

    told = tmp_path / "told.prom"
    both = tracking(
        run,
        {
            "wandb": refuses,
            "prometheus": lambda: Textfile(tmp_path / "no such folder" / "x.prom", "told"),
            "other": lambda: Textfile(told, "told"),
        },
    )
    for step in (1, 2):
        both.on_evaluate(None, TrainerState(global_step=step), None, metrics={"eval_loss": 1.0 / step})
    both.close()
    warnings = [event["message"] for event in jsonl(run.events)]
    assert [text.partition(":")[0] for text in warnings] == ["track.wandb", "track.prometheus", "track.other"]
    assert "401 for [hidden]" in warnings[0] and "planted" not in "".join(warnings)
    assert 'recipe_eval_loss{run="told"} 0.5' in told.read_text()


def test_a_server_that_is_not_there_holds_no_step(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = tracking(run, {"mlflow": lambda: mlflow(Track(mlflow="http://127.0.0.1:9"), run)})
    started = time.monotonic()
    for step in range(100):
        away.on_evaluate(None, TrainerState(global_step=step), None, metrics={"eval_loss": 1.0})
    assert time.monotonic() - started < 1
    away.close()
    (warning,) = jsonl(run.events)
    assert warning["kind"] == "warning" and warning["message"].startswith("track.mlflow: ")


def test_a_tracker_that_hangs_does_not_hold_the_end(run, monkeypatch):
    monkeypatch.setattr("recipe.train.trackers.CLOSE_SECONDS", 0.2)
    assert CLOSE_SECONDS < 30  # of a stop, in all
    over = threading.Event()
    hangs = tracking(run, {"wandb": over.wait})
    started = time.monotonic()
    hangs.close()
    assert time.monotonic() - started < 2
    over.set()


def test_a_run_that_goes_on_is_the_same_one_in_mlflow(run, tmp_path, monkeypatch):
    import mlflow as library
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), run_name="told", report_to=[])
    for step in (1, 2):
        goes_on = tracking(run, {"mlflow": lambda: mlflow(Track(mlflow=str(tmp_path / "ml")), run)})
        goes_on.on_evaluate(arguments, TrainerState(global_step=step), None, metrics={"eval_loss": 1.0})
        goes_on.close()
    assert jsonl(run.events) == []
    found = library.search_runs(search_all_experiments=True, output_format="list")
    assert [item.info.run_name for item in found] == ["told"] and found[0].info.status == "FINISHED"
    assert found[0].data.tags["mlflow.source.git.repoURL"] == ""


def test_nothing_is_told_and_no_thread_runs_where_all_is_off(run):
    settings = from_dict({"track": {"tensorboard": False}})
    assert trackers(settings, run, watch_of(run)) == []
    assert Settings().track == Track(tensorboard=True, wandb=None, mlflow=None, prometheus=None)


@pytest.mark.parametrize(
    "key, value",
    [
        ("track.mlflow", "https://me:secret@mlflow.example.org"),
        ("track.wandb", "0123456789abcdef0123456789abcdef01234567"),
        ("track.wandb", "sk-abcdefghijkl"),
        ("model.id", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("data.path", "https://user:word@example.org/rows.jsonl"),
    ],
)
def test_a_token_in_a_config_is_refused_without_being_shown(key, value, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {id: demo}\n")
    for arguments in (["--set", f"{key}={value}"], []):
        if not arguments:
            section, _, name = key.partition(".")
            (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {value}\n")
        assert main(["plan", "--config", str(tmp_path / "c.yaml"), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{key} holds what looks like a token" in err and value not in err


def test_what_is_no_token_is_not_refused():
    from_dict(
        {
            "model": {"revision": "0123456789abcdef0123456789abcdef01234567"},
            "data": {"path": "/data/sk-learn_rows.jsonl"},
        }
    )
    with pytest.raises(UserError, match=r"ends with \.prom"):
        from_dict({"track": {"prometheus": "/var/lib/metrics.txt"}})
