"""`recipe serve --run NAME` on the CPU: which files of the run's exports are served, and how the page puts questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipe.errors import UserError
from recipe.files import read_json
from recipe.serve import server
from recipe.serve.check import Expected
from recipe.serve.llama import Files
from recipe.train.run import Run

TYPE = "q8_0"


def serve_run(run: Run, port: int, kind: str = TYPE, expected: Sequence[Expected] = ()) -> None:
    """Serve the run's GGUF exports until Ctrl-C. Raises UserError where they are not there."""
    if not run.finished:
        raise UserError(f"RUN={run.name}: is not finished; go on with `make train RUN={run.name}` first")
    model = read_json(run.manifest)["model"]
    form = read_json(run.manifest)["data"]
    server.serve(
        exported(run, kind),
        run.name,
        port,
        expected,
        {"messages": bool(form["messages"]), "system": form["system"]},
        context_tokens(Path(model["folder"])),
    )


def exported(run: Run, kind: str) -> Files:
    """The base and the LoRA; where the run has learnt new tokens, which a LoRA cannot hold, the base and a merged model."""
    base = _gguf(run, f"gguf-base-{kind}", f"--gguf-lora --gguf {kind}")
    if run.settings().lora.new_tokens:
        return Files(base, tuned=_gguf(run, f"gguf-{kind}", f"--gguf {kind}"))
    return Files(base, lora=_gguf(run, "gguf-lora", "--gguf-lora"))


def context_tokens(model: Path) -> int:
    """What the model was made for, but not so much that its KV cache takes more memory than the model."""
    config = model / "config.json"
    most = read_json(config).get("max_position_embeddings") if config.exists() else None
    return min(most or server.CONTEXT_TOKENS, server.CONTEXT_TOKENS)


def _gguf(run: Run, export: str, options: str) -> Path:
    folder = run.folder / "exports" / export
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        what = "has no GGUF file" if not found else f"has {len(found)} GGUF files, expected one"
        raise UserError(f"{folder}: {what}; `recipe export --run {run.name} {options}` makes it")
    return found[0]
