"""`recipe export` beyond the adapters: merged models and GGUF files, in `runs/NAME/exports/KIND`.

Each is written aside, loaded by a fresh process of another tool, compared with what plain PEFT makes of the adapters
(recipe/export/reference.py), and only then gets its name.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recipe.container import require_network
from recipe.errors import Refused, UserError
from recipe.export import adapters as adapter_export
from recipe.export import ollama
from recipe.export.base import check_base
from recipe.export.card import card
from recipe.export.gguf import file_bytes, write_gguf
from recipe.export.gguf_lora import write_gguf_lora
from recipe.export.licence import copy_licence
from recipe.export.merge import write_merged
from recipe.export.peftfolder import Weighted
from recipe.export.plain import finished_checkpoint, fits_in_memory
from recipe.export.reference import Texts, Tool, ask, kept, other_texts, texts_of
from recipe.export.tensors import Base, Dequantised, Merged, Stored, Tensors
from recipe.files import publish, read_json, require_space, sha256_of, write_json, write_text
from recipe.plan.shapes import read_config
from recipe.prepare import RECORD
from recipe.prepare.rates import PeakMemory
from recipe.prepare.source import check_folder, find_source
from recipe.train.run import Run, find_run

# Largest difference of mean held-out loss, in nats, from plain PEFT with the same adapters on the same base; of a loss above 1,
# as a share of it, since rounding moves unlikely tokens most. A merge rounds weights to bf16 once more; the others are what a type
# costs, with room (docs/exports.md has what was measured).
LOSS_BOUND = {
    "merged": 1e-3,
    "f32": 1e-3,
    "f16": 2e-3,
    "bf16": 5e-3,
    "q8_0": 2e-2,
    "q4_k_m": 0.3,
}
# Largest gap in the greedy answers: how much likelier, in nats, some other token may be than the one plain PEFT has chosen.
# Beyond rounding, a token is another; below 8 bits that is to be expected.
GAP_BOUND = {"merged": 0.1, "f32": 0.1, "f16": 0.1, "bf16": 0.1, "q8_0": 0.5}
# Where the run computed in bf16 or fp16, two ways round differently: for losses see adapters.TOLERANCE; a logit of 32 is
# known to 0.25 in bf16, and a gap is the difference of two.
COMPUTE_BOUND = {"float32": 0.0, "bfloat16": 1e-2, "float16": 5e-3}
COMPUTE_GAP = {"float32": 0.0, "bfloat16": 0.5, "float16": 0.1}


@dataclass(frozen=True)
class Order:
    """What `recipe export` was asked for. `base`: nf4, bf16 or the folder of an unquantised checkpoint."""

    merge: bool = False
    gguf: str | None = None
    gguf_lora: bool = False
    gguf_base: bool = False
    base: str = "nf4"
    base_gguf: str = "q8_0"
    weight: float = 1.0
    others: tuple[tuple[str, float], ...] = ()  # runs whose adapters are merged in too, with weights
    replace: bool = False
    reuse: bool = False  # what is there already is taken as it is: for publishing

    @property
    def kinds(self) -> list[str]:
        merged = "bf16" if self.base != "nf4" else "nf4"
        onto = "" if merged == "nf4" else "-onto-bf16"
        return [
            *[f"merged-{merged}{self.suffix}"] * self.merge,
            *[f"gguf-{self.gguf}{onto}{self.suffix}"] * (self.gguf is not None),
            *[f"gguf-base-{self.base_gguf}"] * (self.gguf_lora or self.gguf_base),
            *["gguf-lora"] * self.gguf_lora,
        ]

    @property
    def suffix(self) -> str:
        """Of a mixture, that it does not pass for the run's own."""
        own = f"-weight-{self.weight:g}" if self.weight != 1 else ""
        return own + "".join(f"-with-{name}" + (f"-{w:g}" if w != 1 else "") for name, w in self.others)


def export(run: Run, order: Order) -> list[dict[str, Any]]:
    """The adapters first, where they are not there, then what was asked for; one result each.

    Raises UserError where it cannot be done as asked, Refused where a verification fails.
    """
    finished_checkpoint(run)
    folders = {kind: run.folder / "exports" / kind for kind in order.kinds}
    if not order.kinds:
        if run.adapters.exists() and not order.replace:
            if order.reuse:
                return [_existing(run.adapters)]
            raise _exists(run.adapters)
        return [adapter_export.export(run)]
    results = []
    if not (run.adapters / "export.json").exists():
        results.append(adapter_export.export(run))
    job = Job(run, order)
    for kind, folder in folders.items():
        shared = kind.startswith("gguf-base-")  # made for gguf-lora, and the same for each of them
        if folder.exists() and (order.reuse or (shared and not order.replace)):
            results.append(_existing(folder))
        elif folder.exists() and not order.replace:
            raise _exists(folder)
        else:
            results.append(job.make(kind, folder))
    return results


def render(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        adapter_export.render(one) if one["kind"] == "adapters" else _line(one) for one in results
    )


def _line(result: dict[str, Any]) -> str:
    loss, answers = result["held_out_loss"], result["answers"]
    proof = f"{answers['equal']} of {answers['of']} greedy answers equal"
    if loss["export"] is not None:
        proof = (
            f"held-out loss {loss['export']:.6f}, {loss['compared_with']} {loss['reference']:.6f}; {proof}"
        )
    notes = "".join(f"\n  {note}" for note in result["notes"])
    size = f"{result['bytes'] / 1e9:.2f} GB"
    return f"{result['folder']}: {size}, verified with {result['verified_by']} ({proof}){notes}"


class Job:
    """One run's exports: what they are made of and compared with, found once."""

    def __init__(self, run: Run, order: Order):
        self.run, self.order = run, order
        self.manifest, self.summary = read_json(run.manifest), read_json(run.summary)
        self.nf4 = Path(self.manifest["model"]["folder"])
        if not (self.nf4 / "config.json").exists():
            raise UserError(
                f"RUN={run.name}: its model {self.nf4} is gone; run `make prepare CONFIG={run.config}` first"
            )
        self._check_model()
        self.dtype = self.summary["compute_dtype"]  # what the run computed in, as a name of torch's
        self.adapters = [self._adapters(run, order.weight)]
        for name, weight in order.others:
            self.adapters.append(self._adapters(find_run(run.folder.parent, name), weight))

    def make(self, kind: str, folder: Path) -> dict[str, Any]:
        """Raises Refused where the verification fails; nothing stands under the final name then."""
        started = time.perf_counter()
        say(f"{kind}: writing")
        with _aside(folder) as partial, PeakMemory() as memory:
            if kind.startswith("merged"):
                made = self._merged(partial)
            elif kind == "gguf-lora":
                made = self._gguf_lora(partial)
            else:
                made = self._gguf(kind, partial)
            written = time.perf_counter() - started
            say(f"{kind}: verifying with {made.tool.name} in a fresh process")
            result = self._verified(kind, made)
            result |= {
                "notes": [*result["notes"], *made.notes],
                "bytes": sum(path.stat().st_size for path in partial.iterdir()),
                "write_seconds": round(written, 1),
                "seconds": round(time.perf_counter() - started, 1),
                "peak_ram_gib": round(memory.bytes / 2**30, 2),
            }
            copy_licence(self.nf4, self.manifest["model"]["name"], partial)
            write_text(partial / "README.md", card(self.run, kind, result | made.facts))
            result["sha256"] = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            write_json(partial / "export.json", result)
        return {"folder": str(folder), **result}

    # --- what is written ----------------------------------------------------------------------------------

    def _merged(self, partial: Path) -> Made:
        progress = write_merged(Merged(self.base, self.adapters), partial)
        (partial / "merge.json").unlink()
        for pattern in TOKENIZER_FILES:
            for path in self.run.adapters.glob(pattern):
                shutil.copyfile(path, partial / path.name)
        rates = progress.get("rates")
        return Made(
            Tool("plain transformers", partial, partial, self.dtype),
            "merged",
            {"rates": rates} if rates else {},
        )

    def _gguf(self, kind: str, partial: Path) -> Made:
        base_only = kind.startswith("gguf-base-")
        # The base alone is always the one that the adapters were trained on.
        source: Tensors = Dequantised(self.nf4) if base_only else Merged(self.base, self.adapters)
        quantisation = self.order.base_gguf if base_only else str(self.order.gguf)
        name = self.nf4.name.removesuffix("-nf4") if base_only else self.run.name
        file = partial / f"{name}-{quantisation.upper()}.gguf"
        require_space(partial, file_bytes(source, quantisation), f"the GGUF file {file.name}")
        partial.mkdir(parents=True, exist_ok=True)
        fallbacks = write_gguf(source, self.run.adapters, file, quantisation, name=name)
        write_text(partial / "Modelfile", self._modelfile(file.name))
        tool = Tool("llama.cpp", file, partial)
        return Made(
            tool, quantisation, {"file": file.name}, _fallback_notes(fallbacks), adapted=not base_only
        )

    def _gguf_lora(self, partial: Path) -> Made:
        partial.mkdir(parents=True, exist_ok=True)
        file = partial / f"{self.run.name}-lora.gguf"
        base = gguf_file(self.run.folder / "exports" / f"gguf-base-{self.order.base_gguf}")
        write_gguf_lora(self.run.adapters, self.nf4, file, name=self.run.name)
        relative = f"../{base.parent.name}/{base.name}"
        write_text(partial / "Modelfile", self._modelfile(relative, file.name))
        tool = Tool("llama.cpp", base, partial, lora=file)
        facts = {"file": file.name, "base_file": relative}
        return Made(tool, self.order.base_gguf, facts)

    def _modelfile(self, model: str, adapter: str | None = None) -> str:
        tokens = self.run.settings().data.max_length
        return ollama.modelfile(model, self.run.adapters, self.nf4, tokens, adapter)

    # --- what it is compared with -------------------------------------------------------------------------

    def _verified(self, kind: str, made: Made) -> dict[str, Any]:
        reference = self.reference if made.adapted else self.untuned
        texts = self.texts
        try:
            found = ask(made.tool, texts, reference.answers)
        except Refused as error:
            raise Refused(f"RUN={self.run.name}: {kind}: {error}; nothing was exported") from None
        bound = (
            LOSS_BOUND[made.type] * max(1.0, reference.loss or 0.0)
            + COMPUTE_BOUND[self.dtype]
            + reference.slack
        )
        close = made.type in GAP_BOUND and not reference.slack
        largest = GAP_BOUND[made.type] + COMPUTE_GAP[self.dtype] if close else None
        gap = max(score.gap for score in found.answered)
        result = {
            "kind": kind,
            "verified_by": f"{made.tool.name}, fresh process",
            "held_out_loss": {
                "export": found.loss,
                "reference": reference.loss,
                "compared_with": reference.what,
                "tolerance": bound,
                "trainer": self.summary["held_out_loss"],
            },
            "answers": {
                "equal": sum(score.gap <= EQUAL_GAP for score in found.answered),
                "of": len(found.answered),
                "largest_gap": gap,
                "tolerance": largest,
            },
            "base": self.base_kind if made.adapted else "nf4",
            "adapters_sha256": [sha256_of(one.folder / WEIGHTS) for one in self.adapters],
            "notes": [],
        }
        wrong = other_texts(texts, found)
        if (
            found.loss is not None
            and reference.loss is not None
            and not abs(found.loss - reference.loss) <= bound
        ):
            wrong = f"its held-out loss is {found.loss:.6f}, {reference.what} {reference.loss:.6f} (tolerance {bound:g})"
        elif largest is not None and not gap <= largest:
            wrong = (
                f"in a greedy answer another token is likelier by {gap:.3f} nats than the one that plain PEFT has chosen "
                f"(tolerance {largest:g})"
            )
        if wrong:
            raise Refused(
                f"RUN={self.run.name}: {kind}, loaded with {made.tool.name}: {wrong}; nothing was exported"
            )
        return result

    @cached_property
    def texts(self) -> Texts:
        return texts_of(self.run).first(self.known["documents"])

    @cached_property
    def known(self) -> dict[str, Any]:
        """What the adapters' own export wrote down."""
        found = kept(self.run, sha256_of(self.run.adapters / WEIGHTS))
        if found is None:
            raise UserError(
                f"{self.run.folder}/reference.json: is missing or of other adapters, expected what their export writes; "
                f"run `make export-adapters RUN={self.run.name} ARGS=--replace` first"
            )
        return found

    @cached_property
    def reference(self) -> Reference:
        """Plain PEFT with these adapters on this base."""
        if self.base_kind == "nf4" and len(self.adapters) == 1 and self.order.weight == 1:
            return Reference("plain PEFT's", self.known["held_out_loss"], self.known["answers"])
        model = self.nf4 if self.base_kind == "nf4" else self.base.folder
        if self.base_kind == "bf16" and not fits_in_memory(model, getattr(torch, self.dtype)):
            return self._far_reference()
        say(f"reference: plain PEFT with the same adapters on the {self.base_kind} base, in a fresh process")
        found = ask(Tool("plain PEFT", model, self.run.adapters, self.dtype, self.adapters), self.texts)
        return Reference(f"plain PEFT's on the {self.base_kind} base", found.loss, found.answers)

    def _far_reference(self) -> Reference:
        """PEFT cannot load a base that is larger than memory. What the adapters gave on the NF4 base is near."""
        if len(self.adapters) > 1 or self.order.weight != 1:
            raise UserError(
                f"--with and --weight: {self.base.folder} has no room in memory, so plain PEFT cannot say what they should "
                "give on it; use --base nf4"
            )
        what = "plain PEFT's on the NF4 base, as the bf16 one is larger than memory,"
        return Reference(what, self.known["held_out_loss"], self.known["answers"], FAR)

    @cached_property
    def untuned(self) -> Reference:
        say("reference: the base without adapters in plain transformers, in a fresh process")
        found = ask(Tool("plain transformers", self.nf4, self.run.adapters, self.dtype), self.texts)
        return Reference("plain transformers'", found.loss, found.answers)

    # --- what it is made of -------------------------------------------------------------------------------

    @property
    def base_kind(self) -> str:
        return "nf4" if self.order.base == "nf4" else "bf16"

    @cached_property
    def base(self) -> Base:
        if self.base_kind == "nf4":
            return Dequantised(self.nf4)
        source = Stored(self._bf16_folder())
        say(f"comparing {source.folder} with the NF4 model that the run was trained on")
        check_base(source, self.nf4)
        return source

    def _bf16_folder(self) -> Path:
        """Raises UserError where the unquantised base is nowhere."""
        if self.order.base != "bf16":
            folder = Path(self.order.base)
            if not folder.is_dir():
                raise UserError(
                    f"--base {self.order.base}: no such folder, expected nf4, bf16 or an unquantised checkpoint"
                )
            check_folder(folder)
            _require_unquantised(folder)
            return folder
        settings = self.run.settings()
        model_id = str(settings.model.id)
        local = model_id == "demo" or Path(model_id).is_dir()
        if not local:
            if model_id.startswith(("/", ".", "~")):
                raise UserError(
                    f"--base bf16: {model_id} is gone, expected the unquantised base; name it with --base FOLDER"
                )
            require_network(
                f"--base bf16: {model_id} is fetched from the model hub", "use RUNTIME=host, or --base FOLDER"
            )
        recorded = self.nf4 / RECORD
        commit = read_json(recorded)["source"].get("commit") if recorded.exists() else None
        if commit:
            settings = replace(settings, model=replace(settings.model, revision=commit))
        source = find_source(settings, keep=True).complete()
        _require_unquantised(source.folder)
        return source.folder

    def _adapters(self, run: Run, weight: float) -> Weighted:
        """Raises UserError where a run's adapters are not there, were changed, or belong to another model."""
        proof = run.adapters / "export.json"
        if not proof.exists():
            raise UserError(
                f"RUN={run.name}: has no exported adapters; run `make export-adapters RUN={run.name}` first"
            )
        for name, digest in read_json(proof)["sha256"].items():
            if name != "README.md" and not _is(run.adapters / name, digest):
                raise UserError(
                    f"{run.adapters / name}: is not the verified one (its hash differs); "
                    f"run `make export-adapters RUN={run.name} ARGS=--replace`"
                )
        other = read_json(run.manifest)["model"]
        if (
            other["sha256"] != self.manifest["model"]["sha256"]
            or other["name"] != self.manifest["model"]["name"]
        ):
            raise UserError(
                f"--with {run.name}: was trained on {other['name']}, expected adapters of the same model as "
                f"RUN={self.run.name} ({self.manifest['model']['name']})"
            )
        return Weighted(run.adapters, weight)

    def _check_model(self) -> None:
        """Raises UserError where the NF4 model is another than the one trained on, as far as its record tells."""
        from recipe.prepare import Prepared

        model = self.manifest["model"]
        now = Prepared(self.nf4, model["name"], model["revision"], fresh=False).hashes
        changed = sorted(name for name, digest in model["sha256"].items() if now.get(name) != digest)
        if now and changed:
            raise UserError(
                f"{self.nf4}: {changed[0]} is another than RUN={self.run.name} was trained on (its hash differs); bring the "
                "old model back, or train again"
            )


FAR = 0.1  # nats of held-out loss between the two bases, at most: 0.015 in the demo; a lost half of the adapters is far more
EQUAL_GAP = 1e-3  # nats; below it two ways of computing in fp32 may choose either
WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)


@dataclass(frozen=True)
class Made:
    """What was written: how to load it, as what it counts in LOSS_BOUND, and what there is to say of it."""

    tool: Tool
    type: str
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    adapted: bool = True


@dataclass(frozen=True)
class Reference:
    """What an export is compared with; `what`: as a message names its owner."""

    what: str
    loss: float | None
    answers: list[list[int]]
    slack: float = 0.0  # nats that its loss may be off by, for what it is


def gguf_file(folder: Path) -> Path:
    """The model in a GGUF export."""
    return next(folder.glob("*.gguf"))


def _is(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_of(path) == sha256


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """The hidden folder in which an export is made. A stopped one stays, to be gone on with; a failed one goes."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        yield partial
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, folder)


def _existing(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), **read_json(folder / "export.json")}


def _exists(folder: Path) -> UserError:
    return UserError(f"{folder}: exists already, expected a new export; --replace makes it anew")


def _require_unquantised(folder: Path) -> None:
    if "quantization_config" in read_config(folder / "config.json"):
        raise UserError(
            f"--base {folder}: is quantised, expected the 16-bit checkpoint; --base nf4 merges into the NF4 one"
        )


def _fallback_notes(fallbacks: list[Any]) -> tuple[str, ...]:
    from recipe.export.gguf_types import summary

    return tuple(summary(fallbacks))
