"""`recipe eval`: what training has changed, on held-out rows: loss, perplexity, exact matches and answers to look at."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recipe.engine.devices import compute_dtype
from recipe.errors import UserError
from recipe.export.plain import (
    adapters_off,
    answers,
    finished_checkpoint,
    held_out_documents,
    load_plain,
    mean_loss,
    pad_token,
    prompts_and_answers,
)
from recipe.files import read_json, write_json
from recipe.train.data import load_tokenizer
from recipe.train.run import Run


def load_run(run: Run):
    """The plain model of a finished run with its exported adapters, and its tokenizer."""
    finished_checkpoint(run)
    if not (run.adapters / "adapter_model.safetensors").exists():
        raise UserError(
            f"RUN={run.name}: has no exported adapters; run `make export-adapters RUN={run.name}` first"
        )
    settings = run.settings()
    model_folder = Path(read_json(run.manifest)["model"]["folder"])
    if not model_folder.exists():
        raise UserError(
            f"RUN={run.name}: its model {model_folder} is gone; run `make prepare CONFIG={run.config}`"
        )
    model = load_plain(model_folder, compute_dtype(settings), run.adapters)
    return model, load_tokenizer(model_folder, settings.data)


def evaluate(run: Run, samples: int | None = None) -> dict[str, Any]:
    """Base and tuned model side by side; written to `eval.json` in the run's folder too."""
    finished_checkpoint(run)
    documents = held_out_documents(run)
    if not documents:
        raise UserError(
            f"RUN={run.name}: has no held-out rows; set data.eval_path or data.eval_fraction and train again"
        )
    model, tokenizer = load_run(run)
    settings = run.settings().eval
    shown = settings.samples if samples is None else samples
    pairs = prompts_and_answers(documents, tokenizer)[: max(shown, settings.exact_match)]
    prompts = [prompt for prompt, _ in pairs]
    report: dict[str, Any] = {"run": run.name, "held_out_rows": len(documents)}
    given: dict[str, list[str]] = {}
    for name, off in (("base", True), ("tuned", False)):
        with adapters_off(model, off), torch.inference_mode():
            loss = mean_loss(model, documents, pad_token(tokenizer), settings.batch_size)
            stream = answers(model, prompts, tokenizer, settings.max_new_tokens, settings.batch_size)
            given[name] = list(
                tqdm(
                    stream,
                    total=len(prompts),
                    desc=f"answers, {name}",
                    leave=False,
                    unit="answer",
                    disable=not sys.stderr.isatty(),
                )
            )
        counted = list(zip(pairs, given[name], strict=True))[: settings.exact_match]
        report[name] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "exact_matches": sum(answer == reference for (_, reference), answer in counted),
            "prompts": len(counted),
        }
    report["samples"] = [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "reference": reference,
            "base": given["base"][i],
            "tuned": given["tuned"][i],
        }
        for i, (prompt, reference) in enumerate(pairs[:shown])
    ]
    write_json(run.folder / "eval.json", report)
    return report


def render(report: dict[str, Any]) -> str:
    lines = [f"{report['held_out_rows']} held-out rows      before       after"]
    for key, label in (("loss", "loss"), ("perplexity", "perplexity")):
        lines.append(f"{label:<20}{report['base'][key]:>12.4f}{report['tuned'][key]:>12.4f}")
    if report["base"]["prompts"]:
        count = report["base"]["prompts"]
        lines.append(
            f"{'exact answers':<20}{report['base']['exact_matches']:>5} of {count:<4}"
            f"{report['tuned']['exact_matches']:>5} of {count}"
        )
    for sample in report["samples"]:
        question = sample["prompt"].strip().splitlines()
        asked = " ".join(line for line in question if line not in ("system", "user", "assistant"))
        lines += [
            "",
            f"  asked      {_short(asked, tail=True)}",
            f"  expected   {_short(sample['reference'])}",
            f"  before     {_short(sample['base'])}",
            f"  after      {_short(sample['tuned'])}",
        ]
    return "\n".join(lines)


def _short(text: str, width: int = 85, tail: bool = False) -> str:
    """One line of a text; `tail` keeps its end, where the question stands behind the system prompt."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if tail else text[: width - 1] + "…"
