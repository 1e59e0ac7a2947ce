"""A model hub on this machine: the little of its API that huggingface_hub needs, with faults to order.

GET /api/models/ID[/revision/REV] lists files and hashes; HEAD and GET /ID/resolve/REV/FILE serve them, in ranges too.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from recipe.settings import from_dict
from tests.local_server import LocalServer

COMMIT = "c0ffee" + "0" * 34
CHUNK = 2**14


@dataclass
class Request:
    """One that was answered: `first` byte asked for, `sent` bytes of the body, `token` it came with.

    header: it asked for the first bytes only, with the last one named.
    """

    method: str
    file: str
    first: int
    sent: int = 0
    token: str | None = None
    header: bool = False


@dataclass
class FakeHub(LocalServer):
    folder: Path
    model: str = "org/tiny"
    commit: str = COMMIT
    gated: bool = False
    refuses: tuple[int, str] | None = None  # status and message of every answer
    cuts: dict[str, int] = field(default_factory=dict)  # the connection ends once, after so many bytes
    stalls: dict[str, list[int]] = field(
        default_factory=dict
    )  # one after the other: silence after so many bytes
    flipped: set[str] = field(default_factory=set)  # one bit of the content is wrong
    lists_hashes: bool = True
    redirects: bool = False  # weights come from another host, as from the hub's CDN
    xet_is_silent: bool = False  # weights are offered by Xet, whose server takes requests and never answers
    seconds_per_chunk: float = 0.0
    requests: list[Request] = field(default_factory=list)

    def bodies(self, suffix=".safetensors"):
        """The requests that were sent content of such files, the headers' small ranges left out."""
        return [
            r
            for r in self.requests
            if r.method == "GET" and r.file.endswith(suffix) and r.sent and not r.header
        ]

    def answer(self, handler, method):
        path = handler.path.partition("?")[0]
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if self.refuses:
            status, message = self.refuses
            return self.refuse(handler, status, "", message.replace("TOKEN", token or ""))
        if "/xet-read-token/" in path:
            self.requests.append(Request(method, "xet token", 0, token=token))
            access = {
                "X-Xet-Cas-Url": self.url,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": "9999999999",
            }
            return self.reply(handler, b"{}", access)
        if self.xet_is_silent and not path.startswith(("/api/", f"/{self.model}/")):
            self.requests.append(Request(method, "xet", 0))
            self.silent.wait()
            return None
        if path.startswith(f"/api/models/{self.model}"):
            self.requests.append(Request(method, "listing", 0, token=token))
            revision = path.removeprefix(f"/api/models/{self.model}").removeprefix("/revision/")
            if revision not in ("", "main", "v1", self.commit):
                return self.refuse(handler, 404, "RevisionNotFound", "no such revision")
            return self.reply(handler, json.dumps(self.listing()).encode(), {})
        name = path.rpartition("/")[2]
        if path.startswith("/cdn/"):
            return self.serve(handler, method, name, token, "cdn/")
        if not path.startswith(f"/{self.model}/resolve/") or not (self.folder / name).is_file():
            return self.refuse(handler, 404, "RepoNotFound", "Repository not found")
        if self.gated:
            return self.refuse(handler, 403, "GatedRepo", f"Access to model {self.model} is restricted")
        if self.redirects and name.endswith(".safetensors"):
            return self.redirect(handler, name)
        self.serve(handler, method, name, token)

    def redirect(self, handler, name):
        content = (self.folder / name).read_bytes()
        handler.send_response(302)
        headers = {
            "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}",
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": self.commit,
            "Content-Length": "0",
        }
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()

    def xet_headers(self, name):
        return {
            "X-Xet-Hash": hashlib.sha256(name.encode()).hexdigest(),
            "X-Xet-Refresh-Route": f"{self.url}/api/models/{self.model}/xet-read-token/{self.commit}",
        }

    def listing(self):
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {
            "id": self.model,
            "modelId": self.model,
            "sha": self.commit,
            "siblings": [self.sibling(p) for p in files],
        }

    def sibling(self, path):
        if not self.lists_hashes:
            return {"rfilename": path.name}
        content = path.read_bytes()
        found = {
            "rfilename": path.name,
            "size": len(content),
            "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        if path.suffix == ".safetensors":
            found["lfs"] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return found

    def serve(self, handler, method, name, token, prefix=""):
        content = bytearray((self.folder / name).read_bytes())
        etag = hashlib.sha256(content).hexdigest()
        if name in self.flipped:
            content[-10] ^= 1
        first, _, last = (handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(content)) + 1, len(content))
        request = Request(method, prefix + name, begin, token=token, header=bool(last))
        self.requests.append(request)
        handler.send_response(206 if "Range" in handler.headers else 200)
        if "Range" in handler.headers:
            handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        headers = {
            "Content-Length": str(end - begin),
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": self.commit,
            "Accept-Ranges": "bytes",
        }
        if self.xet_is_silent and name.endswith(".safetensors"):
            headers |= self.xet_headers(name)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        if method == "HEAD":
            return
        try:
            for at in range(begin, end, CHUNK):
                if not last and self.stalls.get(name) and at >= self.stalls[name][0]:
                    self.stalls[name].pop(0)
                    self.silent.wait()
                if not last and name in self.cuts and at >= self.cuts[name]:
                    del self.cuts[name]
                    handler.close_connection = True
                    return handler.connection.close()
                handler.wfile.write(content[at : min(at + CHUNK, end)])
                request.sent = min(at + CHUNK, end) - begin
                time.sleep(self.seconds_per_chunk)
        except OSError:  # the other side has what it wanted
            handler.close_connection = True

    def reply(self, handler, body, headers):
        handler.send_response(200)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)

    def refuse(self, handler, status, code, message):
        body = json.dumps({"error": message}).encode()
        handler.send_response(status)
        for key, value in {
            "X-Error-Code": code,
            "X-Error-Message": message,
            "Content-Length": str(len(body)),
        }.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


def settings_for(tmp_path, keep=True, model="org/tiny", **model_options):
    return from_dict(
        {
            "model": {"id": model, **model_options},
            "paths": {"models": str(tmp_path / "models")},
            "prepare": {"keep_source": keep},
        }
    )


def weights_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
