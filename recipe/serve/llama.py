"""llama-server in this process: one for the base model and one for the tuned one, each on its own port of 127.0.0.1.

Two, although one could take the adapters as part of a request: it puts only requests with the same adapters into one
batch, and of two it finishes the first before the second gets a turn. Both map the same file, so that the weights are
in RAM once; only the KV cache is there twice.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.errors import UserError

BASE = "base"  # what clients call the model without the adapters


@dataclass(frozen=True)
class Files:
    """GGUF files. The tuned model is the base with a LoRA, or, where no LoRA can say what was trained, one of its own."""

    base: Path
    lora: Path | None = None
    tuned: Path | None = None


@dataclass(frozen=True)
class Model:
    name: str
    address: str
    key: str  # of this llama-server; nobody else on this machine is to use it past ours


@contextmanager
def models(files: Files, name: str, context_tokens: int, sequences: int) -> Iterator[list[Model]]:
    """The base and the tuned model, ready to be asked, `sequences` at a time each.

    Raises UserError where llama.cpp cannot load a file.
    """
    for path in (files.base, files.lora, files.tuned):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file, expected a GGUF; export it again")
    with ExitStack() as stack:
        base = _start(BASE, files.base, None, context_tokens, sequences)
        stack.callback(base.stop)
        tuned = _start(name, files.tuned or files.base, files.lora, context_tokens, sequences)
        stack.callback(tuned.stop)
        yield [base.model, tuned.model]


@dataclass
class _Started:
    model: Model
    server: Any

    def stop(self) -> None:
        self.server = None  # the last reference: its threads end


def _start(name: str, path: Path, lora: Path | None, context_tokens: int, sequences: int) -> _Started:
    import xllamacpp

    key = secrets.token_urlsafe()
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.model_alias = {name}  # what an answer says that it comes from
    if lora is not None:
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    asked.api_keys = [key]
    asked.n_parallel, asked.n_ctx = sequences, sequences * context_tokens
    asked.no_extra_bufts = (
        True  # else weights are repacked for this CPU: a copy of the model for each of the two
    )
    asked.cache_ram_mib = 0  # old conversations would fill up to 8 GiB
    asked.fit_params = False  # what is asked for, or an error
    asked.ui = asked.endpoint_slots = False
    asked.verbosity = 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    try:
        server = xllamacpp.Server(asked)
    except RuntimeError:
        what = f"{path} with {lora}" if lora else str(path)
        raise UserError(
            f"{what}: llama.cpp cannot load it, or memory is short; export it again, or take a smaller --type"
        ) from None
    return _Started(Model(name, server.listening_address, key), server)
