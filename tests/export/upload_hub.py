"""A model hub on this machine that takes uploads, with storage on disk, as huggingface_hub speaks to one without Xet.

whoami, repos/create, model info, tree, validate-yaml, preupload, LFS batch, PUT of an object, commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.local_server import LocalServer

GOOD_TOKEN = "hf_goodgoodgoodgoodgood"
READ_ONLY_TOKEN = "hf_readreadreadreadread"
LFS_ENDINGS = (".safetensors", ".gguf")
LFS_BYTES = 10_000_000
CHUNK = 2**14


@dataclass
class UploadHub(LocalServer):
    folder: Path
    stalls: str | None = None  # an object (its sha256) of which half is read, then silence
    stalled: bool = False
    spoils: str | None = None  # a file of which the commit keeps something else
    ignores_private: bool = False  # an organisation where everything is public
    requests: list[tuple[str, str]] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)  # sha256 of each object whose content came
    commits: int = 0

    def __enter__(self):
        self.lock = threading.Lock()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        (self.folder / "repos").mkdir(exist_ok=True)
        return super().__enter__()

    # -- what is stored -------------------------------------------------------------------------------------------------

    def state(self, repo):
        """{"private", "files": {path: {"oid", "size", "lfs"}}} or None."""
        path = self.folder / "repos" / f"{repo.replace('/', '--')}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, repo, state):
        (self.folder / "repos" / f"{repo.replace('/', '--')}.json").write_text(json.dumps(state))

    def content(self, repo, name):
        entry = self.state(repo)["files"][name]
        return (self.folder / "objects" / (entry["lfs"] or entry["oid"])).read_bytes()

    def keep(self, key, content):
        (self.folder / "objects" / key).write_bytes(content)

    # -- the protocol ---------------------------------------------------------------------------------------------------

    def answer(self, handler, method):
        path = handler.path.partition("?")[0]
        with self.lock:
            self.requests.append((handler.command, path))
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/objects/"):  # the address was given to who may write
            return self.put(handler, path.rpartition("/")[2])
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        if token not in (GOOD_TOKEN, READ_ONLY_TOKEN):
            return self.refuse(handler, 401, f"Invalid credentials in Authorization header {token}")
        if handler.command == "POST" and token == READ_ONLY_TOKEN and path != "/api/validate-yaml":
            return self.refuse(handler, 403, f"token {token} has no write access")
        if path == "/api/whoami-v2":
            return self.reply(handler, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.validate(handler, json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(handler, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(handler, json.loads(body))
        parts = path.removeprefix("/api/models/").split("/")
        repo, what = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "info"
        state = self.state(repo)
        if state is None:
            return self.refuse(handler, 404, "Repository not found", "RepoNotFound")
        return {"info": self.info, "tree": self.tree, "preupload": self.preupload, "commit": self.commit}[
            what
        ](handler, repo, state, body)

    def validate(self, handler, text):
        found = yaml.safe_load(text.split("---")[1])
        if not isinstance(found.get("library_name"), str) or not isinstance(found.get("tags"), list):
            return self.reply(handler, {"errors": [{"message": "library_name or tags"}]}, 400)
        self.reply(handler, {"errors": [], "warnings": [{"message": "license is empty"}]})

    def create(self, handler, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me":
            return self.refuse(
                handler, 403, "You don't have the rights to create a model under this namespace"
            )
        if self.state(repo):
            return self.refuse(handler, 409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.save(repo, {"private": private and not self.ignores_private, "files": {}})
        self.reply(handler, {"url": f"{self.url}/{repo}"})

    def info(self, handler, repo, state, body):
        self.reply(
            handler,
            {"id": repo, "modelId": repo, "sha": "a" * 40, "private": state["private"], "siblings": []},
        )

    def tree(self, handler, repo, state, body):
        self.reply(
            handler,
            [
                {"type": "file", "path": name, "size": one["size"], "oid": one["oid"]}
                | (
                    {"lfs": {"oid": one["lfs"], "size": one["size"], "pointerSize": 130}}
                    if one["lfs"]
                    else {}
                )
                for name, one in sorted(state["files"].items())
            ],
        )

    def preupload(self, handler, repo, state, body):
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LFS_ENDINGS) or file["size"] > LFS_BYTES
            known = state["files"].get(file["path"], {})
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": known.get("lfs") or known.get("oid"),
                }
            )
        self.reply(handler, {"files": answers})

    def batch(self, handler, asked):
        objects = []
        for one in asked["objects"]:
            found = {"oid": one["oid"], "size": one["size"]}
            if not (self.folder / "objects" / one["oid"]).exists():
                found["actions"] = {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}
            objects.append(found)
        self.reply(handler, {"transfer": "basic", "objects": objects})

    def put(self, handler, oid):
        if handler.headers.get("Authorization"):
            return self.refuse(handler, 400, "only one auth mechanism allowed")
        length, content = int(handler.headers["Content-Length"]), b""
        while len(content) < length:
            content += handler.rfile.read(min(CHUNK, length - len(content)))
            if oid == self.stalls and len(content) >= length // 2:
                self.stalled = True
                self.silent.wait()
                return None
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(handler, 422, "content is not what was announced")
        self.keep(oid, content)
        with self.lock:
            self.stored.append(oid)
        self.reply(handler, {})

    def commit(self, handler, repo, state, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == self.spoils:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.keep(oid, content)
                state["files"][value["path"]] = {"oid": oid, "size": len(content), "lfs": None}
            elif line["key"] == "lfsFile":
                size = (self.folder / "objects" / value["oid"]).stat().st_size
                state["files"][value["path"]] = {"oid": "b" * 40, "size": size, "lfs": value["oid"]}
        self.save(repo, state)
        with self.lock:
            self.commits += 1
        self.reply(handler, {"commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40})

    def reply(self, handler, value, status=200):
        self.send(handler, status, json.dumps(value).encode(), {})

    def refuse(self, handler, status, message, code=""):
        self.send(
            handler,
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    def send(self, handler, status, body, headers):
        handler.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)
