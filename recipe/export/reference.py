"""What an export must give: the verified adapters' own loss and greedy answers, on the very tokens of the run.

`runs/NAME/reference.json` holds them, beside the exports and in none of them: its texts are the user's data.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe.data.encode import load_tokenizer
from recipe.errors import Refused
from recipe.export.evaluate import put_as_trained
from recipe.export.peftfolder import Weighted
from recipe.export.plain import Document, held_out_documents, prompts_and_answers
from recipe.export.scores import Score, mean_loss
from recipe.export.verify import answered
from recipe.files import read_json, sha256_of, write_json
from recipe.train.run import Run

PROMPTS = 10
MARK = "\ue000"  # in no text
NEW_TOKENS = 16  # each costs a pass over the model
# More than that is not scored again by every tool: a 70B model in llama.cpp on a CPU reads some ten tokens a second.
TOKENS = 4096
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "Name three colours.",
    "What is 12 plus 30?",
    "Explain in one sentence what a library is.",
    "Translate to German: good morning.",
    "What do bees make?",
    "Give a word that rhymes with light.",
    "Who wrote Hamlet?",
)


@dataclass(frozen=True)
class Texts:
    """What every tool is asked about. `some`: of the documents, which are all held-out rows, the first TOKENS tokens."""

    documents: list[Document]
    some: int
    prompts: list[list[int]]
    tokenised: list[tuple[str, list[int]]]
    chat_template: str | None

    def first(self, documents: int) -> Texts:
        return replace(self, documents=self.documents[:documents])


@dataclass(frozen=True)
class Found:
    """What a tool said, in a fresh process."""

    held_out: list[Score]
    answered: list[Score]
    answers: list[list[int]]
    different: list[str]
    tokenised_otherwise: str | None
    chat_template: str | None

    @property
    def loss(self) -> float | None:
        return mean_loss(self.held_out) if self.held_out else None


@dataclass(frozen=True)
class Tool:
    """One of the two that are not ours, and what it loads."""

    name: str  # "plain PEFT", "plain transformers", "llama.cpp"
    model: Path
    tokenizer: Path
    dtype: str = "float32"
    adapters: Sequence[Weighted] = ()
    lora: Path | None = None


def texts_of(run: Run) -> Texts:
    settings = run.settings()
    manifest = read_json(run.manifest)
    tokenizer = load_tokenizer(Path(manifest["model"]["folder"]), settings.data, settings.lora.new_tokens)
    documents = held_out_documents(run)
    prompts = [ids for ids, _ in prompts_and_answers(documents, tokenizer)[:PROMPTS]]
    if len(prompts) < PROMPTS:
        prompts += [put_as_trained(text, manifest["data"], tokenizer) for text in QUESTIONS[len(prompts) :]]
    asked = [tokenizer.decode(ids) for ids in prompts]
    ends = list(itertools.accumulate(len(ids) for ids, _ in documents))
    return Texts(
        documents=documents,
        some=max(1, sum(end <= TOKENS for end in ends)),
        prompts=prompts,
        tokenised=[(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in asked],
        chat_template=tokenizer.chat_template,
    )


def ask(tool: Tool, texts: Texts, answers: list[list[int]] | None = None) -> Found:
    """Let a fresh process load an export and score the texts.

    `answers`: those that were given before to the prompts, to be scored; None: let the tool (plain transformers) answer.
    Raises Refused with the last line of what it printed where it cannot load the export.
    """
    documents = list(texts.documents)
    if answers is not None:
        documents += [answered(ids, reply) for ids, reply in zip(texts.prompts, answers, strict=True)]
    request = {
        "tool": tool.name,
        "model": str(tool.model),
        "tokenizer": str(tool.tokenizer),
        "dtype": tool.dtype,
        "adapters": [[str(one.folder), one.weight] for one in tool.adapters],
        "lora": str(tool.lora) if tool.lora else None,
        "documents": documents,
        "prompts": texts.prompts if answers is None else [],
        "max_new_tokens": NEW_TOKENS,
        "texts": texts.tokenised,
    }
    found = in_fresh_process(request)
    scores = [Score(*score) for score in found.pop("scores")]
    held_out = len(texts.documents)
    return Found(held_out=scores[:held_out], answered=scores[held_out:], **found)


def other_texts(texts: Texts, found: Found) -> str | None:
    """What of the tokenizer has not travelled with an export, None where all has."""
    if found.chat_template != texts.chat_template:
        return f"its chat template is {'missing' if not found.chat_template else 'another than the one trained with'}"
    if found.tokenised_otherwise is not None:
        return f"its tokenizer makes other tokens of {found.tokenised_otherwise[:60]!r} than the one trained with"
    return None


def in_fresh_process(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        asked, said = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", "recipe.export.verify", str(asked), str(said)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Refused(f"{request['tool']} cannot load it ({last})")
        return read_json(said)


def keep(run: Run, adapters_sha256: str, texts: Texts, found: Found) -> None:
    """Write down what the verified adapters gave in plain PEFT."""
    some = found.held_out[: texts.some]
    reference = {
        "adapters_sha256": adapters_sha256,
        "documents": len(some),
        "held_out_loss": mean_loss(some) if some else None,
        "answers": found.answers,
    }
    write_json(_file(run), reference)


def kept(run: Run, adapters_sha256: str) -> dict[str, Any] | None:
    """What was written down of these adapters; None where there is nothing."""
    if not _file(run).exists():
        return None
    reference = read_json(_file(run))
    return reference if reference["adapters_sha256"] == adapters_sha256 else None


def expected(run: Run) -> list[tuple[str, str]]:
    """Questions as somebody types them, and the greedy answers, cut at NEW_TOKENS: for what puts them into a template itself.

    Prompts that are no single question after the training rows' system message are left out.
    """
    reference = kept(run, sha256_of(run.adapters / "adapter_model.safetensors"))
    if reference is None:
        return []
    settings, manifest = run.settings(), read_json(run.manifest)
    tokenizer = load_tokenizer(Path(manifest["model"]["folder"]), settings.data, settings.lora.new_tokens)
    before, after = tokenizer.decode(put_as_trained(MARK, manifest["data"], tokenizer)).split(MARK)
    found = []
    for ids, answer in zip(texts_of(run).prompts, reference["answers"], strict=True):
        prompt = tokenizer.decode(ids)
        if prompt.startswith(before) and prompt.endswith(after):
            question = prompt[len(before) : len(prompt) - len(after)]
            found.append((question, tokenizer.decode(answer, skip_special_tokens=True)))
    return found


def _file(run: Run) -> Path:
    return run.folder / "reference.json"
