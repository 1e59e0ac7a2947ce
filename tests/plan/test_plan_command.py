"""`recipe plan` as it is typed: unequal cards, the sweep and its figure, a calibration, prices, bad words."""

import json
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as xml

import pytest

from recipe.cli import main
from recipe.plan.cards import card_in
from recipe.settings import load

CONFIG = "recipe/configs/llama-3.1-70b.yaml"
TWO = ["plan", "--config", CONFIG, "--gpus", "2", "--gpu", "RTX 3090", "--ram-gib", "64"]


def json_of(capsys, *words):
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_prices_and_energy(capsys):
    assert main([*TWO, "--kwh-price", "0.3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "850 W at most" in said and " at 0.3 a kWh" in said
    assert "from the vendor's rates, not measured on this card" in said


def test_unequal_cards(capsys):
    words = ["plan", "--config", CONFIG, "--vram-gib", "24,16", "--gpu", "3090,4080", "--ram-gib", "64"]
    found = json_of(capsys, *words)
    assert found["fits"] and found["cards"] == ["RTX 3090", "RTX 4080"] and found["vram_each_gib"] == [24, 16]


def test_the_ways_out_are_in_the_json(capsys):
    words = ["plan", "--config", CONFIG, "--gpus", "1", "--vram-gib", "24", "--ram-gib", "16"]
    found = json_of(capsys, *words)
    assert not found["fits"] and found["ways"] and all(way["fits"] for way in found["ways"])


def test_the_sweep_and_its_figure(capsys, tmp_path):
    assert main([*TWO, "--sweep", "--figure", str(tmp_path / "s.svg")]) == 0
    said = capsys.readouterr().out
    assert "tokens a row" in said and "32,768" in said and "8 GPUs" in said
    rates = json_of(capsys, *TWO, "--sweep")["rates"]
    assert rates["1024"]["1"] < rates["1024"]["2"] < rates["1024"]["4"]
    figure = xml.parse(tmp_path / "s.svg").getroot()
    bars = [each for each in figure.iter("{http://www.w3.org/2000/svg}rect") if each.get("width") == "12"]
    shown = sum(float(bar.get("height")) > 0 for bar in bars)
    assert shown == sum(rate is not None for row in rates.values() for rate in row.values())


def test_a_calibration_is_used_where_the_card_is_here(tmp_path, capsys, monkeypatch):
    """The file that --calibrate writes on a machine with a GPU."""
    from recipe import hardware

    name = "NVIDIA GeForce RTX 3090"
    gpus = [hardware.Gpu(i, name, 24.0, 23.7, (8, 6), "580.95") for i in range(2)]
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (gpus, None))
    words = ["plan", "--config", CONFIG, "--ram-gib", "64", "--set", f"paths.models={tmp_path}"]
    before = json_of(capsys, *words)["duration"]
    assert not before["measured"]
    rates = {
        "tflops": 2 * card_in(name).tflops,
        "fp16_factor": 1.9,
        "memory_gb_per_second": 900,
        "link_gb_per_second": 24,
    }
    (tmp_path / "calibration.json").write_text(json.dumps({"torch": "2.13.0", "gpus": {name: rates}}))
    after = json_of(capsys, *words)["duration"]
    assert after["measured"] and after["tokens_per_second"] > 1.5 * before["tokens_per_second"]
    planned = []
    monkeypatch.setattr("recipe.preflight.run_checks", lambda context: planned.append(context.plan) or [])
    monkeypatch.setattr("recipe.hostenv.write", lambda *_: None)
    main(["preflight", "--quick", *words[1:3], "--set", f"paths.models={tmp_path}"])
    monkeypatch.setattr("recipe.train.launch.check", lambda settings, ranks: None)
    monkeypatch.setattr("recipe.prepare.prepare", lambda settings: None)
    monkeypatch.setattr("recipe.train.launch.start", lambda *given: planned.append(given[-1]) or stopped())
    main(
        [
            "train",
            "--force",
            *words[1:3],
            "--set",
            f"paths.models={tmp_path}",
            "--set",
            f"paths.runs={tmp_path}",
        ]
    )
    # Preflight judges the run that will be trained.
    assert len(planned) == 2 and all(plan.duration.measured for plan in planned)
    capsys.readouterr()
    (tmp_path / "calibration.json").write_text('{"gpus": {"x": {}}}')
    assert main(words) == 2
    assert "calibration.json: is no calibration of ours" in capsys.readouterr().err


def stopped():
    raise KeyboardInterrupt


def test_without_a_gpu_nothing_is_calibrated(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["plan", "--config", CONFIG, "--calibrate", "--set", f"paths.models={tmp_path}"]
    assert main(words) == 1
    assert "torch finds no GPU here" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpu_is_calibrated_within_half_a_minute(tmp_path, capsys):
    started = time.monotonic()
    words = [
        "plan",
        "--config",
        "recipe/configs/llama-3.1-8b.yaml",
        "--calibrate",
        "--set",
        f"paths.models={tmp_path}",
    ]
    assert json_of(capsys, *words)["duration"]["measured"]
    assert time.monotonic() - started < 30 * torch_gpus() + 30
    (rates,) = json.loads((tmp_path / "calibration.json").read_text())["gpus"].values()
    assert rates["tflops"] > 10 and rates["memory_gb_per_second"] > 100 and rates["link_gb_per_second"] > 1


def torch_gpus():
    import torch

    return torch.cuda.device_count()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--gpus", "2", "--vram-gib", "24,x"], "--vram-gib is `24,x`, expected GiB"),
        (["--gpus", "2", "--gpu", "RTX 9999"], "--gpu is `RTX 9999`, expected one of"),
        (["--figure", "x.svg"], "--figure: expected with --sweep"),
        (["--gpus", "1", "--vram-gib", "7", "--sweep"], "--sweep: the card's rate is not known here"),
    ],
)
def test_bad_words(words, part, capsys):
    assert main(["plan", "--config", CONFIG, *words]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


@pytest.mark.parametrize("ram_gib", ["64", "8"])
def test_a_plan_takes_a_second_and_no_torch(ram_gib):
    """The whole command, imports included; also where it does not fit and the ways out are planned."""
    code = (
        "import sys, recipe.cli\n"
        f"code = recipe.cli.main(['plan', '--config', {CONFIG!r}, '--gpus', '2', '--vram-gib', '24', '--ram-gib', {ram_gib!r}])\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not {"torch", "transformers", "numpy"} & set(done.stderr.split())
    # Of the processor: it waits for nothing, and tests run beside others.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1, f"{seconds:.2f} s"


def test_train_refuses_what_cannot_fit_and_tries_with_force(capsys, tmp_path):
    """Before the model is fetched, and before the run's folder exists."""
    config = ["--config", "recipe/configs/smollm2-135m.yaml", "--set", f"paths.runs={tmp_path}"]
    assert load(config[1]).model.id == "demo"
    huge = ["--set", "train.micro_batch_tokens=262144", "--set", "train.global_batch_tokens=524288"]
    assert main(["train", *config, *huge]) == 1
    said = capsys.readouterr().err
    assert "It does not fit" in said and "try with --force" in said and not list(tmp_path.iterdir())
