"""A healthy machine of two cards with all that preflight measures, and how to break one thing of it."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from recipe.hardware import Gpu, Machine
from recipe.plan import Plan, make_plan
from recipe.preflight.check import Check, Context
from recipe.sensors import Sensors
from recipe.settings import from_dict

CARD = Gpu(0, "NVIDIA GeForce RTX 3090", 24.0, 23.7, (8, 6), "580.95.05", "GPU-a")
OTHER = dataclasses.replace(CARD, index=1, uuid="GPU-b")
GOOD = Machine(
    system="Linux", kernel="6.1.0", arch="x86_64", distribution="Debian 12", wsl2=False, python="3.11.7",
    cpu_model="CPU", cores=16, ram_total_gib=64.0, ram_limit_gib=None, ram_available_gib=60.0,
    swap_total_gib=8.0, swap_free_gib=8.0, shm_total_gib=8.0, disk_folder="/", disk_free_gib=900.0,
    gpus=[CARD, OTHER],
)  # fmt: skip
NO_GPU = {"gpus": []}

SENSORS = Sensors(
    index=0, uuid="GPU-a", name=CARD.name, pci_address="0000:01:00.0", temperature_celsius=40, slowdown_celsius=95,
    fan_percent=30, power_watts=25.0, power_limit_watts=350.0, power_default_watts=350.0, sm_clock_mhz=210,
    sm_clock_max_mhz=2100, memory_used_gib=0.3, memory_total_gib=24.0, throttle_reasons=("idle",),
    ecc_uncorrected=0, ecc_corrected=0, retired_pages=0, remapped_rows_failed=False, remapped_rows_pending=False,
    pcie_generation=1, pcie_generation_max=4, pcie_width=16, pcie_width_max=16, pcie_replays=0, nvlinks_active=None,
    processes=(),
)  # fmt: skip
PATH = {
    "address": "0000:01:00.0", "link": {}, "bridges": [], "numa_node": 0, "iommu_group": 1, "iommu_companions": [],
    "acs_redirect": False, "bar1_gib": 32.0,
}  # fmt: skip
HOST = {
    "kernel_log": [],
    "gpu_processes": [],
    "gpu_paths": [PATH, {**PATH, "address": "0000:02:00.0"}],
    "iommu": "off",
    "swap": [{"path": "/swap", "kind": "file", "gib": 8.0, "priority": -2}],
    "limits": {"memlock_bytes": None, "overcommit": 0},
    "units": {"states": {"nvidia-persistenced": "active", "docker": "active"}, "failed": []},
    "docker": {"engine": "26.1.5", "why": None, "toolkit": "1.17.8"},
    "user": {"uid": 1000, "gid": 1000, "groups": ["docker"]},
    "clock": True,
    "hub_token": False,
}
STACK = {
    "torch": "2.13.0",
    "cuda": "13.0",
    "gpus": 2,
    "nf4_error": 0.09,
    "nf4_codes_differ": 0.0,
    "nf4_values_differ": 0.0,
}
COPY = {
    "index": 0, "uuid": "GPU-a", "pinned_to": 12.0, "pinned_from": 12.0, "pageable_to": 5.0, "pageable_from": 4.0,
    "generation": 4, "width": 8, "generation_max": 4, "width_max": 16,
}  # fmt: skip
PAIR = {"from": 0, "to": 1, "access": False, "right": True, "gib_per_second": 6.0}
PAIRS = [PAIR, PAIR | {"from": 1, "to": 0}]
RANKS = {
    "stage": "shard_step",
    "settings": {"NCCL_IB_DISABLE": "1"},
    "all_reduce": {"seconds": 0.01, "gib_per_second": 5.0},
    "all_gather": {"seconds": 0.01, "gib_per_second": 5.0},
    "shard_step": {"loss": 0.4, "loss_after": 0.3, "difference": 1e-8},
}
READING = {"celsius": 70, "watts": 340.0, "clock_mhz": 1700, "reasons": ["power cap"]}
LOAD = {
    "cards": [{"name": CARD.name, "uuid": uuid, "tflops": 65.0} for uuid in ("GPU-a", "GPU-b")],
    "bursts": 28,
    "tflops_together": 62.0,
    "damaged": [0, 0],
    "unlike": [],
    "readings": {"GPU-a": READING, "GPU-b": READING},
}
MEASURED = {
    "tasks": {"limit": 4096, "used": 100},
    "stack": STACK,
    "sensors": {"cards": [SENSORS, dataclasses.replace(SENSORS, index=1, uuid="GPU-b")]},
    "copies": {"cards": [COPY, COPY | {"index": 1, "uuid": "GPU-b"}]},
    "peers": {"pairs": PAIRS, "trying": None},
    "ranks": RANKS,
    "load": LOAD,
    "disk": {"kind": "nvme", "write_gib_per_second": 2.0, "read_gib_per_second": 3.0},
    "reading": {
        "rows": {"count": 500, "held_out": 50},
        "tokenizer": {"characters": 120, "template": True},
        "lengths": {"sample": 200, "over": 0, "mean": 300.0, "longest": 900.0, "by": "the tokenizer"},
        "hashes": {"files": 4, "verified": 4, "wrong": []},
    },
}


def context(machine=None, model="meta-llama/Llama-3.1-8B", prepared=None, host=None, **sections) -> Context:
    """The judged situation: a good GPU machine, but for what is given: parts of measurements, of the host, settings."""
    broken = {name: sections.pop(name) for name in MEASURED if name in sections}
    found = dataclasses.replace(GOOD, **(machine or {}))
    settings = from_dict({"model": model, **sections})
    made = Context(settings, found, plan(settings, found), prepared)
    for name, values in MEASURED.items():  # instead of processes that measure
        given = broken.get(name) or {}
        made.__dict__[name] = given if set(given) & {"skipped", "error"} else values | given
    made.__dict__["host"] = probed(host)
    return made


def probed(host=None) -> dict:
    """A probe's answer in which some parts are others; a text is the reason why one is missing, or why all are."""
    if isinstance(host, str):
        return {"why": host}
    parts = HOST | (host or {})
    return {
        "time": time.time(),
        "parts": {
            name: {"found": None, "why": part}
            if isinstance(part, str) and name != "iommu"
            else {"found": part, "why": None}
            for name, part in parts.items()
        },
    }


PLANS: dict[str, Plan] = {}


def plan(settings, machine) -> Plan:
    """Plans are made once: nearly all situations are the same request."""
    key = repr((settings, machine))
    if key not in PLANS:
        PLANS[key] = make_plan(settings, machine)
    return PLANS[key]


def situations(broken, folder: Path, monkeypatch) -> Iterator[Context]:
    """The good machine, then the same with one thing broken. `broken` is what differs, or a generator that makes both."""
    # What the caller's own place is: it must not answer for the machine of the test.
    for name in ("RECIPE_IMAGE_DIGEST", "RECIPE_HOST_PROBE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if callable(broken):
        yield from broken(folder, monkeypatch)
    else:
        yield context(**{name: value for name, value in broken.items() if name == "model"})
        yield context(**broken)


def found_broken(check, broken, status, found, remedy, folder: Path, monkeypatch) -> tuple[Check, Check]:
    """The promise of every check: fine on the good machine, and it says what is wrong and what to do on the broken one."""
    turns = situations(broken, folder, monkeypatch)
    try:
        fine = check(next(turns))
        assert fine.status in ("ok", "skip"), fine
        result = check(next(turns))
    finally:
        turns.close()
    assert result.status == status and status in ("warn", "fail"), result
    assert found in result.found, result
    assert remedy in result.remedy and result.remedy, result
    assert result.expected and result.name == fine.name
    return fine, result
