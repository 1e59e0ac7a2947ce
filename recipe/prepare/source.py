"""Where the weights come from: a hub id, a local folder or the demo; found, complete, and of a kind that we can train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from recipe.errors import UserError
from recipe.files import read_json
from recipe.plan.shapes import check_supported, read_config
from recipe.prepare.demo import HUB_ID, demo_checkpoint
from recipe.settings import Settings

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "USE_POLICY*",
]


@dataclass(frozen=True)
class Source:
    """A checked Hugging Face checkpoint on the local disk."""

    folder: Path
    name: str
    revision: str | None

    @property
    def shards(self) -> list[Path]:
        return shard_files(self.folder)


def find_source(settings: Settings) -> Source:
    """Raises UserError where the model is missing, incomplete or of a kind that is not supported."""
    model_id = settings.model.id
    models = Path(settings.paths.models)
    if model_id is None:
        raise UserError("model.id is not set, expected a hub id (org/name), a local folder or `demo`")
    if model_id == "demo":
        source = Source(demo_checkpoint(models), HUB_ID, None)
    elif Path(model_id).is_dir():
        source = Source(Path(model_id), Path(model_id).resolve().name, None)
    elif model_id.count("/") == 1 and not model_id.startswith((".", "/", "~")):
        source = _download(model_id, settings.model.revision, models)
    else:
        raise UserError(
            f"model.id is `{model_id}`: no such folder; expected a hub id (org/name), a folder or `demo`"
        )
    check_folder(source.folder)
    return source


def check_folder(folder: Path) -> None:
    """Raises UserError naming the first file that a checkpoint needs and that is not there."""
    config = folder / "config.json"
    if not config.exists():
        raise UserError(f"{folder}: config.json is missing, expected a Hugging Face checkpoint")
    check_supported(read_config(config), str(config))
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise UserError(
            f"{folder}: tokenizer.json is missing, expected the tokenizer beside the weights; copy it there"
        )
    for shard in shard_files(folder):
        if not shard.exists():
            raise UserError(f"{shard}: is missing, but {INDEX} names it; fetch it again")
        if shard.stat().st_size < 8:
            raise UserError(
                f"{shard}: has {shard.stat().st_size} bytes, expected a safetensors file; fetch it again"
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


def _download(model_id: str, revision: str | None, models: Path) -> Source:
    """A snapshot of the hub repository under `models`, resumed where a part is there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model.id is `{model_id}`"
    folder = models / model_id.replace("/", "--")
    try:
        snapshot_download(
            model_id,
            revision=revision,
            local_dir=folder,
            allow_patterns=WANTED,
            ignore_patterns=["original/*", "consolidated*"],
        )
    except GatedRepoError:
        raise UserError(
            f"{where}: the hub asks for a licence; accept it at https://huggingface.co/{model_id}, then set HF_TOKEN "
            "or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{where}: no revision `{revision}` there, expected a commit, tag or branch"
        ) from None
    except RepositoryNotFoundError:
        token = (
            "the token in use may not see it"
            if os.environ.get("HF_TOKEN")
            else "a private one needs HF_TOKEN"
        )
        raise UserError(f"{where}: no such model on the hub ({token}); check the spelling") from None
    except HFValidationError:
        raise UserError(f"{where}: not a hub id, expected org/name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}: it is no local folder and the hub could not be reached ({reason}); "
            "connect to the network, or set model.id to a folder that holds the checkpoint"
        ) from None
    return Source(folder, model_id, revision)
