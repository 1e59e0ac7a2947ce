"""The network of the hosts in the lab: Debian's mirror through a cache on disk, and folders that stand in for vendors.

    http://GATEWAY:PORT/debian/…, /debian-security/…    from the mirror of this machine
    http://GATEWAY:PORT/nvidia/…, /toolkit/…, …          from a local folder

It answers apt both as a server and as a proxy, so the hosts' own sources say http://deb.debian.org like those of any
machine. Packages are kept on disk for other sessions; what lists them (dists/) is fetched once per session.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

KEPT_DAYS = 7
UPSTREAM_SECONDS = 60


class Mirror:
    """An HTTP server for the hosts, from `with` to its end.

    `requests` lists what was asked for, as (path, status); status 0: the network was gone.
    """

    def __init__(self, address: str, cache: Path, upstream: dict[str, str]):
        """Listen on a free port of `address`; `upstream` gives the mirror's address of each Debian archive."""
        self.upstream = upstream
        self.folders: dict[str, Path] = {}
        self.requests: list[tuple[str, int]] = []
        self._cache = cache / "pool"
        self._session = Path(tempfile.mkdtemp(prefix="lists-", dir=cache))
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._gone = False
        self._left: int | None = None  # requests that are still answered; None: all
        _drop_old_files(self._cache)
        for left in cache.glob("lists-*"):  # by a session that was killed
            if left.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(left, ignore_errors=True)
        mirror = self

        class Handler(_Handler):
            serves = mirror

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://{address}:{self._server.server_port}"

    def __enter__(self) -> Mirror:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._session, ignore_errors=True)

    def serve(self, name: str, folder: Path) -> None:
        """Answer /name/… with the files of a folder."""
        self.folders[name] = folder

    def down(self) -> None:
        """From now on connections end without an answer, those in the middle of a file too."""
        self._gone = True

    def up(self) -> None:
        self._gone, self._left = False, None

    def fail_after(self, requests: int) -> None:
        """Answer this many more requests, then be gone."""
        self._gone, self._left = False, requests

    def gone(self) -> bool:
        return self._gone

    def _admit(self) -> bool:
        """Count a request; False where the network is gone by now."""
        with self._lock:
            if self._left == 0:
                self._gone = True
            elif self._left is not None:
                self._left -= 1
            return not self._gone

    def _find(self, path: str) -> tuple[int, Path | None]:
        """(status, file) for a path below /."""
        name, _, rest = path.lstrip("/").partition("/")
        parts = rest.split("/")
        if ".." in parts or not rest:
            return 404, None
        if name in self.folders:
            file = self.folders[name] / rest
            return (200, file) if file.is_file() else (404, None)
        if name not in self.upstream:
            return 404, None
        kept = rest.endswith(".deb") or "by-hash" in parts  # never changes under its name
        file = (self._cache if kept else self._session) / name / rest
        with self._lock:
            lock = self._locks[path]
        with lock:
            if not file.exists():
                status = _fetch(f"{self.upstream[name]}/{rest}", file)
                return status, file if status == 200 else None
        if kept:
            os.utime(file, (time.time(), file.stat().st_mtime))
        return 200, file


class _Handler(BaseHTTPRequestHandler):
    serves: Mirror
    protocol_version = "HTTP/1.1"
    # Headers and a small file would otherwise wait for each other's acknowledgement (40 ms).
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)  # as a proxy, it is asked with the whole address
        if not self.serves._admit():
            self.serves.requests.append((path, 0))
            self._hang_up()
            return
        status, file = self.serves._find(path)
        if file and self._unchanged(file):
            status = 304
        self.serves.requests.append((path, status))
        if status == 200:
            assert file
            self._send(file)
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _send(self, file: Path) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.send_header("Last-Modified", formatdate(int(file.stat().st_mtime), usegmt=True))
        self.end_headers()
        if self.command == "HEAD":
            return
        with file.open("rb") as content:
            while block := content.read(1 << 18):
                if self.serves.gone():
                    self._hang_up()
                    return
                self.wfile.write(block)

    def _unchanged(self, file: Path) -> bool:
        known = self.headers.get("If-Modified-Since")
        return known is not None and int(file.stat().st_mtime) <= parsedate_to_datetime(known).timestamp()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the host has gone, or we have hung up
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _fetch(address: str, file: Path) -> int:
    """Fetch a file from the real mirror; the status. A file that comes short is not kept."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(address, timeout=UPSTREAM_SECONDS) as answer, part.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 18)
            expected, changed = answer.headers.get("Content-Length"), answer.headers.get("Last-Modified")
        if expected is not None and part.stat().st_size != int(expected):
            return 502
        if changed:
            os.utime(part, (time.time(), parsedate_to_datetime(changed).timestamp()))
        part.replace(file)
        return 200
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 502
    finally:
        part.unlink(missing_ok=True)


def _drop_old_files(folder: Path) -> None:
    """Remove what no session has asked for in days: the time of the last use is the file's access time."""
    oldest = time.time() - KEPT_DAYS * 86400
    for file in folder.rglob("*"):
        try:
            if file.is_file() and file.stat().st_atime < oldest:
                file.unlink()
        except OSError:  # another session was faster
            pass
