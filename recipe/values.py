"""One value of a config: converted where that loses nothing, or refused in a line that says what was expected."""

from __future__ import annotations

import difflib
import math
import types
import typing
from typing import Any

from recipe.errors import UserError
from recipe.secret import looks_secret


def checked_value(key: str, value: Any, hint: Any, limits: Any, where: str) -> Any:
    """One value, converted where that loses nothing (1e-4 is text to YAML), or UserError."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    fail = UserError(f"{where}{key} is {shown(value)}, expected {expected(kinds, limits)}")
    if isinstance(value, (str, bool)) and value in limits.get("refused", {}):
        raise UserError(f"{fail}; {limits['refused'][value]}")
    if value is None:
        if type(None) in kinds:
            return None
        raise fail
    if dict[str, str] in kinds:
        return _mapping(key, value, limits, fail)
    if list[str] in kinds:
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise fail
        if not value and limits.get("choices"):
            raise fail
        for item in value:
            if limits.get("choices") and item not in limits["choices"]:
                raise UserError(
                    f"{where}{key} has {shown(item)}, expected some of {', '.join(limits['choices'])}"
                )
        if len(set(value)) != len(value):
            raise UserError(
                f"{where}{key} names {shown(max(value, key=value.count))} twice, expected each one once"
            )
        return list(value)
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise fail
    if isinstance(value, bool):
        raise fail
    if int in kinds or float in kinds:
        if isinstance(value, str) and value in limits.get("words", ()):
            return value
        number = number_of(value)
        if number is None or (int in kinds and float not in kinds and number != int(number)):
            raise fail
        if not (limits.get("low", -math.inf) <= number <= limits.get("high", math.inf)) or (
            "above" in limits and number <= limits["above"]
        ):
            raise fail
        return float(number) if float in kinds else int(number)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise fail
    if not _could_be_a_path(value):  # what is no choice is a name or a path
        raise UserError(f"{fail}; it is longer than any file's name, or has half a character")
    if looks_secret(key, value):  # not shown again, nor is the --set that it stood in
        raise UserError(
            f"{'' if where.startswith('--set') else where}{key} holds what looks like a token or a password, expected none in "
            "a config, which goes into the run's folder; put it into the environment or a file (docs/watching.md)"
        )
    if limits.get("choices") and value not in limits["choices"]:
        raise UserError(f"{fail}{suggest(value, limits['choices'])}")
    return value


def _mapping(key: str, value: Any, limits: Any, fail: UserError) -> dict[str, str]:
    """Names of ours, each with a text."""
    if not isinstance(value, dict):
        raise fail
    for name, text in value.items():
        if name not in limits["choices"]:
            raise UserError(f"{fail}; `{name}` is none of ours{suggest(str(name), limits['choices'])}")
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise UserError(f"{fail}; `{name}` is {shown(text)}, expected the name of a column")
    return dict(value)


def _could_be_a_path(text: str) -> bool:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return False
    return len(encoded) < 4096 and all(len(part) < 256 for part in encoded.split(b"/"))


def number_of(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return None
    try:
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None


def expected(kinds: set[Any], limits: Any) -> str:
    if dict[str, str] in kinds:
        return "a mapping of our names to columns, such as {prompt: question, completion: answer}"
    if list[str] in kinds:
        return f"a list of {', '.join(limits.get('choices', ['texts']))}"
    if bool in kinds:
        return "false" if True in limits.get("refused", {}) else "true or false"
    if limits.get("choices"):
        text = "one of " + ", ".join(limits["choices"])
    elif int in kinds or float in kinds:
        text = "a number" if float in kinds else "a whole number"
        low, high, above = (limits.get(name) for name in ("low", "high", "above"))
        if above is not None:
            text += f" above {above:g}"
        if low is not None and high is not None:
            text += f" from {low:g} to {high:,}"
        elif low is not None:
            text += f" of at least {low:g}"
        elif high is not None:
            text += f" and at most {high:g}"
        text += "".join(f" or `{word}`" for word in limits.get("words", ()))
    else:
        text = f"text: {limits['help']}"
    return text + (" or null" if type(None) in kinds else "")


def shown(value: Any) -> str:
    try:
        text = str(value).replace("\n", " ")
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        text = "a very long number"
    text = text if len(text) <= 40 else text[:37] + "..."
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"`{text.lower()}`"
    return f"{value:g}" if isinstance(value, float) else f"`{text}`"


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None


def suggest(word: str, known: list[str] | tuple[str, ...], section: str = "") -> str:
    near = nearest(word, known)
    prefix = f"{section}." if section else ""
    return f"; did you mean `{prefix}{near}`?" if near else f"; known: {', '.join(known)}"
