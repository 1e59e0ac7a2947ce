"""The model card of an export: a README.md as hubs show it, filled from what the run has written down.

Its front matter is read by programs: base, licence, what kind of thing this is. Of files of this machine the card gives
names and hashes, never paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe import __version__
from recipe.data.sources import is_hub_id
from recipe.errors import UserError
from recipe.export.licence import Licence, licence_of
from recipe.export.outcome import curve, evaluation, results, table
from recipe.export.usage import how_to_use
from recipe.files import sha256_of, write_json, write_text
from recipe.report.numbers import sums
from recipe.report.read import Record, is_number, read
from recipe.settings import Settings
from recipe.train.run import Run

ADAPTER_KINDS = ("adapters", "gguf-lora")


def card(run: Run, kind: str, facts: Mapping[str, Any] | None = None) -> str:
    """`kind` as exports are named: adapters, merged-nf4, merged-bf16, gguf-TYPE, gguf-lora, gguf-base-TYPE.

    facts: what this export knows besides, each of them optional: `file` (of a GGUF export), `base_file` (the GGUF that a
    gguf-lora stands on), `verified_by`, `held_out_loss` (by tool, with `tolerance`), `notes` (sentences).
    """
    record, settings = read(run), run.settings()
    facts = facts or {}
    base = record.manifest["model"]
    licence = licence_of(Path(base["folder"]), base["name"])
    parts = [
        f"---\n{_front_matter(record, settings, kind, licence)}---",
        _title(record, kind, licence),
        how_to_use(kind, base, settings, record.summary.get("compute_dtype"), facts),
    ]
    if not kind.startswith("gguf-base-"):
        parts += [
            _training(record, settings),
            curve(record),
            results(record, settings),
            evaluation(record),
        ]
    parts += [
        _verification(facts),
        _limits(record, kind),
        _licence(licence, base["name"]),
        _made_with(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def refresh(run: Run, folder: Path, kind: str) -> bool:
    """Write the card of a finished export anew, with an evaluation that came after it. False where nothing is changed.

    A card that was edited since (its hash is not the one in export.json) is left as it is.
    """
    proof_file, readme = folder / "export.json", folder / "README.md"
    proof = json.loads(proof_file.read_text(encoding="utf-8"))
    if not readme.exists() or sha256_of(readme) != proof["sha256"].get("README.md"):
        return False
    text = card(run, kind, proof)
    if text == readme.read_text(encoding="utf-8"):
        return False
    write_text(readme, text)
    proof["sha256"]["README.md"] = sha256_of(readme)
    write_json(proof_file, proof)
    return True


def _front_matter(record: Record, settings: Settings, kind: str, licence: Licence) -> str:
    from huggingface_hub import ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name: str | None = record.manifest["model"]["name"]
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = None  # a local folder with a name that no hub takes
    base_alone = kind.startswith("gguf-base-")
    data = ModelCardData(
        base_model=name,
        license=licence.id,
        license_name=licence.hub_name,
        license_link=licence.link,
        library_name="gguf" if kind.startswith("gguf-") else "peft" if kind == "adapters" else "transformers",
        pipeline_tag="text-generation",
        datasets=None if base_alone else _hub_data_sets(settings) or None,
        tags=_tags(settings, kind),
        base_model_relation=_relation(kind) if name else None,
    )
    return data.to_yaml() + "\n"


def _relation(kind: str) -> str:
    """As hubs sort a base's descendants. Their `merge` is one of several models; adapters merged into one are a finetune."""
    if kind in ADAPTER_KINDS:
        return "adapter"
    return "quantized" if kind.startswith("gguf-") else "finetune"


def _tags(settings: Settings, kind: str) -> list[str]:
    if kind.startswith("gguf-base-"):
        return ["gguf", "llama.cpp"]
    found = ["lora", "qlora", "nf4", settings.train.method]
    found += ["llama.cpp"] * kind.startswith("gguf-") + ["merged"] * (kind not in ADAPTER_KINDS)
    return ["gguf", *found] if kind.startswith("gguf-") else found


def _hub_data_sets(settings: Settings) -> list[str]:
    paths = [source.path for source in settings.data.sources] or [settings.data.path]
    return list(dict.fromkeys(p for p in paths if p and is_hub_id(p) and not Path(p).exists()))


WHAT = {
    "adapters": "LoRA adapters for {base}, trained by QLoRA (NF4 base, sharded)",
    "merged-nf4": "{base} with trained LoRA adapters merged in, in bf16. They were merged into the weights as NF4 gives them "
    "back, which is what they were trained on",
    "merged-bf16": "{base} with trained LoRA adapters merged in, in bf16. They were trained on the NF4 weights and merged into "
    "the original ones",
    "gguf-lora": "LoRA adapters for {base} as a GGUF file, for llama.cpp and Ollama, trained by QLoRA",
}


def _title(record: Record, kind: str, licence: Licence) -> str:
    base = record.manifest["model"]
    named = base["name"] + (f", revision `{base['revision']}`" if base["revision"] else "")
    if kind.startswith("gguf-base-"):
        what = f"{named} as a GGUF file ({kind.removeprefix('gguf-base-')}), untrained: what the adapters of this run stand on"
    elif kind.startswith("gguf-") and kind != "gguf-lora":
        kept = kind.removeprefix("gguf-")
        what = (
            f"{named} with trained LoRA adapters merged in, as a GGUF file ({kept}) for llama.cpp and Ollama"
        )
    else:
        what = WHAT[kind].format(base=named)
    name = base["name"].rpartition("/")[2] if kind.startswith("gguf-base-") else licence.named(record.name)
    lines = [f"# {name}", f"{what}, with recipe {__version__}."]
    if licence.attribution:
        lines.insert(1, f"**{licence.attribution}**")
    return "\n\n".join(lines)


# -- how it was made ----------------------------------------------------------------------------------------------------


def _training(record: Record, settings: Settings) -> str:
    lora, train = settings.lora, settings.train
    found = sums(record)
    rows = [
        ("method", _method(settings)),
        ("data", _data(record, settings)),
        ("rows and tokens", _amount(record, found.tokens)),
        (
            "LoRA",
            f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {', '.join(lora.target_modules)}",
        ),
        (
            "steps",
            f"{record.summary['steps']}, {train.global_batch_tokens:,} tokens each, learning rate {train.learning_rate:g} "
            f"({train.scheduler}, {train.warmup_steps} steps of warm-up)",
        ),
        ("seed", f"{train.seed}"),
        ("quantisation of the base", _quantisation(settings)),
        ("compute dtype", record.summary["compute_dtype"]),
        ("machine", _machine(record)),
        ("time", _time(found)),
        ("energy", "not measured" if found.kwh is None else f"{found.kwh:.3g} kWh of the GPUs alone"),
    ]
    return "## Training\n\n" + table(("setting", "value"), rows)


def _quantisation(settings: Settings) -> str:
    return f"{settings.quantization.type}, {'double' if settings.quantization.double_quant else 'single'} quantisation"


def _data(record: Record, settings: Settings) -> str:
    """Names without folders: a card is published, and whoever reads it has no such folder."""
    data = record.manifest["data"]
    sources = data.get("sources") or [{"path": data["path"], "sha256": data["sha256"]}]
    named = [f"{_shown_name(one['path'])} (sha256 `{(one['sha256'] or '-')[:16]}`)" for one in sources]
    return f"{', '.join(named)}, loss on {settings.data.train_on}"


def _shown_name(path: str | None) -> str:
    return f"`{path if path and is_hub_id(path) and not Path(path).exists() else Path(path or '-').name}`"


def _amount(record: Record, seen_tokens: float) -> str:
    stats = record.statistics
    seen = f"{seen_tokens:,.0f} tokens seen while training" if seen_tokens else ""
    if not is_number(stats.get("rows")):
        return seen or "not known"
    return (
        f"{stats['rows']:,} rows of {stats['tokens']:,} tokens, {stats['in_loss']:,} of them in the loss; "
        f"{stats['held_out_rows']:,} rows held out" + (f"; {seen}" if seen else "")
    )


def _machine(record: Record) -> str:
    manifest = record.manifest
    ranks = manifest.get("world_size", 1)
    if gpus := manifest.get("gpus"):
        return f"{ranks} × {gpus[0]}" + (f", driver {manifest['driver']}" if manifest.get("driver") else "")
    return f"{ranks} processes on a CPU ({manifest.get('cpu') or 'unknown'})"


def _time(found: Any) -> str:
    minutes = found.seconds / 60
    told = (
        f"{found.seconds:.0f} s"
        if minutes < 3
        else f"{minutes:.0f} min"
        if minutes < 180
        else f"{minutes / 60:.1f} h"
    )
    speed = f", {found.tokens_per_second:,.0f} tokens/s" if found.tokens_per_second else ""
    memory = f", {found.vram_reserved_gib:.1f} GiB of GPU memory" if found.vram_reserved_gib else ""
    return f"{told} of steps{speed}{memory}"


def _method(settings: Settings) -> str:
    """What was done besides plain LoRA."""
    lora, train = settings.lora, settings.train
    parts = [f"DPO, beta {train.dpo_beta:g}" if train.method == "dpo" else "SFT"]
    parts += ["rsLoRA (alpha / sqrt(rank))"] * lora.rslora
    parts += [f"LoRA+ with a ratio of {lora.lr_ratio:g}"] * (lora.lr_ratio != 1)
    parts += [f"NEFTune with alpha {train.neftune_alpha:g}"] * (train.neftune_alpha > 0)
    parts += [f"new tokens {' '.join(f'`{token}`' for token in lora.new_tokens)}"] * bool(lora.new_tokens)
    parts += [f"from the adapters of `{Path(lora.start).name}`"] if lora.start is not None else []
    return ", ".join(parts)


# -- what to know -------------------------------------------------------------------------------------------------------


def _verification(facts: Mapping[str, Any]) -> str:
    losses = {k: v for k, v in (facts.get("held_out_loss") or {}).items() if is_number(v)}
    lines = (
        [f"Loaded again before it got its name: {facts['verified_by']}."] if facts.get("verified_by") else []
    )
    if losses:
        named = [f"{tool.replace('_', ' ')} {loss:.6g}" for tool, loss in losses.items()]
        lines.append(f"Held-out loss: {', '.join(named)}.")
    lines += [str(note) for note in facts.get("notes") or []]
    return "## Verification\n\n" + "\n\n".join(lines) if lines else ""


def _limits(record: Record, kind: str) -> str:
    if kind.startswith("gguf-base-"):
        return ""
    rows = record.statistics.get("rows")
    lines = [
        f"Trained on {f'{rows:,}' if is_number(rows) else 'an unknown number of'} rows: what these do not show, it may not do, "
        "and what they say wrong, it may repeat.",
        "Not tested for safety, bias or harmful answers; test it for your use before others rely on it.",
        "Languages: those of the base and of the rows; neither was measured.",
        "The base was quantised to 4 bits while training: results differ a little from those of 16-bit training, and a little "
        "more where it is run in another precision.",
    ]
    if record.summary["held_out_loss"] is not None and record.manifest["data"]["eval_path"] is None:
        lines.append(
            "The held-out rows come from the same sources as the training rows; other texts were not measured."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(licence: Licence, base: str) -> str:
    if licence.name == "unknown":
        return (
            f"## Licence\n\nThe files of {base} name no licence. Whatever the base's licence is, it applies to what is made with "
            "it: look it up before you pass this on."
        )
    source = (
        f"read from its {licence.found_in}"
        if licence.found_in
        else "known by its name alone: its files name none"
    )
    lines = [f"{base} is under the {licence.name} ({source}), which applies to what is made with it."]
    lines += [f"**{licence.attribution}**"] if licence.attribution else []
    lines += (
        [f"Names of models derived from it begin with “{licence.name_prefix}”."]
        if licence.name_prefix
        else []
    )
    lines += [licence.notice] if licence.notice else []
    lines += [licence.terms] if licence.terms else []
    if licence.files:
        lines.append(f"In this folder: {', '.join(f'`{path.name}`' for path in licence.files)}.")
    return "## Licence\n\n" + "\n\n".join(lines)


def _made_with(record: Record) -> str:
    manifest = record.manifest
    versions = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    commit = f", commit `{manifest['git_commit'][:12]}`" if manifest.get("git_commit") else ""
    return (
        f"## Made with\n\nrecipe {__version__}{commit}, Python {manifest.get('python', '?')}, {versions}.\n\n"
        "The verification stands in `export.json` beside this file."
    )


def kind_of(folder: Path) -> str:
    """By where an export lies: runs/NAME/adapters or runs/NAME/exports/KIND."""
    if folder.name == "adapters" or folder.parent.name == "exports":
        return folder.name
    raise UserError(f"{folder}: is no export of a run, expected runs/NAME/adapters or runs/NAME/exports/KIND")
