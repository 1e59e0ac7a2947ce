"""Runs fetch.py with a watchdog, and lets no message carry the token of the hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any

STALL_SECONDS = 60.0  # without a byte, before a transfer counts as stalled
_FETCH = Path(__file__).with_name("fetch.py")


class Stalled(Exception):
    """No bytes arrived for STALL_SECONDS; the process that waited for them is gone."""


class Failed(Exception):
    """What the hub or the network said; `kind` as fetch.kind_of names it. The text holds no token."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Cancelled(Exception):
    """Somebody else has failed: `stop` was set."""


def ask_hub(
    request: dict[str, Any],
    xet: bool = True,
    stop: threading.Event | None = None,
    received: Callable[[int], None] | None = None,
) -> Any:
    """The result of one request to fetch.py. `received` is told now and then how many bytes came since the last time.

    Raises Stalled, Failed or Cancelled.
    """
    from huggingface_hub import constants

    environment = dict(os.environ) | {
        "HF_ENDPOINT": constants.ENDPOINT,  # as this process has it
        "HF_HUB_OFFLINE": "1" if constants.is_offline_mode() else "0",
        "HF_HUB_VERBOSITY": "error",
        "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",  # no second copy of the weights in the hub's cache
    }
    if not xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_FETCH)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            known = 0
            for line in _lines(process, stop):
                if "result" in line:
                    return line["result"]
                if "error" in line:
                    raise Failed(line["error"], one_line(line["text"]))
                if received and "bytes" in line:
                    received(line["bytes"] - known)
                    known = line["bytes"]
            process.wait()
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise Failed("unreachable", f"the download process ended: {one_line(last)}")
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()


def _lines(process: subprocess.Popen, stop: threading.Event | None):
    """The process's lines as they come. Raises Stalled when bytes stay out, unless it hashes what it has."""
    lines: Queue = Queue()

    def read() -> None:
        try:
            for text in process.stdout or []:
                lines.put(json.loads(text))
        except ValueError:  # closed while it was read
            pass
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last, checking = time.monotonic(), False
    while True:
        if stop is not None and stop.is_set():
            raise Cancelled
        try:
            line = lines.get(timeout=0.2)
        except Empty:
            if not checking and time.monotonic() - last > STALL_SECONDS:
                raise Stalled from None
            continue
        if line is None:
            return
        last, checking = time.monotonic(), "checking" in line
        yield line


def one_line(text: str) -> str:
    """The first line of a message, cut to 200 characters, without tokens."""
    return (scrub(text).strip().splitlines() or [""])[0][:200]


def scrub(text: str) -> str:
    """`text` without the hub's token: not the one in use, and nothing that looks like one or like a password in a URL."""
    for secret in _tokens():
        text = text.replace(secret, "***").replace(repr(secret)[1:-1], "***")
    text = re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)
    text = re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _tokens() -> list[str]:
    from huggingface_hub import constants

    found = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    for path in {constants.HF_TOKEN_PATH, os.environ.get("HF_TOKEN_PATH") or constants.HF_TOKEN_PATH}:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found.append(Path(path).read_text())
    # The longest first, so that no rest of one stays behind.
    return sorted(
        {part for token in found for part in (token, token.strip()) if len(part) > 3}, key=len, reverse=True
    )


def has_token() -> bool:
    """Whether a token is set, in the environment or in its file."""
    return bool(_tokens())
