"""Where the weights come from: a hub id, a local folder or the demo; found, complete, and of a kind that we can train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from recipe.errors import UserError
from recipe.files import read_json, require_space
from recipe.plan.shapes import check_supported, read_config
from recipe.prepare.demo import HUB_ID, demo_checkpoint
from recipe.prepare.feed import HubFeed, LocalFeed
from recipe.prepare.hub import INDEX, SINGLE, Repository, Unreachable
from recipe.settings import Settings

if TYPE_CHECKING:
    from recipe.prepare.header import Stored


@dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint whose configuration and tokenizer lie in `folder`.

    Its weights lie there too, or are fetched from `hub` file by file.
    """

    folder: Path
    name: str
    revision: str | None
    hub: Repository | None = None

    @property
    def shards(self) -> list[Path]:
        if self.hub:
            return [self.folder / name for name in self.hub.weight_files()]
        return shard_files(self.folder)

    def header(self, file: Path) -> list[Stored]:
        """The tensors in one of the shards, whether it is on the disk or not. Raises UserError where it is damaged."""
        from recipe.prepare.header import parse_header, read_header  # torch: `recipe plan` does without

        if self.hub and not self.hub.there(file.name):
            raw = self.hub.headers([name for name in self.hub.weight_files() if not self.hub.there(name)])[
                file.name
            ]
            return parse_header(raw, self.hub.files[file.name].size, str(file))
        return read_header(file)

    def state_of(self, files: list[Path]) -> list[list[Any]]:
        """What changes when the content of the files does: the hub's hashes, else sizes and times."""
        if self.hub:
            return [[file.name, self.hub.files[file.name].sha256, self.hub.commit] for file in files]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def space_for(self, files: list[Path]) -> int:
        """Bytes that fetching these files takes: all that are missing, or the largest two where they are not kept."""
        if not self.hub:
            return 0
        missing = sorted((self.hub.missing_bytes(file.name) for file in files), reverse=True)
        return sum(missing if self.hub.keep else missing[:2])

    @property
    def space_reason(self) -> str:
        """What `space_for` adds, for the message where it is too much."""
        if not self.hub:
            return ""
        return (
            " and the files to fetch (prepare.keep_source=false drops each after use)"
            if self.hub.keep
            else " and two files of the source"
        )

    def feed(self, files: list[Path], show: Callable[[str], None] = lambda text: None) -> LocalFeed | HubFeed:
        """What brings the files, in this order, to the pipeline; `show` is told how far a download is."""
        return HubFeed(self.hub, files, show) if self.hub else LocalFeed()

    def complete(self) -> Source:
        """The same with all weights on the disk. Raises UserError where they cannot be fetched."""
        if not self.hub:
            return self
        require_space(self.folder, self.space_for(self.shards), "the files to fetch")
        with (
            tqdm(desc="fetch", bar_format="{desc}: {postfix}", leave=False, disable=None) as bar,
            self.feed(self.shards, bar.set_postfix_str) as feed,
        ):
            for file in self.shards:
                feed.obtain(file, feed.stop)
        return replace(self, hub=None)

    def done(self) -> None:
        """Everything is quantised: what was fetched only for that goes."""
        if self.hub:
            self.hub.forget()


def find_source(settings: Settings, keep: bool | None = None) -> Source:
    """The checkpoint that a config names, with everything but its weights on the disk and looked at.

    keep: whether a hub model's files stay on the disk, in place of what the config says.
    Raises UserError where the model is missing, incomplete or of a kind that is not supported.
    """
    model_id = settings.model.id
    models = Path(settings.paths.models)
    if model_id is None:
        raise UserError("model.id is not set, expected a hub id (org/name), a local folder or `demo`")
    if model_id == "demo":
        source = Source(demo_checkpoint(models), HUB_ID, None)
    elif Path(model_id).is_dir():
        source = Source(Path(model_id), Path(model_id).resolve().name, None)
    elif model_id.count("/") == 1 and not model_id.startswith((".", "/", "~")):
        keep = settings.prepare.keep_source if keep is None else keep
        return _hub_source(model_id, settings.model.revision, models, keep)
    else:
        raise UserError(
            f"model.id is `{model_id}`: no such folder; expected a hub id (org/name), a folder or `demo`"
        )
    check_folder(source.folder)
    return source


def check_folder(folder: Path) -> None:
    """Raises UserError naming the first file that a checkpoint needs and that is not there."""
    _check_small_files(folder)
    for shard in shard_files(folder):
        if not shard.exists():
            raise UserError(f"{shard}: is missing, but {INDEX} names it; fetch it again")
        if shard.stat().st_size < 8:
            raise UserError(
                f"{shard}: has {shard.stat().st_size} bytes, expected a safetensors file; fetch it again"
            )


def _check_small_files(folder: Path) -> None:
    config = folder / "config.json"
    if not config.exists():
        raise UserError(f"{folder}: config.json is missing, expected a Hugging Face checkpoint")
    check_supported(read_config(config), str(config))
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise UserError(
            f"{folder}: tokenizer.json is missing, expected the tokenizer beside the weights; copy it there"
        )


def shard_files(folder: Path) -> list[Path]:
    """The weight files in the order of the index. Raises UserError where there are none."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map") or {}
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weight files"
    raise UserError(
        f"{folder}: {SINGLE} or {INDEX} is missing (found {found}), expected weights as safetensors"
    )


def _hub_source(model_id: str, revision: str | None, models: Path, keep: bool) -> Source:
    """A repository with its small files fetched and looked at, before any of the weights.

    Files that are to be dropped have a hidden folder of their own, so that a copy that somebody keeps is never touched;
    where such a copy is complete, it is taken and nothing is fetched.
    """
    kept = models / model_id.replace("/", "--")
    if not keep and (kept / ".hub").exists():
        repository = Repository(model_id, revision, kept, keep=True)
        if repository.complete():
            return Source(kept, model_id, revision, repository)
    try:
        folder = kept if keep else kept.with_name(f".{kept.name}.source")
        repository = Repository(model_id, revision, folder, keep)
    except Unreachable:
        if not (kept / "config.json").exists():
            raise
        check_folder(kept)  # brought there by other means
        return Source(kept, model_id, revision)
    repository.fetch(repository.small_files())
    _check_small_files(repository.folder)
    return Source(repository.folder, model_id, revision, repository)
