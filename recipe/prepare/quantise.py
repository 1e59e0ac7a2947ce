"""Streaming NF4: a Hugging Face checkpoint becomes a 4-bit one in bitsandbytes' standard format.

What is written is what transformers writes for `load_in_4bit` (packed bytes as uint8, double-quantised absmax), so
plain `from_pretrained` loads it and gives, to the bit, the logits of the model that transformers quantises itself.
The engine takes the bytes as they are (recipe/engine/layout.py): no cast ever touches them.

The work is done by the stages of pipeline.py, a source file at a time. An interrupted run goes on at the output shard
that it was writing; of a source on the hub that is not kept, the files that are quantised already are not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.checksums import SUFFIX, sidecar
from recipe.files import publish, read_json, require_space, sha256_of, write_bytes, write_json
from recipe.prepare.entries import Entry, bnb_config, find_entries, split
from recipe.prepare.pipeline import Pipeline, Shard
from recipe.prepare.rates import PeakMemory, summary
from recipe.prepare.source import INDEX, Source
from recipe.settings import Quantization

RECORD = "prepare.json"
SHARD_BYTES = 2 * 2**30  # one output shard per source file of the usual 5 GB
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "NOTICE*", "README.md")


def quantise(
    source: Source, target: Path, quantization: Quantization, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any] | None:
    """Write `source` as NF4 to the folder `target`, which appears only when it is complete.

    Returns the rates of this call (see rates.summary), None where an earlier call had done all the quantising.
    Raises UserError where the checkpoint is damaged, does not fit its config, has NaN or infinite weights, cannot be
    fetched, or the disk is too small.
    """
    entries = find_entries(source, quantization)
    parts = split(entries, shard_bytes)
    shards = [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, 1)
    ]
    partial = target.with_name(f".{target.name}.partial")
    progress = _resume(partial, _fingerprint(source, entries, quantization, shard_bytes))
    todo = [shard for shard in shards if shard.name not in progress["files"]]
    files = list(dict.fromkeys(shard.entries[0].file for shard in todo))
    require_space(
        target,
        sum(entry.target_bytes for shard in todo for entry in shard.entries) + source.space_for(files),
        f"the NF4 model {target.name}" + source.space_reason,
    )
    partial.mkdir(parents=True, exist_ok=True)
    rates = _run(source, partial, quantization, entries, todo, files, progress) if todo else None
    progress["rates"] = rates or progress.get("rates")
    for pattern in COPIED:
        for path in source.folder.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, partial / path.name)
    _finish(partial, source, entries, progress, quantization)
    publish(partial, target)
    source.done()
    return rates


def _run(
    source: Source,
    partial: Path,
    quantization: Quantization,
    entries: list[Entry],
    todo: list[Shard],
    files: list[Path],
    progress: dict,
) -> dict[str, Any]:
    """Quantise the shards in `todo`, and keep `progress` and its record on the disk up to date with what is done."""
    left = Counter(shard.entries[0].file for shard in todo)
    total, size = sum(entry.source_bytes for entry in entries), sum(shard.source_bytes for shard in todo)
    with (
        PeakMemory() as memory,
        tqdm(total=total, initial=total - size, unit="B", unit_scale=True, desc="quantise", leave=False, disable=None) as bar,
        source.feed(files, bar.set_postfix_str) as feed,
    ):  # fmt: skip

        def durable(shard: Shard) -> None:
            assert shard.file is not None
            write_bytes(sidecar(partial / shard.name), shard.checksums)
            progress["weight_map"].update(dict.fromkeys(shard.file.names(), shard.name))
            progress["files"][shard.name] = {"sha256": shard.sha256, "bytes": shard.bytes}
            write_json(partial / RECORD, progress)
            file = shard.entries[0].file
            left[file] -= 1
            if not left[file]:
                feed.drop(file)

        pipeline = Pipeline(partial, quantization, feed.obtain, durable, bar.update)
        begin = time.perf_counter()
        pipeline.run(todo)
        seconds = time.perf_counter() - begin
    return summary([*feed.stages, *pipeline.stages], size, seconds, memory.bytes)


def _fingerprint(source: Source, entries: list[Entry], quantization: Quantization, shard_bytes: int) -> str:
    """Tells whether a half-written result belongs to this source: names, shapes, and the files' sizes and times."""
    text = json.dumps(
        [
            [str(quantization), shard_bytes],
            [[e.name, e.shape, str(e.dtype), e.quantised] for e in entries],
            source.state_of(list(dict.fromkeys(entry.file for entry in entries))),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(partial: Path, fingerprint: str) -> dict:
    """The record of a half-written result, after its files were checked; else an empty one, and nothing in the folder."""
    record = partial / RECORD
    if record.exists():
        progress = read_json(record)
        shards = {name: entry for name, entry in progress["files"].items() if name.endswith(".safetensors")}
        if progress.get("fingerprint") == fingerprint and all(
            (partial / name).exists()
            and (partial / name).stat().st_size == entry["bytes"]
            and sidecar(partial / name).exists()
            for name, entry in shards.items()
        ):
            # What _finish had begun is made again, and nothing half-written may end in the record.
            for path in partial.iterdir():
                if path.name != RECORD and path.name.removesuffix(SUFFIX) not in shards:
                    path.unlink()
            kept = {key: progress.get(key) for key in ("fingerprint", "weight_map", "rates")}
            return kept | {"files": shards}
    shutil.rmtree(partial, ignore_errors=True)
    return {"fingerprint": fingerprint, "weight_map": {}, "files": {}}


def _finish(
    partial: Path,
    source: Source,
    entries: list[Entry],
    progress: dict,
    quantization: Quantization,
) -> None:
    """config.json with the quantisation, the index, and the record with a hash for each file."""
    config = read_json(source.folder / "config.json")
    config["quantization_config"] = json.loads(bnb_config(quantization).to_json_string(use_diff=False))
    write_json(partial / "config.json", config)
    # Small shards may become whole out of order, and what is written must not depend on that.
    progress["files"] = dict(sorted(progress["files"].items()))
    progress["weight_map"] = dict(sorted(progress["weight_map"].items(), key=lambda item: item[1]))
    total = sum(entry["bytes"] for entry in progress["files"].values())
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": progress["weight_map"]})
    for path in sorted(partial.iterdir()):
        if path.name != RECORD and path.name not in progress["files"]:
            progress["files"][path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    unquantised = [entry for entry in entries if not entry.quantised]
    write_json(
        partial / RECORD,
        {
            "source": {
                "name": source.name,
                "revision": source.revision,
                "commit": source.hub.commit if source.hub else None,
            },
            "quantised_bytes": total - sum(e.source_bytes for e in unquantised),
            "unquantised_bytes": sum(e.source_bytes for e in unquantised),
            "unquantised": {e.name: list(e.shape) for e in unquantised if len(e.shape) > 1},
            **progress,
        },
    )
