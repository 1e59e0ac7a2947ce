"""A model repository on the hub: what it holds at one commit, and its files, fetched whole and checked.

A file gets its name only after its hash is the one that the hub states. The folder `.hub` beside the files holds the
listing, the headers of the weight files and what a fetch was interrupted in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.container import require_network
from recipe.errors import UserError
from recipe.files import read_json, sha256_of, write_json
from recipe.prepare import download
from recipe.prepare.download import Failed, Stalled, ask_hub

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")
SMALL_PREFIXES = ("LICENSE", "USE_POLICY", "NOTICE", "README.md")  # the last says what licence it is


class Unreachable(UserError):
    """No answer from the hub, and no listing of an earlier call."""


@dataclass(frozen=True)
class HubFile:
    """What the hub states about a file: its size in bytes, and the sha256 (LFS files) or the git hash of its content."""

    size: int
    sha256: str | None
    blob: str | None


class Repository:
    """One model at one commit, with the folder that its files go to.

    keep: whether the weight files stay there after they are quantised.
    """

    def __init__(self, model_id: str, revision: str | None, folder: Path, keep: bool):
        """Asks the hub for the listing; where it is out of reach, an earlier call's listing of this revision serves.

        Raises UserError where neither is to be had.
        """
        self.model_id, self.revision, self.folder, self.keep = model_id, revision, folder, keep
        self.where = f"model.id is `{model_id}`"
        self.plain = False  # Xet has stalled once
        self._lock = threading.Lock()
        self._unlike: set[tuple[str, int]] = set()  # files and their times that are not what the hub states
        self._state = self._known()
        asked = {"do": "list", "model": model_id, "revision": revision}
        try:
            found = self._ask(asked)
        except Unreachable:  # nor will it be: a container without network
            if not self._state:
                raise
        except Failed as error:
            if error.kind != "unreachable" or not self._state:
                raise self._refusal(error) from None
        else:
            if found["commit"] != self._state.get("commit"):
                self._state = {"asked": revision, "fetched": self._state.get("fetched", {}), **found}
                self._save()
        self.commit: str = self._state["commit"]
        self.files = {name: HubFile(**stated) for name, stated in self._state["files"].items()}

    def small_files(self) -> list[str]:
        """The configuration, the tokenizer and the licence, without which no weights are fetched."""
        return [n for n in self.files if n.endswith(SMALL_SUFFIXES) or n.startswith(SMALL_PREFIXES)]

    def weight_files(self) -> list[str]:
        """Names in the order of the index, which must be there. Raises UserError where the hub lacks one."""
        if INDEX in self.files:
            names = sorted(set((read_json(self.folder / INDEX).get("weight_map") or {}).values()))
        else:
            names = [SINGLE]
        for name in names:
            if name not in self.files:
                found = ", ".join(n for n in self.files if n.endswith((".bin", ".safetensors", ".pth")))
                raise UserError(
                    f"{self.where}: {name} is missing on the hub (found {found or 'no weight files'}), "
                    "expected weights as safetensors"
                )
        return names

    def complete(self) -> bool:
        """Whether every file that a source needs is there."""
        small = self.small_files()
        return all(map(self.there, small)) and all(map(self.there, self.weight_files()))

    def there(self, name: str) -> bool:
        """Whether the file is on the disk, whole and checked."""
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != self.files[name].size:
            return False
        mark = [self.files[name].sha256 or self.files[name].blob, path.stat().st_mtime_ns]
        if self._state["fetched"].get(name) == mark:
            return True
        # Put there by other hands (`hf download`), or at another commit: its content tells.
        seen = name, path.stat().st_mtime_ns
        if seen in self._unlike or self.files[name].sha256 != sha256_of(path):
            self._unlike.add(seen)
            return False
        self._mark(name)
        return True

    def missing_bytes(self, name: str) -> int:
        """Bytes that fetching the file would add to the disk."""
        part = sum(path.stat().st_size for path in (self.folder / ".hub").glob(f"{name}.*.part"))
        return 0 if self.there(name) else max(0, self.files[name].size - part)

    def fetch(
        self,
        names: list[str],
        stop: threading.Event | None = None,
        received: Callable[[int], None] | None = None,
    ) -> None:
        """Bring the files that are not there yet. A stall is answered once, by plain HTTP.

        received: is told, now and then, how many bytes have come since it was told last.

        Raises UserError, or download.Cancelled when `stop` is set.
        """
        wanted = {name: asdict(self.files[name]) for name in names if not self.there(name)}
        if not wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        request = {"do": "files", "files": wanted}
        try:
            self._ask_twice(
                request, " ".join(wanted) if len(wanted) == 1 else f"{len(wanted)} files", stop, received
            )
        except Failed as error:
            raise self._refusal(error) from None
        for name in wanted:
            self._mark(name)

    def headers(self, names: list[str]) -> dict[str, bytes]:
        """The first bytes of weight files, up to the end of their headers, asked for once per commit."""
        folder = self.folder / ".hub" / f"headers-{self.commit[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        unknown = [name for name in names if not (folder / name).exists()]
        if unknown:
            scratch = folder.with_name("headers.partial")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                self._ask_twice({"do": "headers", "files": unknown, "folder": str(scratch)}, "the headers")
            except Failed as error:
                raise self._refusal(error) from None
            for name in unknown:
                os.replace(scratch / name, folder / name)
            scratch.rmdir()
        return {name: (folder / name).read_bytes() for name in names}

    def drop(self, name: str) -> None:
        """Delete a file that is quantised, unless the sources are kept."""
        if not self.keep:
            (self.folder / name).unlink(missing_ok=True)

    def forget(self) -> None:
        """Delete the folder, once everything is quantised, unless the sources are kept."""
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ask_twice(
        self,
        request: dict[str, Any],
        what: str,
        stop: threading.Event | None = None,
        received: Callable[[int], None] | None = None,
    ) -> None:
        for again in (False, True):
            try:
                return self._ask(request, stop, received)
            except Stalled:
                quiet = f"no bytes of {what} for {download.STALL_SECONDS:.0f} s"
                if again:
                    raise UserError(
                        f"{self.where}: {quiet}, over plain HTTP too; check the network and run it again "
                        "(it goes on where it was), or set model.id to a folder that holds the checkpoint"
                    ) from None
                self.plain = True
                print(f"{self.where}: {quiet}; going on over plain HTTP, without Xet", file=sys.stderr)

    def _ask(
        self,
        request: dict[str, Any],
        stop: threading.Event | None = None,
        received: Callable[[int], None] | None = None,
    ) -> Any:
        missing = f"{next(iter(request['files']))} is" if "files" in request else "its files are"
        require_network(
            f"{self.where}: {missing} not in {self.folder} yet", "run `make prepare` first", Unreachable
        )
        known = {"model": self.model_id, "revision": self._state.get("commit"), "folder": str(self.folder)}
        try:
            return ask_hub(known | request, xet=not self.plain, stop=stop, received=received)
        except Stalled:
            if request["do"] == "list":
                raise Failed("unreachable", f"no answer for {download.STALL_SECONDS:.0f} s") from None
            raise

    def _refusal(self, error: Failed) -> UserError:
        token = "the token in use may not see it" if download.has_token() else "a private one needs HF_TOKEN"
        return (Unreachable if error.kind == "unreachable" else UserError)(
            f"{self.where}: "
            + {
                "gated": f"the hub asks for a licence; accept it at https://huggingface.co/{self.model_id}, then set "
                "HF_TOKEN or run `hf auth login`",
                "revision": f"no revision `{self.revision}` there, expected a commit, tag or branch",
                "repository": f"no such model on the hub ({token}); check the spelling",
                "id": "not a hub id, expected org/name",
                "wrong": f"{error}; it was removed, run it again to fetch it afresh",
                "disk": f"{self.folder} cannot be written ({error}); free some space or choose another disk with "
                "--set paths.models=",
            }.get(
                error.kind,
                f"it is no local folder and the hub could not be reached ({error}); connect to the network, "
                "or set model.id to a folder that holds the checkpoint",
            )
        )

    @property
    def _state_file(self) -> Path:
        return self.folder / ".hub" / "listing.json"

    def _known(self) -> dict[str, Any]:
        if self._state_file.exists():
            with contextlib.suppress(UserError):
                state = read_json(self._state_file)
                if state["asked"] == self.revision:
                    return state
        return {}

    def _mark(self, name: str) -> None:
        file = self.files[name]
        with self._lock:
            self._state["fetched"][name] = [
                file.sha256 or file.blob,
                (self.folder / name).stat().st_mtime_ns,
            ]
            self._save()

    def _save(self) -> None:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._state_file, self._state)
