"""Checks of the GPUs: each is fine on cards that are right, and fails once for each thing it is there for."""

import dataclasses

import pytest

from recipe.hardware import AMD, NVIDIA, DisplayDevice
from recipe.preflight import gpu, health
from recipe.preflight.measured import LOAD_MARK
from tests.preflight.situation import CARD, LOAD, NO_GPU, READING, SENSORS, STACK, context, found_broken

OTHER = dataclasses.replace(SENSORS, index=1, uuid="GPU-b")


def sensors(**changes) -> dict:
    """The second card is another."""
    return {"sensors": {"cards": [SENSORS, dataclasses.replace(OTHER, **changes)]}}


def log(text: str) -> dict:
    return {"host": {"kernel_log": [{"kind": "xid", "seconds": 5.0, "text": text}]}}


def loaded(**changes) -> dict:
    return {"load": LOAD | changes}


BROKEN = {
    "no gpu": (
        gpu.present,
        {"machine": NO_GPU, "model": "meta-llama/Llama-3.1-70B"},
        "fail",
        "no GPU",
        "make plan",
    ),
    "amd": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", AMD, "amdgpu")]},
            "model": "meta-llama/Llama-3.1-70B",
        },
        "fail",
        "AMD GPU found, only NVIDIA works",
        "NVIDIA",
    ),
    "no driver": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", NVIDIA, "nouveau")]},
            "model": "meta-llama/Llama-3.1-70B",
        },
        "fail",
        "0000:01:00.0 with driver nouveau",
        "make provision",
    ),
    "idle gpu beside the demo": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", NVIDIA, None)]},
            "model": "demo",
        },
        "warn",
        "no driver",
        "make provision",
    ),
    "nvidia-smi": (
        gpu.present,
        {"machine": NO_GPU | {"gpu_error": "nvidia-smi ended with 18"}, "model": "meta-llama/Llama-3.1-70B"},
        "fail",
        "ended with 18",
        "reboot",
    ),
    "too few gpus": (gpu.count, {"compute": {"processes": 4}}, "fail", "2", "CUDA_VISIBLE_DEVICES"),
    "small gpu": (
        gpu.memory_size,
        {"machine": {"gpus": [dataclasses.replace(CARD, memory_total_gib=3.0)]}},
        "fail",
        "3.0 GiB",
        "biggest: ",
    ),
    "gpu taken": (
        gpu.memory_free,
        {"machine": {"gpus": [CARD, dataclasses.replace(CARD, index=1, memory_free_gib=2.0)]}},
        "fail",
        "2.0 GiB free on GPU 1",
        "nvidia-smi",
    ),
    "old gpu": (
        gpu.capability,
        {
            "machine": {
                "gpus": [CARD, dataclasses.replace(CARD, name="Tesla V100", compute_capability=(7, 0))]
            }
        },
        "fail",
        "7.0",
        "Tesla V100 is too old",
    ),
    "no bf16": (
        gpu.bf16,
        {"machine": {"gpus": [dataclasses.replace(CARD, name="RTX 2080", compute_capability=(7, 5))]}},
        "warn",
        "RTX 2080 has none",
        "fp16 is taken",
    ),
    "no bf16 but asked": (
        gpu.bf16,
        {
            "machine": {"gpus": [dataclasses.replace(CARD, compute_capability=(7, 5))]},
            "compute": {"dtype": "bf16"},
        },
        "fail",
        "has none",
        "compute.dtype",
    ),
    "old driver": (
        gpu.driver,
        {"machine": {"gpus": [dataclasses.replace(CARD, driver_version="550.54")]}},
        "fail",
        "550.54",
        "580",
    ),
    "uncorrected": (health.memory_errors, sensors(ecc_uncorrected=3), "fail", "GPU 1: 3 uncorrected", "replace the card"),
    "failed row": (health.memory_errors, sensors(remapped_rows_failed=True), "fail", "not be replaced", "reboot"),
    "pending row": (health.memory_errors, sensors(remapped_rows_pending=True), "warn", "waits", "reboot"),
    "retired pages": (health.memory_errors, sensors(retired_pages=4), "warn", "4 retired", "reboot"),
    "hot": (health.temperature, sensors(temperature_celsius=88), "warn", "88 °C on GPU 1", "clean the fans"),
    "fan stands": (health.fan, sensors(fan_percent=0, temperature_celsius=75), "fail", "GPU 1 stands still", "broken"),
    "low limit": (health.power_limit, sensors(power_limit_watts=150.0), "warn", "150 W of 350", "nvidia-smi -i 1 -pl"),
    "hw thermal": (health.throttling, sensors(throttle_reasons=("hw thermal",)), "warn", "GPU 1: hw thermal", "air"),
    "power brake": (health.throttling, sensors(throttle_reasons=("power brake",)), "warn", "power brake", "power cables"),
    "xid 79": (health.xid, log("NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus."), "warn",
               "fallen off", "supply too weak"),
    "xid unheard of": (health.xid, log("NVRM: Xid (PCI:0000:01:00): 999, what"), "warn", "999", "catalogue"),
    "slow card": (health.matmul, loaded(cards=[LOAD["cards"][0], LOAD["cards"][1] | {"tflops": 30.0}]), "warn",
                  "65, 30 TFLOP/s", "power limit"),
    "load dies": (health.matmul, {"load": {"error": "the test process ended with -9"}}, "fail", "ended with -9", "Xid"),
    "held back": (health.loaded, loaded(readings={"GPU-a": READING | {"reasons": ["hw thermal"]}}), "warn",
                  "held back by hw thermal", "air"),
    "brakes": (health.loaded, loaded(readings={"GPU-a": READING | {"reasons": ["power brake"]}}), "warn",
               "power brake", "power cables"),
    "unsteady": (health.loaded, loaded(damaged=[0, 2]), "fail", "GPU 1 computed wrongly", "overclocking"),
    "unlike": (health.loaded, loaded(unlike=[1]), "fail", "GPU 1 computed wrongly", "overclocking"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy, tmp_path, monkeypatch):
    found_broken(check, broken, status, found, remedy, tmp_path, monkeypatch)


@pytest.mark.parametrize("check", [c for c in health.WITH_GPUS if c not in (health.xid, health.matmul, health.loaded)],
                         ids=lambda c: c.__name__)  # fmt: skip
def test_what_a_card_does_not_tell_is_skipped(check):
    silent = dataclasses.replace(
        SENSORS,
        **{f.name: None for f in dataclasses.fields(SENSORS) if f.name not in ("index", "uuid", "name")},
    )
    assert check(context(sensors={"cards": [silent]})).status == "skip"
    result = check(context(sensors={"skipped": "NVML does not answer"}))
    assert (result.status, result.found) == ("skip", "NVML does not answer")


def test_a_fan_that_rests_on_a_cool_card_is_fine():
    assert health.fan(context(**sensors(fan_percent=0))).status == "ok"


def test_a_card_of_unknown_rate_is_not_judged():
    result = health.matmul(
        context({"gpus": [dataclasses.replace(CARD, name="RTX 9999")]}, **loaded(cards=LOAD["cards"][:1]))
    )
    assert result.status == "ok" and "no rate of this card" in result.found and result.measured == 65


def test_who_holds_the_memory_is_named():
    full = {"gpus": [dataclasses.replace(CARD, memory_free_gib=2.0)]}
    held = {"sensors": {"cards": [dataclasses.replace(SENSORS, processes=((4242, 20.5), (7, 1.0)))]}}
    host = {"gpu_processes": [{"pid": 4242, "name": "python", "gpu": "GPU-a", "gib": 20.5}]}
    result = gpu.memory_free(context(full, host=host, **held))
    assert "held by python (pid 4242) 20.5 GiB, a program (pid 7) 1.0 GiB" in result.found


def test_a_machine_that_went_off_under_load_is_told_and_not_loaded_again(tmp_path):
    """The mark of a load that never ended, from before this boot. One of this boot was only killed."""
    made = context(paths={"runs": str(tmp_path)})
    del made.__dict__["load"]
    (tmp_path / LOAD_MARK).write_text("another boot")
    result = health.loaded(made)
    assert result.status == "fail" and "restarted while" in result.found and LOAD_MARK in result.remedy
    assert health.matmul(made).status == "skip" and (tmp_path / LOAD_MARK).exists()


def test_no_gpu_is_fine_for_the_demo():
    result = gpu.present(context(NO_GPU, model="demo"))
    assert result.status == "ok" and "runs on the CPU" in result.found


HEAD = "# GPU flavour.\n# NVIDIA driver: branch {} or newer (CUDA {}, NCCL 2.29.7)\ntorch==2.13.0\n"


@pytest.mark.parametrize(
    ("lock", "driver", "cuda", "status", "part"),
    [
        (HEAD.format(580, "13.0"), "580.95.05", "13.0", "ok", "580.95.05"),
        (HEAD.format(580, "13.0"), "595.10", "13.2", "ok", "595.10"),
        (HEAD.format(580, "13.0"), "570.86", "13.0", "fail", "driver branch 580 or newer"),
        (HEAD.format(600, "13.0"), "580.95.05", "13.0", "fail", "driver branch 600 or newer"),
        (HEAD.format(580, "13.0"), "570.86", None, "fail", "driver branch 580 or newer"),  # torch's CPU build
        (HEAD.format(580, "13.0"), "unknown", "13.0", "fail", "driver branch 580 or newer"),
        (HEAD.format(580, "13.0"), "550.54", "12.8", "skip", "torch here is built for CUDA 12.8"),
        ("torch==2.13.0\n", "550.54", "13.0", "skip", "requirements-gpu.lock names no driver"),
        (None, "550.54", "13.0", "skip", "requirements-gpu.lock is not here"),
    ],
)
def test_the_driver_against_the_lock(tmp_path, lock, driver, cuda, status, part):
    if lock:
        (tmp_path / "requirements-gpu.lock").write_text(lock)
    machine = {"gpus": [dataclasses.replace(CARD, driver_version=driver)]}
    asked = dataclasses.replace(context(machine), lock_folder=tmp_path)
    asked.__dict__["stack"] = STACK | {"cuda": cuda}
    result = gpu.driver(asked)
    assert result.status == status
    assert part in f"{result.found} {result.remedy}"
