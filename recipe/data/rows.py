"""Rows of a data set, checked and brought into one of three shapes, with their place in every error.

`messages` (with `tools`, where there are any), `prompt` and `completion`, or `text`. Alpaca's and ShareGPT's columns
become messages; `columns` of a source renames what is called otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recipe.data.read import Raw, raw_rows
from recipe.data.sources import Origin, held_out_origins, training_origins
from recipe.errors import UserError
from recipe.settings import Data

SIDES = ("chosen", "rejected")  # of a pair that DPO learns from
ROLES = ("system", "user", "assistant", "tool")
SHAPES = "`messages`, `prompt` and `completion`, `text`, `chosen` and `rejected` (DPO), `instruction` and `output` (Alpaca), or `conversations` (ShareGPT)"
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Row:
    """One checked row and the place it came from, for messages about it."""

    values: dict[str, Any]
    where: str

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The conversation, where the row is one."""
        if "messages" in self.values:
            return self.values["messages"]
        if isinstance(self.values.get("prompt"), list) and "completion" in self.values:
            return self.values["prompt"] + self.values["completion"]
        if isinstance(self.values.get("chosen"), list):
            return [*(self.values.get("prompt") or []), *self.values["chosen"]]
        return None

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The functions that the conversation may call, for the chat template."""
        return self.values.get("tools") or None

    @property
    def text(self) -> str:
        """All that is said in it."""
        if self.messages is not None:
            return "\n".join(message.get("content") or "" for message in self.messages)
        found = [self.values.get(key) for key in ("prompt", "completion", "text", "chosen")]
        return "\n".join(text for text in found if isinstance(text, str))

    @property
    def chosen(self) -> bool:
        """Whether its messages say themselves which of them are to be learnt."""
        return any("weight" in message or "train" in message for message in self.messages or [])


def training_rows(data: Data) -> Iterator[Row]:
    """Rows of all training sources. Raises UserError where one is missing, empty or malformed."""
    return rows_of(training_origins(data))


def held_out_rows(data: Data) -> Iterator[Row]:
    """The held-out rows, or none where a share of the training rows is held out instead."""
    return rows_of(held_out_origins(data))


def rows_of(origins: list[Origin]) -> Iterator[Row]:
    for origin in origins:
        for raw in raw_rows(origin):
            yield row_of(raw, origin.columns)


def row_of(raw: Raw, columns: dict[str, str]) -> Row:
    where, values = raw
    return checked(_renamed(values, columns, where) if columns else values, where)


def _renamed(values: Any, columns: dict[str, str], where: str) -> Any:
    if not isinstance(values, dict):
        return values
    found = {}
    for ours, theirs in columns.items():
        if theirs not in values and ours not in ("input", "system", "tools"):  # those may be absent
            raise UserError(
                f"{where}: has no `{theirs}`, expected it for `{ours}` as `columns` says; it has "
                f"{', '.join(map(str, values)) or '(none)'}"
            )
        if theirs in values:
            found[ours] = values[theirs]
    return found


def checked(values: Any, where: str) -> Row:
    """Raises UserError where the row has none of the known shapes."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: is {type(values).__name__}, expected a JSON object with {SHAPES}")
    if "messages" in values:
        return Row(
            _with_tools({"messages": _messages(values["messages"], where, "messages")}, values, where), where
        )
    if all(side in values for side in SIDES):  # recipe.data.preference looks closer
        return Row({key: values[key] for key in ("prompt", *SIDES) if key in values}, where)
    if "prompt" in values and "completion" in values:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = _messages(prompt + completion, where, "prompt + completion")
            return Row(_with_tools({"messages": messages}, values, where), where)
        for key in ("prompt", "completion"):
            _check_text(values[key], where, key, empty=key == "prompt")
        return Row({"prompt": prompt, "completion": completion}, where)
    if "text" in values:
        _check_text(values["text"], where, "text")
        return Row({"text": values["text"]}, where)
    if "conversations" in values:
        return Row(_sharegpt(values, where), where)
    if "instruction" in values and "output" in values:
        return Row(_alpaca(values, where), where)
    raise UserError(f"{where}: has the keys {', '.join(map(str, values)) or '(none)'}, expected {SHAPES}")


def _alpaca(values: dict[str, Any], where: str) -> dict[str, Any]:
    _check_text(values["instruction"], where, "instruction")
    _check_text(values["output"], where, "output")
    extra = values.get("input") or ""
    _check_text(extra, where, "input", empty=True)
    question = values["instruction"] + (f"\n\n{extra}" if extra.strip() else "")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": values["output"]}]
    return {"messages": _after_system(values, turns, where)}


def _after_system(values: dict[str, Any], turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    system = values.get("system") or ""
    _check_text(system, where, "system", empty=True)
    return [{"role": "system", "content": system}, *turns] if system.strip() else turns


def _sharegpt(values: dict[str, Any], where: str) -> dict[str, Any]:
    turns = values["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: conversations is {_kind(turns)}, expected a list of `from` and `value`")
    messages = []
    for number, turn in enumerate(turns):
        place = f"conversations[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: {place} has no text `value`, expected `from` and `value`")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UserError(f"{where}: {place} is from `{speaker}`, expected one of {', '.join(SPEAKERS)}")
        message = {"role": SPEAKERS[speaker], "content": turn["value"]}
        if speaker == "function_call":
            call = _parsed(
                turn["value"], where, place, dict, "the call as a JSON object with name and arguments"
            )
            message = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            }
        messages.append(message | {key: turn[key] for key in ("weight", "train") if key in turn})
    messages = _messages(_after_system(values, messages, where), where, "conversations")
    return _with_tools({"messages": messages}, values, where)


def _with_tools(shape: dict[str, Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, where, "tools", list, "a list of functions as JSON")
    if not tools:
        return shape
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools is {_kind(tools)}, expected a list of functions, each a JSON object")
    return shape | {"tools": tools}


def _parsed(text: str, where: str, place: str, kind: type, expected: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {place} is not valid JSON, expected {expected}") from None
    if not isinstance(found, kind):
        raise UserError(f"{where}: {place} is {_kind(found)}, expected {expected}")
    return found


def _kind(value: Any) -> str:
    return "empty" if value in ("", [], {}) else type(value).__name__


def _check_text(value: Any, where: str, key: str, empty: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "empty" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{where}: {key} is {found}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} has half of a surrogate pair, expected Unicode text") from None


def _messages(messages: Any, where: str, key: str) -> list[dict[str, Any]]:
    """The conversation as a chat template takes it: `content` is text, the arguments of a call are an object."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: {key} is {type(messages).__name__} without entries, expected a list of messages"
        )
    found = [_message(message, where, f"{key}[{number}]") for number, message in enumerate(messages)]
    if found[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: {key} ends with the role `{found[-1]['role']}`, expected assistant (the answer)"
        )
    return found


def _message(message: Any, where: str, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: {place} has no text `content`, expected role and content")
    message = {name: value for name, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls") if role == "assistant" else None
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where}: {place} has no text `content`, expected role and content")
    _check_text(content, where, f"{place}.content", empty=True)
    if role not in ROLES:
        raise UserError(f"{where}: {place} has the role `{role}`, expected one of {', '.join(ROLES)}")
    found = message | {"content": content}
    found.pop("tool_calls", None)
    if calls:
        found["tool_calls"] = _calls(calls, where, f"{place}.tool_calls")
    _check_choice(message, where, place)
    return found


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _calls(calls: Any, where: str, place: str) -> list[dict[str, Any]]:
    """OpenAI's calls; its arguments are JSON in a text, which templates would quote once more."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: {place} is {_kind(calls)}, expected a list of calls")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: {place}[{number}] has no `function` with a `name`, expected a call")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, where, f"{place}[{number}] arguments", dict, "a JSON object")
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: {place}[{number}] arguments is {_kind(arguments)}, expected an object")
        rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
        found.append(
            {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def _check_choice(message: dict[str, Any], where: str, place: str) -> None:
    """`weight` (0 or 1) and `train` (true or false), which say whether a turn is to be learnt."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where}: {place}.weight is {weight!r:.40}, expected 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where}: {place}.train is {train!r:.40}, expected true or false")
    if (weight or train) and message["role"] != "assistant":
        raise UserError(
            f"{where}: {place} is to be learnt and has the role `{message['role']}`, expected assistant: a model learns answers"
        )


def is_learnt(message: dict[str, Any]) -> bool:
    """Whether an assistant's turn says nothing against being learnt."""
    return message.get("weight") != 0 and message.get("train") is not False
