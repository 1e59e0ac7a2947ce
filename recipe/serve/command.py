"""`recipe serve --run NAME` on the CPU: which files of the run's exports are served, and how the page puts questions."""

from __future__ import annotations

from pathlib import Path

from recipe.errors import UserError
from recipe.export import reference, targets
from recipe.export.gguf_types import KINDS
from recipe.files import read_json
from recipe.serve import server
from recipe.serve.llama import Files
from recipe.train.run import Run

TYPE = "q8_0"


def serve_run(run: Run, port: int, kind: str = TYPE) -> None:
    """Make the GGUF exports that are not there yet, then serve them until Ctrl-C."""
    if not run.finished:
        raise UserError(f"RUN={run.name}: is not finished; go on with `make train RUN={run.name}` first")
    if kind not in KINDS:
        raise UserError(f"--type {kind}: unknown quantisation, expected one of {', '.join(KINDS)}")
    server.require_possible(port)
    model = read_json(run.manifest)["model"]
    form = read_json(run.manifest)["data"]
    files = exported(run, kind)
    server.serve(
        files,
        run.name,
        port,
        reference.expected(run),
        {"messages": bool(form["messages"]), "system": form["system"]},
        context_tokens(Path(model["folder"])),
    )


def exported(run: Run, kind: str) -> Files:
    """The base and the LoRA; where the run has learnt new tokens, which a LoRA cannot hold, the base and a merged model."""
    whole = bool(run.settings().lora.new_tokens)
    order = targets.Order(
        gguf=kind if whole else None, gguf_lora=not whole, gguf_base=whole, base_gguf=kind, reuse=True
    )
    targets.export(run, order)
    exports = run.folder / "exports"
    base = targets.gguf_file(exports / f"gguf-base-{kind}")
    if whole:
        return Files(base, tuned=targets.gguf_file(exports / f"gguf-{kind}"))
    return Files(base, lora=targets.gguf_file(exports / "gguf-lora"))


def context_tokens(model: Path) -> int:
    """What the model was made for, but not so much that its KV cache takes more memory than the model."""
    config = model / "config.json"
    most = read_json(config).get("max_position_embeddings") if config.exists() else None
    return min(most or server.CONTEXT_TOKENS, server.CONTEXT_TOKENS)
