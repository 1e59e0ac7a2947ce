"""`recipe data show|check|stats`: results on standard output, 1 where the check finds an error."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from recipe.data import check, stats
from recipe.data.encode import IGNORED, load_tokenizer
from recipe.data.prepare import prepared
from recipe.data.rows import SIDES, training_rows
from recipe.data.show import marked
from recipe.data.tokenise import documents_of
from recipe.errors import UserError
from recipe.settings import Settings


def data(what: str, settings: Settings, model: Path, rows: int, as_json: bool) -> int:
    """`model` is the prepared model's folder, whose tokenizer is used."""
    if rows < 1:
        raise UserError(f"--rows is {rows}, expected at least 1")
    there = (model / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(model, settings.data, settings.lora.new_tokens) if there else None
    if what == "check":
        return _check(settings, tokenizer, model, as_json)
    if tokenizer is None:
        raise UserError(f"data {what}: there is no tokenizer in {model} yet; run `make prepare` first")
    if what == "show":
        _show(settings, tokenizer, rows, as_json)
    else:
        found = _stats(settings, tokenizer, model)
        print(_json(found) if as_json else stats.render(found))
    return 0


def _show(settings: Settings, tokenizer: PreTrainedTokenizerBase, count: int, as_json: bool) -> None:
    shown: list[dict[str, Any]] = []
    color = sys.stdout.isatty()
    for row in islice(training_rows(settings.data), count):
        documents = list(chain(*documents_of(row, settings.data, settings.train.method, tokenizer)))
        for number, (ids, labels) in enumerate(documents):
            where = row.where
            if settings.train.method == "dpo":
                where += f": {SIDES[number]}"
            elif len(documents) > 1:
                where += f": document {number + 1}"
            learnt = [label != IGNORED for label in labels]
            if as_json:
                tokens = [tokenizer.decode([token]) for token in ids]
                shown.append({"where": where, "input_ids": ids, "tokens": tokens, "in_loss": learnt})
                continue
            over = " over data.max_length" if len(ids) > settings.data.max_length else ""
            print(f"{where} ({len(ids)} tokens{over}, {sum(learnt)} in the loss)")
            print(marked(ids, labels, tokenizer, color) + "\n")
    if as_json:
        print(_json(shown))
    elif not color:
        print("[[...]]: not in the loss")


def _check(settings: Settings, tokenizer: PreTrainedTokenizerBase | None, model: Path, as_json: bool) -> int:
    findings = check.of_rows(settings, tokenizer)
    usable = not any(finding.kind == "malformed" for finding in findings)
    if tokenizer is not None and usable:
        findings += check.of_tokens(settings, tokenizer, model, _stats(settings, tokenizer, model))
    findings.sort(key=lambda finding: finding.level != "error")
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        print(_json({"errors": errors, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        print(check.render(findings))
        if tokenizer is None:
            print("lengths and chat tokens were not looked at: no model is prepared yet", file=sys.stderr)
    return 1 if errors else 0


def _stats(settings: Settings, tokenizer: PreTrainedTokenizerBase, model: Path) -> dict[str, Any]:
    """Also of a set with overlong rows, which would stop a run."""
    if settings.data.overlong == "error":
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, overlong="drop"))
    with prepared(settings, tokenizer, model) as found:
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        return found.stats


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
