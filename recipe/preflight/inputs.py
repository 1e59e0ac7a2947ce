"""Checks of what the run reads: the prepared model, its hashes, tokenizer and template, the data; token and hub for what lacks."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from recipe.data.read import raw_rows
from recipe.data.rows import row_of
from recipe.data.sources import is_hub_id, training_origins
from recipe.errors import UserError
from recipe.preflight.check import Check, Context, judged, not_measured, told
from recipe.preflight.measured import QUICK
from recipe.prepare import RECORD
from recipe.probe import token_file

HUB_SECONDS = 5
HUB = "https://huggingface.co"
HEADER_PREFIX = 8
# Above this share the run loses much of its data, or stops, as data.overlong says.
MANY_OVERLONG = 0.05


def model(context: Context) -> Check:
    """Is the NF4 checkpoint there, each file of the recorded size and as long as its own header says?"""
    folder = context.prepared
    expected = "a prepared model, or none yet"
    if folder is None or not folder.exists():
        where = f"{folder} is not there yet" if folder else "no folder named"
        return Check("model", "skip", f"{where}; `make prepare` makes it", expected)
    files = sorted(folder.glob("*.safetensors"))
    remedy = f"remove {folder} and run `make prepare` again"
    if not files or not (folder / "config.json").is_file():
        return Check("model", "fail", f"{folder}: weights or config.json are missing", expected, remedy)
    problem = _sizes_problem(folder) or next(filter(None, map(_header_problem, files)), None)
    gib = sum(file.stat().st_size for file in files) / 2**30
    found = problem or f"{folder}: {len(files)} weight file{'' if len(files) == 1 else 's'}, {gib:.2f} GiB"
    return judged("model", not problem, found, "a prepared model", remedy, measured=gib, unit="GiB")


def hashes(context: Context) -> Check:
    """As many files as a few seconds allow; each slice is checked again when training reads it."""
    expected = "the hashes that `prepare` recorded"
    if answer := not_measured(
        "model hashes", context.reading, expected, "run preflight again; look at `dmesg`"
    ):
        return answer
    found = context.reading.get("hashes")
    if not found or not found["files"]:
        why = "no prepared model" if not found else f"no {RECORD}: quantised elsewhere"
        return Check("model hashes", "skip", why, expected)
    text = f"{found['verified']} of {found['files']} files verified"
    text += "" if found["verified"] == found["files"] else " in the time allowed"
    if found["wrong"]:
        text = f"{', '.join(found['wrong'][:3])}: another content than recorded; {text}"
    remedy = f"the disk or RAM damaged it: remove {context.prepared} and run `make prepare` again"
    return judged(
        "model hashes", not found["wrong"], text, expected, remedy, measured=found["verified"], unit="files"
    )


def tokenizer(context: Context) -> Check:
    """The prepared model's tokenizer loads, and its chat template renders a row of the data."""
    expected = "loads, and renders a conversation of the data"
    remedy = "set data.chat_template, use an Instruct model, or `make prepare` again where files are damaged"
    if answer := not_measured("tokenizer", context.reading, expected):
        return answer
    found = context.reading.get("tokenizer")
    if found is None:
        return Check("tokenizer", "skip", "no prepared model", expected)
    if problem := found.get("problem"):
        return Check("tokenizer", "fail", problem, expected, remedy)
    text = (
        f"renders {found['characters']} characters" if found["template"] else "loads; it has no chat template"
    )
    return Check("tokenizer", "ok", text, expected)


def chat_template(context: Context) -> Check:
    """A template of the user's own, where data.chat_template names one."""
    path = context.settings.data.chat_template
    expected = "a Jinja file, or the tokenizer's own"
    if path is None:
        return Check(
            "chat template", "skip", "data.chat_template is not set: the tokenizer's own is used", expected
        )
    remedy = "correct data.chat_template, or leave it out for models that have a template"
    good = Path(path).is_file()
    return judged("chat template", good, path if good else f"{path}: no such file", expected, remedy)


def data(context: Context) -> Check:
    """All rows of local files; with --quick the first of each. A hub data set is only looked at when training starts."""
    settings = context.settings.data
    path = ", ".join(source.path or "" for source in settings.sources) or settings.path
    expected = "rows of a known shape"
    remedy = "give a JSONL, JSON, Parquet or CSV file with messages, prompt/completion or text in every row"
    if path is None:
        return Check("data", "skip", "data.path is not set (DATA= sets it)", expected)
    try:
        origins = training_origins(settings)
        if any(not origin.files for origin in origins):
            return Check("data", "skip", f"{path} is on the hub: looked at when training starts", expected)
        for origin in origins:
            if path != "demo":
                row_of(next(raw_rows(origin)), origin.columns)
    except UserError as error:
        return Check("data", "fail", str(error), expected, remedy)
    if "skipped" in context.reading:
        found = "the demo's own rows" if path == "demo" else f"{path} begins with a good row"
        return Check("data", "ok", f"{found}; the rest {QUICK}", expected)
    if "rows" not in context.reading:
        return Check("data", "warn", f"{path}: {context.reading.get('error', 'not read')}", expected,
                     "training reads it in full before its first step: a large file takes its time")  # fmt: skip
    rows = context.reading["rows"]
    if problem := rows.get("problem"):
        return Check("data", "fail", problem, expected, remedy)
    count = rows["count"]
    return Check(
        "data", "ok", f"{count} rows of {path} read, {rows['held_out']} held out", expected, "", count, "rows"
    )


def lengths(context: Context) -> Check:
    """The share of rows over data.max_length, in a sample from the whole file."""
    settings = context.settings.data
    expected = f"at most {MANY_OVERLONG:.0%} of the rows over {settings.max_length} tokens"
    if answer := not_measured("row lengths", context.reading, expected):
        return answer
    found = context.reading.get("lengths")
    if found is None:
        return Check("row lengths", "skip", "no rows were read", expected)
    share = found["over"] / found["sample"]
    text = f"{share:.0%} over, mean {found['mean']:.0f}, longest {found['longest']:.0f} ({found['sample']} rows, {found['by']})"
    remedy = f"raise data.max_length, or shorten the rows; data.overlong is `{settings.overlong}`"
    # One is enough to stop a run, unless the lengths are only an estimate.
    exact_stop = settings.overlong == "error" and found["by"] == "the tokenizer"
    good = not found["over"] if exact_stop else share <= MANY_OVERLONG
    return judged(
        "row lengths", good, text, expected, remedy, "fail" if exact_stop else "warn", share, "share"
    )


def token(context: Context) -> Check:
    """Only whether there is one: it is never read here, nor shown."""
    expected = "a token, where a gated model must be fetched"
    if not _model_to_fetch(context):
        return Check("hub token", "skip", "not needed: no model has to be fetched", expected)
    there = (
        bool(os.environ.get("HF_TOKEN")) or token_file() is not None or bool(told(context, "hub_token")[0])
    )
    remedy = "`hf auth login`, or set HF_TOKEN; gated models such as Llama are refused without one"
    return judged("hub token", there, "present" if there else "none", expected, remedy, "warn")


def hub(context: Context) -> Check:
    """The model hub answers, where the model or the data must come from it."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    expected = f"an answer within {HUB_SECONDS} s, where something must be fetched"
    if not (_model_to_fetch(context) or _on_hub(context)):
        return Check("hub", "skip", "not needed: nothing has to be fetched", expected)
    if os.environ.get("RECIPE_NETWORK") == "none":
        return Check("hub", "skip", "this container has no network, by design; `make prepare` has", expected)
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "yes", "on"):
        return Check("hub", "fail", "HF_HUB_OFFLINE is set", expected, "unset it, or put the model in place")
    if context.quick:
        return Check("hub", "skip", QUICK, expected)
    problem = _unreachable(endpoint)
    remedy = "check network and proxy (HTTPS_PROXY), or set HF_ENDPOINT to a mirror"
    return judged("hub", not problem, problem or "answers", expected, remedy)


def _unreachable(endpoint: str) -> str | None:
    """Why a HEAD request gets no answer, or None. Any answer counts: it is the way there that is tried."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"{endpoint.partition('@')[2] or endpoint}: {reason}"  # a name and password are not shown
    return None


def _model_to_fetch(context: Context) -> bool:
    name = context.settings.model.id or ""
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return on_hub and not (context.prepared and (context.prepared / "config.json").exists())


def _on_hub(context: Context) -> bool:
    data = context.settings.data
    paths = [source.path or "" for source in data.sources] or [data.path or "demo"]
    return any(is_hub_id(path) and not Path(path).exists() for path in paths)


def _sizes_problem(folder: Path) -> str | None:
    """The first file that is missing or has another size than `prepare` recorded."""
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
        for name, file in files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                return f"{path}: {found}, expected {file['bytes']} bytes"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{record}: is damaged"
    return None


def _header_problem(file: Path) -> str | None:
    """A safetensors file is as long as its header says; a copy that was cut short is not."""
    try:
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(HEADER_PREFIX), "little")
            size = file.stat().st_size
            if not 2 <= length <= size:
                return f"{file}: is no safetensors file"
            header = json.loads(content.read(length))
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"{file}: its header cannot be read"
    expected = HEADER_PREFIX + length + end
    return None if size == expected else f"{file}: has {size} bytes, its header says {expected}"


CHECKS = [model, hashes, tokenizer, chat_template, data, lengths, token, hub]
