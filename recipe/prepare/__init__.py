"""`recipe prepare`: the model of a config as an NF4 checkpoint on the local disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.files import read_json, sha256_of
from recipe.settings import Settings

RECORD = "prepare.json"


@dataclass(frozen=True)
class Prepared:
    """An NF4 checkpoint: the folder, the model's name, and whether this call has made it, and then how fast."""

    folder: Path
    name: str
    revision: str | None
    fresh: bool
    rates: dict[str, Any] | None = None  # see rates.summary

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 by file name, as recorded when the files were written; empty for a checkpoint quantised elsewhere."""
        record = self.folder / RECORD
        return (
            {name: file["sha256"] for name, file in read_json(record)["files"].items()}
            if record.exists()
            else {}
        )


def prepared_folder(settings: Settings) -> Path:
    """Where the NF4 checkpoint of this config's model lies or will lie."""
    model_id = settings.model.id or ""
    if model_id == "demo":
        name = "SmolLM2-135M-Instruct"
    elif Path(model_id).is_dir():
        name = Path(model_id).resolve().name
    else:
        name = model_id.replace("/", "--")
    revision = f"@{settings.model.revision[:12].replace('/', '-')}" if settings.model.revision else ""
    plain = "" if settings.quantization.double_quant else "-single"
    return Path(settings.paths.models) / f"{name}{revision}-nf4{plain}"


def prepare(settings: Settings) -> Prepared:
    """Find the model, and quantise it unless that is done.

    Raises UserError in one line (see source.py, hub.py, already.py, quantise.py).
    """
    target = prepared_folder(settings)
    if (target / RECORD).exists():
        _check_sizes(target)
        source = read_json(target / RECORD)["source"]
        return Prepared(target, source["name"], source["revision"], fresh=False)
    from recipe.prepare.source import find_source  # with packages that a bare host, which only plans, lacks

    source = find_source(settings)
    quantization = read_json(source.folder / "config.json").get("quantization_config")
    if quantization:
        from recipe.prepare.already import check_quantised, check_said

        check_said(source.folder, quantization)
        if source.hub and not source.hub.keep:
            source.done()
            source = find_source(settings, keep=True)  # what is taken as it is stays
        source = source.complete()
        check_quantised(source.folder)
        return Prepared(source.folder, source.name, source.revision, fresh=False)
    from recipe.prepare.quantise import quantise

    rates = quantise(source, target, settings.quantization)
    return Prepared(target, source.name, source.revision, fresh=True, rates=rates)


def verify(prepared: Prepared) -> list[str]:
    """Names of the files whose hash is no longer the recorded one (reads everything)."""
    return [name for name, digest in prepared.hashes.items() if sha256_of(prepared.folder / name) != digest]


def _check_sizes(folder: Path) -> None:
    for name, file in read_json(folder / RECORD)["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path}: is missing; remove {folder} and run `make prepare` again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"{path}: has {path.stat().st_size} bytes, expected {file['bytes']}; "
                f"remove {folder} and run `make prepare` again"
            )
