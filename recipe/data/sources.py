"""Where rows come from: the settings' files, patterns and hub data sets, each found, named and hashed."""

from __future__ import annotations

import functools
import glob
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe.container import require_network
from recipe.errors import UserError
from recipe.files import sha256_of
from recipe.settings import Data, Source

DEMO = Path(__file__).parent.parent / "demo"
ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
FILES = "a JSONL, JSON, Parquet or CSV file"


@dataclass(frozen=True)
class Origin:
    """A source that was found: its files, or none where it is a hub data set. `key` is the setting that names it."""

    key: str
    path: str
    files: tuple[Path, ...] = ()
    weight: float = 1.0
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """Of its file; of the hashes of several; of a hub data set's name, version and fingerprint."""
        if len(self.files) == 1:
            return _sha256(self.files[0])
        if self.files:
            text = "".join(f"{file.name} {_sha256(file)}\n" for file in self.files)
        else:
            text = f"{self.path} {self.split} {self.revision} {hub_rows(self)._fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    """Of a file as it is now: read once by a process that asks twice."""
    now = file.stat()
    try:
        return _hashed(file, now.st_size, now.st_mtime_ns)
    except PermissionError:
        raise UserError(f"{file}: permission denied; make it readable (chmod a+r {file})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


@functools.lru_cache(maxsize=4096)
def _hashed(file: Path, size: int, changed: int) -> str:
    return sha256_of(file)


def training_origins(data: Data) -> list[Origin]:
    """Those of `data.path` or `data.sources`. Raises UserError where one is not set or not there."""
    if data.sources:
        return [
            _origin(f"data.sources[{number}].path", source, DEMO / "train.jsonl")
            for number, source in enumerate(data.sources)
        ]
    if data.path is None:
        raise UserError(
            f"data.path is not set, expected {FILES}, a hub id or `demo`; use DATA=file.jsonl, or set data.sources"
        )
    alone = Source(path=data.path, split=data.split, revision=data.revision, columns=data.columns)
    return [_origin("data.path", alone, DEMO / "train.jsonl")]


def held_out_origins(data: Data) -> list[Origin]:
    """That of `data.eval_path`, or none where a share of the training rows is held out instead."""
    path = held_out_path(data)
    if path is None:
        return []
    source = Source(path=path, split=data.split, revision=data.revision, columns=data.columns)
    return [_origin("data.eval_path", source, DEMO / "heldout.jsonl")]


def held_out_path(data: Data) -> str | None:
    """`data.eval_path`; the demo's data brings held-out rows of its own."""
    return "demo" if data.eval_path is None and data.path == "demo" else data.eval_path


def _origin(key: str, source: Source, demo_file: Path) -> Origin:
    path = source.path or ""
    found = Origin(key, path, (), source.weight, source.split, source.revision, source.columns)
    if path == "demo":
        return replace(found, files=(demo_file,))
    if Path(path).is_dir():
        raise UserError(
            f"{key} is `{path}`: is a folder, expected a JSONL file or a pattern such as {path}/*.jsonl"
        )
    if Path(path).exists():
        return replace(found, files=(Path(path),))
    if any(letter in path for letter in "*?["):
        files = tuple(Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file())
        if files:
            return replace(found, files=files)
        raise UserError(f"{key} is `{path}`: matches no file, expected a pattern of files that are there")
    if is_hub_id(path):
        return found
    raise UserError(
        f"{key} is `{path}`: no such file, expected {FILES}, a pattern, a hub id (org/name) or `demo`"
    )


def names(data: Data) -> str:
    """The training sources, as a sentence has them."""
    return ", ".join(f"`{path}`" for path in [source.path for source in data.sources] or [data.path])


def is_hub_id(path: str) -> bool:
    """Whether a path that is no file of this machine has the form of a hub data set's name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(ENDINGS)


def hub_rows(origin: Origin) -> Any:
    """The rows of a hub data set, memory-mapped. Raises UserError where it cannot be had."""
    use = "pass DATA=FILE" if origin.key == "data.path" else f"set {origin.key} to it"
    require_network(
        f"{origin.key} is `{origin.path}`: is no local file, so it would be fetched from the hub",
        f"download the data set to a JSONL file and {use}",
    )
    try:
        return _load(origin.path, origin.split, origin.revision)
    except (
        Exception
    ) as error:  # the library raises a dozen kinds for: not found, no access, no network, no such split
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{origin.key} is `{origin.path}`: is no local file, and the hub data set could not be loaded ({reason}); check "
            f"the spelling, {'data.split' if origin.key == 'data.path' else 'its split'}, the network and HF_TOKEN"
        ) from None


@functools.lru_cache(maxsize=8)
def _load(path: str, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(path, split=split, revision=revision)
