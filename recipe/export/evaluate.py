"""`recipe eval`: what training has changed: held-out loss, perplexity, exact answers, task scores, answers to look at."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from recipe.data.chat import render as render_chat
from recipe.data.encode import load_tokenizer
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
from recipe.export.spread import Work
from recipe.export.tasks import find, scores
from recipe.files import read_json, write_json, write_text
from recipe.settings import Eval
from recipe.train.heldout import perplexity
from recipe.train.run import Run


def load_run(run: Run, work: Work | None = None):
    """The plain model of a finished run with its exported adapters, and its tokenizer; work: as load_plain's."""
    folder = model_folder(run)
    settings = run.settings()
    tokenizer = load_tokenizer(folder, settings.data, settings.lora.new_tokens)
    return load_plain(folder, compute_dtype(settings), run.adapters, work), tokenizer


def model_folder(run: Run) -> Path:
    """Where the plain model of a finished and exported run lies. Raises UserError where something is missing."""
    finished_checkpoint(run)
    if not (run.adapters / "adapter_model.safetensors").exists():
        raise UserError(
            f"RUN={run.name}: has no exported adapters; run `make export-adapters RUN={run.name}` first"
        )
    folder = Path(read_json(run.manifest)["model"]["folder"])
    if not folder.exists():
        raise UserError(f"RUN={run.name}: its model {folder} is gone; run `make prepare CONFIG={run.config}`")
    return folder


def evaluate(
    run: Run,
    samples: int | None = None,
    task_names: list[str] | None = None,
    task_rows: int | None = None,
) -> dict[str, Any]:
    """Base and tuned model side by side; written to `eval.json` and `samples.jsonl` in the run's folder too.

    With the adapters off the model is the one before training, since they began as nothing: its answers are those of
    step 0. So nothing of this has to be done while training runs, and nothing of it can change that.
    """
    finished_checkpoint(run)
    documents = held_out_documents(run)
    if not documents:
        raise UserError(
            f"RUN={run.name}: has no held-out rows; set data.eval_path or data.eval_fraction and train again"
        )
    whole = run.settings()
    settings = whole.eval
    tokenizer = load_tokenizer(model_folder(run), whole.data, whole.lora.new_tokens)
    pairs = prompts_and_answers(documents, tokenizer)
    task_names = settings.tasks if task_names is None else task_names
    asked = [(tokenizer.decode(prompt), answer) for prompt, answer in pairs] if task_names else []
    task_rows = settings.task_rows if task_rows is None else task_rows
    tasks = find(task_names, asked, task_rows) if task_names else None
    shown = shown_prompts(run, tokenizer, pairs, samples)
    prompts = [prompt for prompt, _ in pairs[: settings.exact_match]] + [one.ids for one in shown]
    model, _ = load_run(run, Work.of(prompts, documents, settings.max_new_tokens, settings.batch_size))
    report: dict[str, Any] = {"run": run.name, "held_out_rows": len(documents)}
    given: dict[str, list[str]] = {}
    for name, off in (("base", True), ("tuned", False)):
        started = time.perf_counter()
        with adapters_off(model, off), torch.inference_mode():
            loss = mean_loss(model, documents, pad_token(tokenizer), settings.batch_size)
            # A prompt may be both counted and shown.
            given[name] = _answers(model, prompts, tokenizer, settings, f"answers, {name}")
            found = scores(model, tokenizer, tasks, settings.batch_size) if tasks else {}
        counted = list(zip(pairs[: settings.exact_match], given[name], strict=False))
        report[name] = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "exact_matches": sum(answer == reference for (_, reference), answer in counted),
            "prompts": len(counted),
            "tasks": found,
            "seconds": round(time.perf_counter() - started, 1),
        }
    report["samples"] = [
        {
            "prompt": one.text,
            "reference": one.reference,
            **{name: given[name][len(given[name]) - len(shown) + i] for name in given},
        }
        for i, one in enumerate(shown)
    ]
    write_json(run.folder / "eval.json", report)
    write_samples(run, report["samples"])
    return report


@dataclass(frozen=True)
class Shown:
    """A prompt that is answered in full. `reference`: the held-out row's own answer; a fixed prompt has none."""

    text: str
    ids: list[int]
    reference: str | None


def shown_prompts(
    run: Run, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[int], str]], count: int | None
) -> list[Shown]:
    """`eval.prompts`, put as the training rows put theirs, or else the first held-out ones."""
    settings = run.settings().eval
    if not settings.prompts:
        first = pairs[: settings.samples if count is None else count]
        return [Shown(tokenizer.decode(ids, skip_special_tokens=True), ids, answer) for ids, answer in first]
    form = read_json(run.manifest)["data"]
    return [Shown(text, put_as_trained(text, form, tokenizer), None) for text in settings.prompts[:count]]


def put_as_trained(text: str, form: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a question, put as the training rows put theirs. `form`: the manifest's `data`."""
    if not form["messages"]:
        return tokenizer(text)["input_ids"]
    opening = [{"role": "system", "content": form["system"]}] if form["system"] else []
    whole = render_chat([*opening, {"role": "user", "content": text}], tokenizer, "eval.prompts", True)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def write_samples(run: Run, samples: list[dict[str, Any]]) -> None:
    """`samples.jsonl`: what was answered before training (step 0) and after it."""
    ended = read_json(run.summary)["steps"]
    lines = [
        {"step": step, "prompt": one["prompt"], "reference": one["reference"], "answer": one[name]}
        for step, name in ((0, "base"), (ended, "tuned"))
        for one in samples
    ]
    write_text(
        run.folder / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )


def _answers(
    model, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, settings: Eval, what: str
) -> list[str]:
    """An answer for each prompt; the same one is asked once."""
    different = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    stream = answers(model, different, tokenizer, settings.max_new_tokens, settings.batch_size)
    bar = tqdm(
        stream, total=len(different), desc=what, leave=False, unit="answer", disable=not sys.stderr.isatty()
    )
    found = dict(zip(map(tuple, different), bar, strict=True))
    return [found[tuple(ids)] for ids in prompts]


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
    for task, metrics in report["base"]["tasks"].items():
        for key in (key for key in metrics if key != "rows"):
            after = report["tuned"]["tasks"][task][key]
            lines.append(f"{_short(f'{task}, {key}', 20):<20}{metrics[key]:>12.4f}{after:>12.4f}")
    for sample in report["samples"]:
        question = sample["prompt"].strip().splitlines()
        asked = " ".join(line for line in question if line not in ("system", "user", "assistant"))
        lines += [
            "",
            f"  asked      {_short(asked, tail=True)}",
            *([] if sample["reference"] is None else [f"  expected   {_short(sample['reference'])}"]),
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
