"""Checks of what the run reads: the prepared model, the data, the chat template. None reads everything."""

from __future__ import annotations

import json
from pathlib import Path

from recipe.preflight.check import Check, Context, judged

DATA_SUFFIXES = (".json", ".jsonl", ".txt", ".parquet", ".csv")


def model(context: Context) -> Check:
    """Is the NF4 checkpoint there? Its hashes are `prepare`'s business."""
    folder = context.prepared
    if folder is None or not folder.exists():
        where = f"{folder} is not there yet" if folder else "no folder named"
        return Check("model", "skip", f"{where}; `make prepare` makes it", "a prepared model")
    files = list(folder.glob("*.safetensors"))
    good = bool(files) and (folder / "config.json").is_file()
    found = (
        f"{folder}: {len(files)} weight file{'' if len(files) == 1 else 's'}"
        if good
        else f"{folder}: weights or config.json are missing"
    )
    return judged("model", good, found, "a prepared model", f"remove {folder} and run `make prepare` again")


def data(context: Context) -> Check:
    """A local file that begins with a JSON object. A hub data set is only looked at when training starts."""
    path = context.settings.data.path
    if path is None:
        return Check("data", "skip", "data.path is not set (DATA= sets it)", "rows to train on")
    if path == "demo":
        return Check("data", "ok", "the demo's own rows", "rows to train on")
    file = Path(path)
    if not file.exists() and file.suffix not in DATA_SUFFIXES and not path.startswith(("/", ".", "~")):
        return Check(
            "data", "skip", f"{path} is on the hub: looked at when training starts", "rows to train on"
        )
    problem = _problem_of(file)
    return judged("data", not problem, problem or f"{path} begins with a JSON object", "JSONL, one row per line",
                  "give a JSONL file with messages, prompt/completion or text in every row")  # fmt: skip


def chat_template(context: Context) -> Check:
    path = context.settings.data.chat_template
    if path is None:
        return Check(
            "chat template", "skip", "data.chat_template is not set: the tokenizer's own is used", ""
        )
    remedy = "correct data.chat_template, or leave it out for models that have a template"
    good = Path(path).is_file()
    return judged("chat template", good, path if good else f"{path}: no such file", "a Jinja file", remedy)


def _problem_of(file: Path) -> str | None:
    """What is wrong with the first line of a data file, or None."""
    try:
        with open(file, encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        row = json.loads(first) if first else None
    except OSError as error:
        return f"{file}: {(error.strerror or 'cannot be read').lower()}"
    except UnicodeDecodeError:
        return f"{file}: not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"{file}:1: not valid JSON ({error.msg})"
    if row is None:
        return f"{file}: is empty"
    return None if isinstance(row, dict) else f"{file}:1: is no JSON object"


CHECKS = [model, data, chat_template]
