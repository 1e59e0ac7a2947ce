"""Preflight on real cards: all of it within its minute, and cards that another program fills or slows down."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.preflight import measured, program

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
MEASURED = {
    "gpu memory free", "temperature", "throttling", "matmul rate", "loaded in step", "pcie link", "host copies", "disk speed",
    "torch", "torch cuda", "bitsandbytes", "data", "row lengths",
}  # fmt: skip
BETWEEN_CARDS = {"p2p copies", "all-reduce", "all-gather", "sharded step"}
# Holds all but half a GiB of GPU 0, or keeps it computing; says when it has begun.
FILL = "held = torch.empty(torch.cuda.mem_get_info()[0] - 2**29, dtype=torch.uint8, device='cuda')"
COMPUTE = "a = torch.ones(8192, 8192, dtype=torch.float16, device='cuda'); a @ a"
PROGRAM = """
import sys, time, torch
{begin}
torch.cuda.synchronize()
print("begun", flush=True)
while True:
    {go_on}
"""


def preflight(folder: Path, *arguments: str, **environment: str) -> tuple[dict[str, dict], float]:
    """The checks by name, and the seconds that they took."""
    config = ROOT / "recipe/configs/smollm2-135m.yaml"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "recipe", "preflight", "--config", str(config), "--json", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    return checks, time.monotonic() - started


@contextlib.contextmanager
def beside(begin: str, go_on: str):
    """Another program on GPU 0."""
    code = PROGRAM.format(begin=begin, go_on=go_on)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_all_of_it_within_a_minute(tmp_path):
    import torch

    checks, seconds = preflight(tmp_path)
    asked = MEASURED | (BETWEEN_CARDS if torch.cuda.device_count() > 1 else set())
    bad = {
        name: check
        for name, check in checks.items()
        if name in asked and check["status"] not in ("ok", "warn")
    }
    assert bad == {} and asked <= set(checks)
    assert seconds <= 60, f"{seconds:.0f} s"


def test_quick_is_quick(tmp_path):
    checks, seconds = preflight(tmp_path, "--quick")
    assert checks["gpu"]["status"] == "ok" and checks["matmul rate"]["status"] == "skip"
    assert seconds <= 5, f"{seconds:.1f} s"


def test_a_card_that_another_program_fills(tmp_path):
    with beside(FILL, "time.sleep(1)"):
        checks, _ = preflight(tmp_path, "--quick")
    free = checks["gpu memory free"]
    assert free["status"] == "fail" and "free on GPU 0" in free["found"] and "nvidia-smi" in free["remedy"]


def test_a_card_that_another_program_slows_down(tmp_path):
    with beside(COMPUTE, "a @ a; torch.cuda.synchronize()"):
        checks, _ = preflight(tmp_path)
    assert checks["matmul rate"]["status"] == "warn", checks["matmul rate"]


def test_more_ranks_than_cards(tmp_path):
    checks, _ = preflight(tmp_path, "--quick", "--set", "compute.processes=2", CUDA_VISIBLE_DEVICES="0")
    assert checks["gpu count"]["status"] == "fail"


def test_copies_and_load():
    import torch

    copies = program.run("copies", "host", seconds=measured.COPIES_SECONDS)
    assert len(copies["cards"]) == torch.cuda.device_count(), copies
    card = copies["cards"][0]
    assert card["pinned_to"] > card["pageable_to"] > 0 and card["generation"] >= 1 and card["width"] >= 1
    load = program.run("load", "cuda", "3", seconds=60)
    assert load["bursts"] > 1 and not any(load["damaged"]) and load["unlike"] == [], load
    assert load["readings"][load["cards"][0]["uuid"]]["watts"] > 50
    if torch.cuda.device_count() > 1:
        peers = program.run("copies", "peers", seconds=measured.PEERS_SECONDS)
        assert all(pair["right"] for pair in peers["pairs"]) and peers["trying"] is None, peers
