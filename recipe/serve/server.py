"""`recipe serve` on the CPU: llama.cpp behind an address of this machine, with a key and a chat page, until Ctrl-C."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recipe.errors import UserError
from recipe.serve.check import Expected, self_check
from recipe.serve.llama import Files, models

ADDRESS = "127.0.0.1"
KEY_VARIABLE = "RECIPE_SERVE_KEY"  # in the environment: other users can read a command line
SEQUENCES = 2  # that each of the two models answers at once
CONTEXT_TOKENS = 4096
CHAT = {"messages": True, "system": None}
END_SECONDS = 2


def serve(
    files: Files,
    name: str,
    port: int,
    expected: Sequence[Expected] = (),
    form: dict[str, Any] = CHAT,
    context_tokens: int = CONTEXT_TOKENS,
) -> None:
    """Serve until Ctrl-C. Before it says so, it asks itself `expected` over HTTP and says how many answers agree.

    Raises UserError where the port is taken, the key cannot be used, a file cannot be loaded, or in a container.
    """
    require_possible(port)
    key = chosen_key()
    with listening(port) as listener, serving(listener, files, name, key, form, context_tokens) as address:
        if expected:
            agreed = self_check(address, key, name, expected, form)
            said = f"{agreed} of {len(expected)} greedy answers are the reference's"
            _say(said if agreed else f"warning: {said}; is it the right base, adapter, template?")
        _say(
            f"{address}/#key={key}\n  shows {name} beside its base; OpenAI's clients: {address}/v1 (Ctrl-C ends)"
        )
        while True:
            time.sleep(3600)


def require_possible(port: int) -> None:
    """What can be known before any file is made. Raises UserError as `serve` does."""
    if os.environ.get("RECIPE_NETWORK") == "none":
        raise UserError("serve: this container has no network, expected RUNTIME=host")
    chosen_key()
    with listening(port):
        pass


def chosen_key() -> str:
    """The key of the environment, or a new one, which nothing but the terminal ever shows."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return secrets.token_urlsafe()
    if not re.fullmatch(r"[A-Za-z0-9._~-]{8,200}", key):
        raise UserError(f"{KEY_VARIABLE}: expected at least 8 letters, digits, `.`, `_`, `~` or `-`")
    return key


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A port of this machine, taken before a model is loaded. Raises UserError where another program has it."""
    listener = socket.socket()
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--port {port}: cannot be used ({said}), expected a free port") from None
        yield listener


@contextmanager
def serving(
    listener: socket.socket, files: Files, name: str, key: str, form: dict[str, Any], context_tokens: int
) -> Iterator[str]:
    """The address of the server, which answers while the block runs, from a thread of its own."""
    import uvicorn

    from recipe.serve import app

    with models(files, name, context_tokens, SEQUENCES) as ready:
        config = uvicorn.Config(
            app.make(ready, key, form),
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://{ADDRESS}:{listener.getsockname()[1]}"
        finally:
            logging.getLogger("uvicorn.error").setLevel(
                logging.CRITICAL
            )  # it would tell of each answer that is cut
            server.should_exit = server.force_exit = True
            thread.join(END_SECONDS)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
