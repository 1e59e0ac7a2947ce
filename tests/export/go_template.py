"""The few constructs of Go's text/template that our Modelfiles use, evaluated strictly: anything else is an error.

Held against Go 1.19's own text/template on every case of test_ollama.py.
"""

from __future__ import annotations

import re

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
RANGE, LAST = "range $i, $_ := .Messages", "$last := eq (len (slice $.Messages $i)) 1"


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """As Ollama calls it: .System is all system messages, .Messages all of them in their order."""
    pieces = ACTION.split(template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    nodes, rest = _parse(pieces, 0, ())
    assert rest == len(pieces)
    return _run(nodes, {"system": system, "messages": messages, "dot": None, "last": None})


def _parse(pieces: list[str], at: int, ends: tuple[str, ...]):
    """Nodes until an action of `ends`: texts, and (action, nodes, nodes of else)."""
    nodes = []
    while at < len(pieces):
        if at % 2 == 0:
            assert "{{" not in pieces[at] and "}}" not in pieces[at]
            nodes.append(pieces[at])
        elif pieces[at] in ends or (pieces[at].startswith("else if ") and "else" in ends):
            return nodes, at
        elif pieces[at].startswith(("if ", "range ")):
            node, at = _branch(pieces, at, pieces[at])
            nodes.append(node)
        else:
            nodes.append((pieces[at],))
        at += 1
    assert not ends, "an end is missing"
    return nodes, at


def _branch(pieces: list[str], at: int, action: str):
    body, at = _parse(pieces, at + 1, ("else", "end"))
    otherwise = []
    if pieces[at].startswith("else if "):
        node, at = _branch(pieces, at, pieces[at].removeprefix("else "))
        otherwise = [node]
    elif pieces[at] == "else":
        otherwise, at = _parse(pieces, at + 1, ("end",))
    return (action, body, otherwise), at


def _run(nodes, scope) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == RANGE:
            for number, message in enumerate(scope["messages"]):
                text += _run(node[1], {**scope, "dot": message, "index": number})
        elif node[0].startswith("if "):
            text += _run(node[1] if _true(node[0][3:], scope) else node[2], scope)
        elif node[0] == LAST:
            scope["last"] = len(scope["messages"][scope["index"] :]) == 1
        else:
            text += _value(node[0], scope)
    return text


def _value(expression: str, scope) -> str:
    if expression == "$.System" or (expression == ".System" and scope["dot"] is None):
        return scope["system"]
    assert expression == ".Content" and scope["dot"] is not None, expression
    return scope["dot"]["content"]


def _true(expression: str, scope) -> bool:
    if role := re.fullmatch('eq .Role "(\\w+)"', expression):
        return scope["dot"]["role"] == role[1]
    last = scope["last"]
    if expression == "$last":
        return last
    if expression == "not $last":
        return not last
    if expression == "and $last $.System":
        return last and bool(scope["system"])
    return bool(_value(expression, scope))
