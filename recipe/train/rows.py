"""Rows of a data set, read and checked: JSONL files with file and line in every error, or a hub data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.container import require_network
from recipe.errors import UserError
from recipe.settings import Data

ROLES = ("system", "user", "assistant", "tool")
SHAPES = "`messages`, `prompt` and `completion`, or `text`"
DEMO = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class Row:
    """One checked row and the place it came from, for messages about it."""

    values: dict[str, Any]
    where: str

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The conversation, where the row is one."""
        if "messages" in self.values:
            return self.values["messages"]
        if isinstance(self.values.get("prompt"), list):
            return self.values["prompt"] + self.values["completion"]
        return None


def read_training_rows(data: Data) -> list[Row]:
    """Rows of `data.path`. Raises UserError where it is missing, empty or malformed."""
    if data.path is None:
        raise UserError(
            "data.path is not set, expected a JSONL file, a hub id or `demo`; use DATA=file.jsonl"
        )
    return _read("data.path", data.path, data, DEMO / "train.jsonl")


def read_held_out_rows(data: Data) -> list[Row]:
    """The held-out rows, or none where a share of `data.path` is held out instead."""
    path = held_out_path(data)
    return [] if path is None else _read("data.eval_path", path, data, DEMO / "heldout.jsonl")


def held_out_path(data: Data) -> str | None:
    """`data.eval_path`; the demo's data brings held-out rows of its own."""
    return "demo" if data.eval_path is None and data.path == "demo" else data.eval_path


def _read(key: str, path: str, data: Data, demo_file: Path) -> list[Row]:
    if path == "demo":
        rows = list(_jsonl(demo_file))
    elif Path(path).is_dir():
        raise UserError(f"{key} is `{path}`: is a folder, expected a JSONL file")
    elif Path(path).exists():
        rows = list(_jsonl(Path(path)))
    elif (
        path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not path.endswith((".jsonl", ".json"))
    ):
        rows = list(_hub(key, path, data))
    else:
        raise UserError(
            f"{key} is `{path}`: no such file, expected a JSONL file, a hub id (org/name) or `demo`"
        )
    if not rows:
        raise UserError(f"{key} is `{path}`: has no rows, expected one JSON object per line")
    return rows


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{where}: not valid JSON ({error.msg}, column {error.colno}), expected one object per line"
                    ) from None
                yield checked(values, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}), expected JSONL in UTF-8") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; make it readable (chmod a+r {path})") from None


def _hub(key: str, path: str, data: Data) -> Iterator[Row]:
    use = "pass DATA=FILE" if key == "data.path" else f"set {key} to it"
    require_network(
        f"{key} is `{path}`: is no local file, so it would be fetched from the hub",
        f"download the data set to a JSONL file and {use}",
    )
    from datasets import load_dataset

    try:
        rows = load_dataset(path, split=data.split, revision=data.revision)
    except (
        Exception
    ) as error:  # the library raises a dozen kinds for: not found, no access, no network, no such split
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key} is `{path}`: is no local file, and the hub data set could not be loaded ({reason}); check the "
            "spelling, data.split, the network and HF_TOKEN"
        ) from None
    for number, values in enumerate(rows):
        yield checked(values, f"{path} row {number}")


def checked(values: Any, where: str) -> Row:
    """Raises UserError where the row has none of the known shapes."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: is {type(values).__name__}, expected a JSON object with {SHAPES}")
    if "messages" in values:
        _check_messages(values["messages"], where, "messages")
    elif "prompt" in values and "completion" in values:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            _check_messages(prompt + completion, where, "prompt + completion")
        else:
            for key in ("prompt", "completion"):
                _check_text(values[key], where, key, empty=key == "prompt")
    elif "text" in values:
        _check_text(values["text"], where, "text")
    else:
        raise UserError(f"{where}: has the keys {', '.join(map(str, values)) or '(none)'}, expected {SHAPES}")
    return Row(values, where)


def _check_text(value: Any, where: str, key: str, empty: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "empty" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{where}: {key} is {found}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} has half of a surrogate pair, expected Unicode text") from None


def _check_messages(messages: Any, where: str, key: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: {key} is {type(messages).__name__} without entries, expected a list of messages"
        )
    for number, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            _check_text(message["content"], where, f"{key}[{number}].content", empty=True)
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: {key}[{number}] has no text `content`, expected role and content")
        if message.get("role") not in ROLES:
            raise UserError(
                f"{where}: {key}[{number}] has the role `{message.get('role')}`, expected one of {', '.join(ROLES)}"
            )
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: {key} ends with the role `{messages[-1]['role']}`, expected assistant (the answer)"
        )
