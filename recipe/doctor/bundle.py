"""An archive for an issue report: what happened and on what, without data, tokens and the names of people and hosts.

What goes in is chosen, not what stays out: numbers and settings by their keys, logs line by line through `Cleaner`.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import socket
import tarfile
from pathlib import Path
from typing import Any

from recipe.doctor.case import Case
from recipe.doctor.scan import SHOWN_ROW
from recipe.errors import UserError
from recipe.secret import IN_ADDRESS, SECRET_NAME, TOKENS, secrets_in_environment

LOG_BYTES = 256 * 2**10  # of a log's beginning and of its end
HIDDEN = "[hidden]"
# Forms of secrets, wherever they stand.
SECRETS = (
    *TOKENS,
    re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"),
    re.compile(
        r"(?i)(token(?!s|iz)|secret|passw(or)?d|api_?key|access_?key|credential)[\w-]{,30}['\"]?\s{,4}[:=]\s{,4}['\"]?[^\s'\",;]{4,}"
    ),
    IN_ADDRESS,
    re.compile(r"(?<=\?)[^\s?'\"=]+=[^\s'\")>]+"),  # an address's query: signatures of downloads
    re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(\.[\w-]+)+"),
    re.compile(r"\b[0-9a-fA-F]{40,}\b"),
    re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b"),
)
HOMES = re.compile(r"/(home|Users)/[^/\s'\":]+|/root(?=/|\b)")
# A host as torchrun and torch's sockets name it, and rows of data.
HOSTS = re.compile(r"(?<=host      : )\S+|(?<=\()[\w.-]+(?=, \d{4,5}\))")
ROW = re.compile(
    rf"{SHOWN_ROW.pattern}|\[\[|<\|\w+\|>|['\"](messages|prompt|completion|content|text)['\"]\s*:"
)
PATHS = re.compile(r"(?<![\w/:.~-])(/[^/\s'\",:;()]+){4,}")
KEPT_PARTS = 3  # of a path: enough to find a line of a library
DATA_KEYS = ("path", "sources", "columns", "eval_path", "chat_template")
HASHES = ("git_commit", "lock_sha256", "image_digest")  # not to be taken for keys
MANIFEST_KEYS = (
    "created",
    "world_size",
    "gpus",
    "driver",
    "cpu",
    "kernel",
    "python",
    "versions",
    "seed",
)


def write(path: Path, case: Case, answer: dict[str, Any], files: dict[str, Path]) -> list[str]:
    """Make the archive; what it holds, a line each. `files` are logs and JSONL files by their names in it.

    Raises UserError where it exists already or cannot be written.
    """
    if not path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"--bundle {path}: expected a file name that ends with .tar.gz")
    cleaner = Cleaner(case)
    contents = {"diagnosis.json": _json(cleaner.value(answer))}
    if case.manifest:
        hashes = {key: case.manifest.get(key) for key in HASHES}
        rest = {key: case.manifest.get(key) for key in MANIFEST_KEYS}
        contents["manifest.json"] = _json(hashes | cleaner.value(rest))
    if case.settings:
        contents["settings.json"] = _json(cleaner.value(_without_data(case.settings)))
    for name, file in files.items():
        if file.exists():
            contents[name] = "".join(f"{cleaner.line(line)}\n" for line in _ends(file).splitlines())
    try:
        with tarfile.open(path, "x:gz") as archive:
            for name, text in contents.items():
                content = text.encode()
                entry = tarfile.TarInfo(f"doctor/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    except FileExistsError:
        raise UserError(f"--bundle {path}: exists already, expected a new name") from None
    except OSError as error:
        raise UserError(f"--bundle {path}: cannot be written ({error.strerror})") from None
    return [f"{name}  {len(text.encode()):,} bytes" for name, text in contents.items()]


class Cleaner:
    """Takes out what is nobody's business: rows of data, secrets, addresses, home folders, the user, hosts, the data's name."""

    def __init__(self, case: Case):
        secrets = secrets_in_environment()
        data = {
            str(case.setting(f"data.{key}") or "") for key in DATA_KEYS if key not in ("sources", "columns")
        }
        data |= {str(source.get("path") or "") for source in case.setting("data.sources") or []}
        # A bare word, like `demo`, names nobody and may stand anywhere.
        data = {name for path in data if "/" in path or "." in path for name in (path, Path(path).name)}
        self._wholes = sorted(secrets | data, key=len, reverse=True)
        hosts = {str(event.values.get("host", "")) for event in case.events}
        names = {name for name in {socket.gethostname(), _user(), *hosts} if len(name) > 2} - {
            "root",
            "localhost",
        }
        self._names = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b") if names else None
        self._home = os.path.expanduser("~")

    def line(self, text: str) -> str:
        if ROW.search(text):
            return "[a row of data]"
        for whole in self._wholes:
            text = text.replace(whole, HIDDEN)
        for expression in (*SECRETS, HOSTS):
            text = expression.sub(HIDDEN, text)
        if len(self._home) > 1:
            text = text.replace(self._home, "~")
        text = HOMES.sub("~", text)
        text = PATHS.sub(lambda path: "/".join(["...", *path[0].split("/")[-KEPT_PARTS:]]), text)
        return self._names.sub(HIDDEN, text) if self._names else text

    def value(self, value: Any) -> Any:
        """The same of a JSON value; what has a secret's name goes as a whole."""
        if isinstance(value, dict):
            return {
                key: HIDDEN if isinstance(inner, str) and SECRET_NAME.search(key) else self.value(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        return self.line(value) if isinstance(value, str) else value


def _without_data(settings: dict[str, Any]) -> dict[str, Any]:
    data = {
        key: HIDDEN if key in DATA_KEYS and value else value
        for key, value in (settings.get("data") or {}).items()
    }
    return {**settings, "data": data}


def _ends(path: Path) -> str:
    """Beginning and end of a log."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        text = file.read(LOG_BYTES).decode(errors="replace")
        if size > 2 * LOG_BYTES:
            text = text.rpartition("\n")[0] + f"\n[{size - 2 * LOG_BYTES} bytes left out]\n"
            file.seek(size - LOG_BYTES)
            file.readline()
        return text + file.read().decode(errors="replace")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
