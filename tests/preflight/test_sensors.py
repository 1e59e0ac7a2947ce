"""What NVML tells, asked of a driver's library that was compiled for it: pynvml itself is real."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import sensors

ROOT = Path(__file__).parents[2]
CODE = """
import dataclasses, json, sys, time
from recipe import sensors
try:
    sensors.read()
    started = time.perf_counter()
    found = sensors.read()
    print(json.dumps({"cards": [dataclasses.asdict(card) for card in found], "seconds": time.perf_counter() - started}))
except sensors.NoSensors as error:
    print(json.dumps({"error": str(error)}))
"""
CARD = """{0}.uuid GPU-{0}
{0}.name NVIDIA GeForce RTX 3090
{0}.pci 00000000:0{0}:00.0
{0}.temperature 61
{0}.slowdown 95
{0}.fan 40
{0}.power 210500
{0}.power_limit 350000
{0}.power_default 350000
{0}.clock 1695
{0}.clock_max 2100
{0}.memory_total 24576
{0}.memory_used 512
{0}.reasons 4
{0}.generation 4
{0}.generation_max 4
{0}.width 8
{0}.width_max 16
{0}.replays 3
{0}.nvlinks 4
{0}.compute 100:256,200:128
{0}.graphics 200:128,300:64
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_standin.c")
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


def ask(library: Path | None, answers: Path, text: str = "", code: str = CODE) -> dict:
    answers.write_text(text)
    # Another library named so must not answer in its place, and none at all where there is no stand-in.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NVML_ANSWERS": str(answers)}
    if library:
        environment["LD_LIBRARY_PATH"] = str(library)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_cards_tell_all(library, tmp_path):
    found = ask(library, tmp_path / "answers", "count 2\n" + CARD.format(0) + CARD.format(1))
    first, second = found["cards"]
    assert set(first) == {field.name for field in dataclasses.fields(sensors.Sensors)}
    expected = {
        "index": 1, "uuid": "GPU-1", "name": "NVIDIA GeForce RTX 3090", "pci_address": "0000:01:00.0",
        "temperature_celsius": 61, "slowdown_celsius": 95, "fan_percent": 40, "power_watts": 210.5,
        "power_limit_watts": 350.0, "power_default_watts": 350.0, "sm_clock_mhz": 1695, "sm_clock_max_mhz": 2100,
        "memory_used_gib": 0.5, "memory_total_gib": 24.0, "throttle_reasons": ["power cap"],
        "pcie_generation": 4, "pcie_generation_max": 4, "pcie_width": 8, "pcie_width_max": 16, "pcie_replays": 3,
        "nvlinks_active": 4, "processes": [[100, 0.25], [200, 0.125], [300, 0.0625]],
        # A consumer card tells none of these.
        "ecc_uncorrected": None, "ecc_corrected": None, "retired_pages": None,
        "remapped_rows_failed": None, "remapped_rows_pending": None,
    }  # fmt: skip
    assert second == expected
    assert found["seconds"] < 0.02


def test_a_data_centre_card_tells_of_its_memory(library, tmp_path):
    more = "0.ecc_uncorrected 2\n0.ecc_corrected 40\n0.retired_single 1\n0.retired_double 3\n0.rows_failed 1\n0.rows_pending 0\n"
    (card,) = ask(library, tmp_path / "answers", "count 1\n" + CARD.format(0) + more)["cards"]
    assert (card["ecc_uncorrected"], card["ecc_corrected"], card["retired_pages"]) == (2, 40, 4)
    assert card["remapped_rows_failed"] is True and card["remapped_rows_pending"] is False


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, []),
        (1, ["idle"]),
        (0x20, ["thermal"]),
        (0x48, ["hw slowdown", "hw thermal"]),
        (0x80, ["power brake"]),
    ],
)
def test_what_holds_the_clocks_back(library, tmp_path, bits, words):
    (card,) = ask(library, tmp_path / "answers", f"count 1\n{CARD.format(0)}0.reasons {bits}\n")["cards"]
    assert card["throttle_reasons"] == words


def test_a_card_that_tells_nothing(library, tmp_path):
    (card,) = ask(library, tmp_path / "answers", "count 1\n0.uuid GPU-0\n")["cards"]
    told = {name: value for name, value in card.items() if value is not None}
    assert told == {"index": 0, "uuid": "GPU-0", "name": ""}


@pytest.mark.parametrize(
    ("text", "part"),
    [("error 9\n", "Driver Not Loaded"), (f"count 2\n{CARD.format(0)}1.lost 1\n", "GPU is lost")],
)
def test_a_driver_in_trouble_is_one_line(library, tmp_path, text, part):
    said = ask(library, tmp_path / "answers", text)["error"]
    assert part in said and "nvidia-smi" in said and "\n" not in said


def test_without_a_driver_it_is_one_line(library, tmp_path):
    (tmp_path / "empty").mkdir()
    code = "import ctypes\ndef none(*a, **k): raise OSError('no such file')\nctypes.CDLL.__init__ = none\n"
    said = ask(None, tmp_path / "answers", "", code + CODE)["error"]
    assert "Library Not Found" in said.replace("NVML Shared Library Not Found", "Library Not Found")
    assert "\n" not in said
