"""`recipe plan --calibrate`: the rates of the present cards, measured once and kept beside the models."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from recipe.errors import Refused, UserError
from recipe.files import write_json
from recipe.plan.cards import Card, card_in
from recipe.plan.seconds import PRODUCTS

FILE = "calibration.json"
SECONDS = 120  # six blocks of 0.3 s for each of five rates take some 10 s a GPU
RATES = ("tflops", "fp16_factor", "memory_gb_per_second", "link_gb_per_second")


def calibrate(folder: str | Path) -> dict[str, Card]:
    """Measure, write `folder`/calibration.json, and give the cards by the name that nvidia-smi gives them.

    Raises Refused where there is no GPU that torch can use.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "recipe.plan.measure"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
            cwd=Path(__file__).parents[2],
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            f"--calibrate: no answer within {SECONDS} s; `make preflight` looks for the reason"
        ) from None
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        raise Refused(
            f"--calibrate: the measurement ended with {done.returncode}; `make preflight` looks for the reason"
        )
    found = json.loads(said[-1])
    if not found["gpus"]:
        raise Refused("--calibrate: torch finds no GPU here; expected the machine that is to train")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / FILE, found)
    return _cards(found)


def read(folder: str | Path) -> dict[str, Card]:
    """The cards of an earlier calibration, none where there was none. Raises UserError where the file is damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        return _cards(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is no calibration of ours, expected rates by card; remove it, or measure again with --calibrate"
        ) from None


def _cards(found: dict[str, Any]) -> dict[str, Card]:
    cards = {}
    for name, rates in found["gpus"].items():
        known = card_in(name) or Card(name, 0, 0, 0, 0)
        measured: dict[str, Any] = {rate: float(rates[rate]) for rate in RATES}
        # Measured under steady load, at the power limit. Training, which also does what draws less, reached 693 TFLOP/s on
        # an H200 where 657 were measured: nothing more is taken off.
        measured["tflops"] /= PRODUCTS
        cards[name] = dataclasses.replace(known, **measured, source="calibrated")
    return cards
