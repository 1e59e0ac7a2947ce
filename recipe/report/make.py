"""`recipe report`: the page as a file of the run's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.files import write_text
from recipe.report import page
from recipe.report.numbers import sums
from recipe.report.read import read
from recipe.train.run import Run


def report(run: Run, output: str | None = None, kwh_price: float | None = None) -> dict[str, Any]:
    """Write it, and say where it lies and what it says in short. Raises UserError where it cannot be written."""
    record = read(run)
    path = Path(output) if output else run.folder / "report.html"
    text = page.render(record, kwh_price)
    write_page(path, text)
    return {
        "run": run.name,
        "file": str(path),
        "bytes": len(text.encode()),
        "state": record.state,
        **dataclasses.asdict(sums(record)),
    }


def write_page(path: Path, text: str) -> None:
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder, expected a file name such as report.html")
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); expected a file in a folder of yours"
        ) from None
