"""What belongs to a finished export: the files that its export.json lists with their hashes, and export.json itself.

Whatever else lies in the folder was not verified, and leaves this machine with nobody's help.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from recipe.errors import UserError
from recipe.files import read_json, sha256_of

PROOF = "export.json"
README = "README.md"
SHOWN_FROM_BYTES = 2**28  # of a bar: what is smaller is done before one could be read


@dataclass(frozen=True)
class Item:
    """`name`: its path inside the folder."""

    name: str
    path: Path
    size: int
    sha256: str


def contents(folder: Path) -> list[Item]:
    """Sorted by name, the hashes as they are stated. Raises UserError where the folder is no finished export."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a finished export; run `recipe export` first")
    proof = read_json(folder / PROOF)
    stated = proof.get("sha256") if isinstance(proof, dict) else None
    if not isinstance(stated, dict) or not stated:
        raise UserError(f"{folder / PROOF}: states no hashes under `sha256`; export again")
    found = []
    for name, digest in sorted({**stated, PROOF: sha256_of(folder / PROOF)}.items()):
        path = folder / name
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or any(part.startswith(".") for part in parts):
            raise UserError(
                f"{folder / PROOF}: lists `{name}`, expected names of files in that folder; export again"
            )
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: is missing or no plain file, expected what {PROOF} lists; export again")
        found.append(Item(name, path, path.stat().st_size, str(digest)))
    return found


def check(items: list[Item], what: str) -> None:
    """Raises UserError where a file is not as it was verified."""
    with progress(what, sum(item.size for item in items)) as bar:
        for item in items:
            if sha256_of(item.path) != item.sha256:
                raise damaged(item)
            bar.update(item.size)


def damaged(item: Item) -> UserError:
    return UserError(
        f"{item.path}: is not as it was verified (its sha256 is not the one in {PROOF}); export again, or restore it"
    )


def progress(what: str, total_bytes: int) -> tqdm:
    hidden = not sys.stderr.isatty() or total_bytes < SHOWN_FROM_BYTES
    return tqdm(
        desc=what,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        disable=hidden,
    )


def size_text(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
