"""`recipe export`: the trained adapters as a standard PEFT folder, which gets its name only after it was verified.

Verified means: a fresh process loads it with plain PEFT on the plain quantised model, finds every tensor as written,
and its held-out loss equals the trainer's. FSDP2 exports elsewhere have silently lost all but rank 0's slice of the
adapters (accelerate PR 4206); such a folder fails here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from recipe.errors import Refused
from recipe.export.card import card
from recipe.export.licence import copy_licence
from recipe.export.peftfolder import Weighted
from recipe.export.plain import finished_checkpoint
from recipe.export.reference import Found, Texts, Tool, ask, keep, other_texts, texts_of
from recipe.files import read_json, require_space, sha256_of, write_json, write_text, written_aside
from recipe.train.run import Run

# Largest difference of mean held-out loss between the trainer and plain PEFT. Below fp32 the two round differently
# (packed rows and fp32 masters here, padded batches there).
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 5e-3}


def export(run: Run) -> dict[str, Any]:
    """Write, verify and publish `runs/NAME/adapters`.

    Raises UserError where the run cannot be exported, Refused where the verification fails.
    """
    checkpoint = finished_checkpoint(run)
    summary, manifest = read_json(run.summary), read_json(run.manifest)
    weights = checkpoint / "adapters.safetensors"
    require_space(run.folder, 2 * weights.stat().st_size, "the adapters")
    with written_aside(run.adapters) as aside:
        shutil.copyfile(weights, aside / "adapter_model.safetensors")
        _write_config(run, manifest, aside)
        copy_licence(Path(manifest["model"]["folder"]), manifest["model"]["name"], aside)
        texts = texts_of(run)
        found = _verify(run, aside, summary, texts)
        result: dict[str, Any] = {
            "kind": "adapters",
            "verified_by": "plain PEFT + transformers, fresh process",
            "tensors": _count(aside / "adapter_model.safetensors"),
            "held_out_loss": {
                "plain_peft": found.loss,
                "trainer": summary["held_out_loss"],
                "tolerance": TOLERANCE[summary["compute_dtype"]],
            },
            "answers": len(found.answers),
        }
        write_text(aside / "README.md", card(run, "adapters", result))
        result["sha256"] = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        write_json(aside / "export.json", result)
    keep(run, result["sha256"]["adapter_model.safetensors"], texts, found)
    return {"folder": str(run.adapters), **result}


def _count(weights: Path) -> int:
    with safe_open(weights, framework="pt") as tensors:
        return len(tensors.keys())


def render(result: dict[str, Any]) -> str:
    loss = result["held_out_loss"]
    proof = (
        f"held-out loss {loss['plain_peft']:.6f}, the trainer's {loss['trainer']:.6f}"
        if loss["trainer"] is not None
        else "no held-out rows: loss not compared"
    )
    return f"{result['folder']}: {result['tensors']} tensors, verified with plain PEFT in a fresh process ({proof})"


def _write_config(run: Run, manifest: dict[str, Any], folder: Path) -> None:
    from recipe.data.encode import load_tokenizer
    from recipe.data.new_tokens import token_ids
    from recipe.engine.build import peft_config
    from recipe.plan.shapes import shape_of

    settings = run.settings()
    model = Path(manifest["model"]["folder"])
    tokenizer = load_tokenizer(model, settings.data, settings.lora.new_tokens)
    ids = token_ids(tokenizer, settings.lora.new_tokens)
    config = peft_config(settings.lora, ids, shape_of(str(model)).tied)
    config.base_model_name_or_path = manifest["model"]["name"]
    config.revision = manifest["model"]["revision"]
    config.inference_mode = True
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _verify(run: Run, folder: Path, summary: dict[str, Any], texts: Texts) -> Found:
    """Raises Refused where the fresh process finds other tensors, another loss or another tokenizer."""
    model = Path(read_json(run.manifest)["model"]["folder"])
    tool = Tool("plain PEFT", model, folder, summary["compute_dtype"], adapters=[Weighted(folder)])
    try:
        found = ask(tool, texts)
    except Refused as error:
        raise Refused(f"RUN={run.name}: {error}; nothing was exported") from None
    if found.different:
        raise Refused(
            f"RUN={run.name}: {len(found.different)} tensors are not as written after loading "
            f"(first: {found.different[0]}); nothing was exported"
        )
    expected, tolerance = summary["held_out_loss"], TOLERANCE[summary["compute_dtype"]]
    if expected is not None and not (found.loss is not None and abs(found.loss - expected) <= tolerance):
        raise Refused(
            f"RUN={run.name}: the exported adapters give a held-out loss of {found.loss:.6f}, the trainer's was "
            f"{expected:.6f} (tolerance {tolerance:g}); nothing was exported"
        )
    if wrong := other_texts(texts, found):
        raise Refused(f"RUN={run.name}: {wrong}; nothing was exported")
    return found
