"""A config's text: the values, and the line that each key stands on, for the messages."""

from __future__ import annotations

import re
from typing import Any

import yaml

from recipe.errors import UserError
from recipe.values import shown


def parse_yaml(text: str, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values, and for each dotted key the line that it stands on."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except Exception as error:  # its own, and whatever int(''), a date of month 13 or nesting too deep raise
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}{line}: not valid YAML ({problem}), expected `section:` and `  key: value`"
        ) from None
    if values is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: is {shown(values)}, expected sections such as `model:` and `train:`")
    lines: dict[str, int] = {}

    def walk(mapping: yaml.MappingNode, prefix: str) -> None:
        for key, value in mapping.value:
            name = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(
                    f"{path}:{line}: `{name}` is set twice (first on line {lines[name]}), expected once"
                )
            lines[name] = line
            if isinstance(value, yaml.MappingNode) and not prefix:
                walk(value, f"{name}.")

    walk(node, "")
    return values, lines


def parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]+\.[A-Za-z_0-9]+", key.strip()):
        raise UserError(f"--set {text}: expected section.key=value, such as train.steps=50")
    try:
        return key.strip(), yaml.safe_load(raw) if raw.strip() else None
    except Exception:  # as for a file
        raise UserError(f"--set {text}: the value is not valid YAML, expected section.key=value") from None
