"""The process that talks to the model hub: one request as JSON on standard input, its progress as JSON lines on output.

A process of its own, since a transfer that hangs (Xet's threads are not Python's) can only be killed, and since
huggingface_hub reads HF_HUB_DISABLE_XET when it is imported. It is run as a file (download.py), so it imports nothing of
ours. It ends when its standard input closes: a killed parent leaves no download behind.

Requests: {"do": "list" | "headers" | "files", "model", "revision", "folder", "files": {name: {size, sha256, blob}}}.
Lines: {"bytes": n} received so far, {"checking": name} while it hashes, then {"result": ...} or {"error": kind, "text"}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPORT_SECONDS = 0.2
TRIES = 5  # without a new byte between them
SHA256_CHARACTERS = 64
CHUNK_BYTES = 2**16


class Wrong(Exception):
    """A file is not what the hub states."""


class Meter:
    """Stands where huggingface_hub expects a tqdm bar: counts bytes and reports them."""

    lock = threading.Lock()
    received = 0
    reported = 0.0

    def __init__(self, *args: Any, **kwargs: Any):
        self.n, self.total = kwargs.get("initial") or 0, kwargs.get("total")
        self.counts = "reconstruct" not in str(kwargs.get("desc"))  # Xet has a second bar for what it writes

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, size: float | None = 1) -> None:
        with Meter.lock:
            Meter.received += max(0, int(size or 0)) if self.counts else 0
            if time.monotonic() - Meter.reported > REPORT_SECONDS:
                Meter.reported = time.monotonic()
                say(bytes=Meter.received)

    def set_postfix_str(self, *args: Any, **kwargs: Any) -> None:
        pass

    set_description = set_description_str = refresh = close = set_postfix_str


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        say(result={"list": listing, "headers": headers, "files": files}[request["do"]](request))
    except Exception as error:
        say(error=kind_of(error), text=f"{error}" or type(error).__name__)


def leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def kind_of(error: Exception) -> str:
    from huggingface_hub import errors

    for name, kinds in {
        "wrong": (Wrong,),
        "gated": (errors.GatedRepoError,),
        "revision": (errors.RevisionNotFoundError,),
        "repository": (errors.RepositoryNotFoundError,),
        "id": (errors.HFValidationError,),
        "entry": (errors.EntryNotFoundError,),
    }.items():
        if isinstance(error, kinds):
            return name
    return "disk" if isinstance(error, OSError) and error.errno in (13, 28, 30, 122) else "unreachable"


def listing(request: dict) -> dict:
    """The commit that a revision stands for, and size and hash of each file of the top folder."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    model, revision = request["model"], request["revision"] or "main"
    info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
    found = {}
    for file in info.siblings or []:
        name = file.rfilename
        if "/" in name:
            continue
        size, sha256, blob = file.size, file.lfs.sha256 if file.lfs else None, file.blob_id
        if size is None or (name.endswith(".safetensors") and sha256 is None):
            # A mirror that does not list sizes; the HEAD answer of a file has its size and, for LFS, its sha256.
            url = hf_hub_url(model, name, revision=info.sha)
            head = get_hf_file_metadata(url, headers=build_hf_headers())
            size = head.size if size is None else size
            sha256 = head.etag if head.etag and len(head.etag) == SHA256_CHARACTERS else None
        found[name] = {"size": size, "sha256": sha256, "blob": None if sha256 else blob}
    return {"commit": info.sha, "files": found}


def headers(request: dict) -> None:
    """The first bytes of safetensors files, up to the end of their headers, each as a file of the folder."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    for name in request["files"]:
        url = hf_hub_url(request["model"], name, revision=request["revision"])
        content, wanted = b"", 8
        while len(content) < wanted:
            # Most headers are smaller than this, so one request does.
            end = max(wanted, 2**18) - 1
            ranged = build_hf_headers() | {
                "Range": f"bytes={len(content)}-{end}",
                "Accept-Encoding": "identity",
            }
            with http_stream_backoff("GET", url, headers=ranged, timeout=30) as response:
                hf_raise_for_status(response)
                if response.status_code == 200:
                    content = b""  # the whole file: no ranges there
                before = len(content)
                for chunk in response.iter_bytes(2**16):
                    content += chunk
                    Meter().update(len(chunk))
                    if len(content) >= 8:
                        wanted = 8 + min(int.from_bytes(content[:8], "little"), 10**8)
                    if len(content) >= wanted:
                        break
            if len(content) == before:
                break
        path = Path(request["folder"]) / name
        path.write_bytes(content[:wanted])


def files(request: dict) -> None:
    """Whole files, checked against what the hub states; a part that is there already is gone on with."""
    from huggingface_hub import constants

    # Its 10 MiB would hold bytes back from the file, and from the watchdog, for minutes on a slow line.
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    folder = Path(request["folder"])
    parts = folder / ".hub"
    parts.mkdir(parents=True, exist_ok=True)
    for name, stated in request["files"].items():
        part = parts / f"{name}.{(stated['sha256'] or stated['blob'] or request['revision'])[:16]}.part"
        for old in set(parts.glob(f"{name}.*.part")) - {part}:  # of a revision that is no longer asked for
            old.unlink()
        xet = not constants.HF_HUB_DISABLE_XET and not part.exists() and by_xet(request, name, part)
        if not xet:
            by_http(request, name, stated["size"], part)
        say(checking=name)
        check(name, part, stated)
        with open(part, "rb") as content:
            os.fsync(content.fileno())
        os.replace(part, folder / name)


def by_xet(request: dict, name: str, part: Path) -> bool:
    """False where the hub does not serve the file by Xet."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if not name.endswith(".safetensors") or find_spec("hf_xet") is None:
        return False
    url = hf_hub_url(request["model"], name, revision=request["revision"])
    if get_hf_file_metadata(url, headers=build_hf_headers()).xet_file_data is None:
        return False
    scratch = part.with_suffix(".xet")
    shutil.rmtree(scratch, ignore_errors=True)  # what a kill left: hf_hub_download never goes on with it
    fetched = hf_hub_download(
        request["model"], name, revision=request["revision"], local_dir=scratch, tqdm_class=Meter
    )
    os.replace(fetched, part)
    shutil.rmtree(scratch)
    return True


def by_http(request: dict, name: str, size: int, part: Path) -> None:
    """Plain HTTP, from the byte at which an earlier attempt was cut."""
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # The hub's own address each time: it redirects to a signed one, which expires, and httpx drops the token on the way.
    url = hf_hub_url(request["model"], name, revision=request["revision"])
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            with open(part, "ab", buffering=0) as content:
                http_get(
                    url,
                    content,
                    resume_size=before,
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=size,
                    tqdm_class=Meter,
                )
            return
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            failed = 0 if part.stat().st_size > before else failed + 1
            if failed >= TRIES:
                raise
            time.sleep(1)


def check(name: str, part: Path, stated: dict) -> None:
    size = part.stat().st_size
    if size != stated["size"]:
        part.unlink()
        raise Wrong(f"{name} has {size} bytes, the hub states {stated['size']}")
    with open(part, "rb") as content:
        if stated["sha256"]:
            kind, expected, found = (
                "sha256",
                stated["sha256"],
                hashlib.file_digest(content, "sha256").hexdigest(),
            )
        elif stated["blob"]:
            digest = hashlib.sha1(b"blob %d\0" % size)
            digest.update(content.read())
            kind, expected, found = "git hash", stated["blob"], digest.hexdigest()
        else:
            return
    if found != expected:
        part.unlink()
        raise Wrong(f"{name} has the {kind} {found[:16]}…, the hub states {expected[:16]}…")


if __name__ == "__main__":
    main()
