"""No skip may hide a failure: what was asked for and cannot run is an error."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pytest_run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/plan/test_plan_command.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_gpu_tests_that_are_asked_for_without_a_gpu_are_no_success():
    done = pytest_run("-m", "gpu")
    assert done.returncode and "-m gpu: torch finds no NVIDIA GPU here" in done.stderr


def test_among_others_they_are_skipped_and_say_why():
    done = pytest_run("-rs", "-k", "a_gpu_is_calibrated")
    assert done.returncode == 0 and "1 skipped" in done.stdout and "needs an NVIDIA GPU" in done.stdout
