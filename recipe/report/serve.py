"""`recipe report --watch`: the page while training runs, on this machine's own address only.

The page asks every two seconds whether the run's files have changed, and then takes what is new into itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from recipe.errors import UserError
from recipe.report import page
from recipe.report.read import files, read
from recipe.train.run import Run

ADDRESS = "127.0.0.1"
LOOK_AGAIN_SECONDS = 10  # a killed run changes none of its files


def watch(run: Run, port: int, kwh_price: float | None = None) -> None:
    """Serve until Ctrl-C. Raises UserError where the port is taken, or in a container that nothing can reach."""
    if os.environ.get("RECIPE_NETWORK") == "none":
        raise UserError("--watch: this container has no network, expected RUNTIME=host")
    with server(run, port, kwh_price) as serving:
        print(
            f"http://{ADDRESS}:{serving.server_port}/ shows run {run.name} (Ctrl-C ends)",
            file=sys.stderr,
            flush=True,
        )
        serving.serve_forever()


def server(run: Run, port: int, kwh_price: float | None = None) -> ThreadingHTTPServer:
    try:
        serving = ThreadingHTTPServer((ADDRESS, port), _handler(Pages(run, kwh_price)))
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--port {port}: cannot be used ({said}), expected a free port") from None
    serving.daemon_threads = True
    return serving


class Pages:
    """The page as the run's files are now, made again when they have changed."""

    def __init__(self, run: Run, kwh_price: float | None):
        self.run, self.kwh_price = run, kwh_price
        self._lock = threading.Lock()
        self._stamp, self._text = "", ""

    def stamp(self) -> str:
        found = [str(int(time.time() // LOOK_AGAIN_SECONDS))]
        for path in files(self.run):
            try:
                state = path.stat()
                found.append(f"{state.st_mtime_ns}.{state.st_size}")
            except OSError:
                found.append("-")
        return " ".join(found)

    def text(self) -> str:
        with self._lock:
            stamp = self.stamp()
            if stamp != self._stamp:
                self._text = page.render(read(self.run), self.kwh_price, live=True)
                self._stamp = stamp
            return self._text


def _handler(pages: Pages) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page that has given itself this address (DNS rebinding) comes with its own name.
            if (self.headers.get("Host") or "").partition(":")[0] not in (ADDRESS, "localhost"):
                self.send_error(403)
            elif self.path == "/stamp":
                self._send("text/plain", pages.stamp())
            elif self.path == "/":
                self._send("text/html", pages.text())
            else:
                self.send_error(404)

        def _send(self, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """No line for each request."""

    return Handler
