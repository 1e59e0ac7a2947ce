"""Makes Debian packages and signed repositories, so that apt and dpkg on the hosts are the real ones.

A package is written in Python: an archive of two tars. Uncompressed, because it is read over the loopback.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path


@dataclass
class Package:
    """A package to be made. `files`: by path, their text, or (text, mode); a text "-> x" makes a link to x."""

    name: str
    version: str
    fields: Mapping[str, str] = field(default_factory=dict)  # Depends and the like
    files: Mapping[str, str | tuple[str, int]] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)  # postinst, …
    conffiles: tuple[str, ...] = ()
    data: bytes | None = None  # the tar of its files, where it is there already
    architecture: str = "amd64"

    def control(self) -> str:
        """Its entry in the list of installed packages, one field a line."""
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": self.architecture,
            "Maintainer": "Nobody <nobody@example.org>",
            "Section": "misc",
            "Priority": "optional",
            **self.fields,
            "Description": f"stand-in of {self.name} for tests",
        }
        return "".join(f"{name}: {value}\n" for name, value in fields.items() if value)

    def write(self, folder: Path) -> Path:
        """Write the .deb into a folder; its path."""
        files = {"control": self.control()} | {name: (text, 0o755) for name, text in self.scripts.items()}
        if self.conffiles:
            files["conffiles"] = "".join(f"{path}\n" for path in self.conffiles)
        members = {
            "debian-binary": b"2.0\n",
            "control.tar.gz": gzip.compress(make_tar(files), 1),
            "data.tar": self.data or make_tar(self.files),
        }
        # As in the archives: without the version's epoch, which a file's name cannot hold.
        path = folder / f"{self.name}_{self.version.rpartition(':')[2]}_{self.architecture}.deb"
        with path.open("wb") as deb:
            deb.write(b"!<arch>\n")
            for name, content in members.items():
                deb.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content)
                deb.write(b"\n" * (len(content) % 2))
        return path


def make_tar(files: Mapping[str, str | tuple[str, int]]) -> bytes:
    """A tar of these files and of the folders above them."""
    out = io.BytesIO()
    folders: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, content in files.items():
            text, mode = content if isinstance(content, tuple) else (content, 0o644)
            parts = path.strip("/").split("/")
            for depth in range(len(parts)):
                folder = "/".join([".", *parts[:depth]])
                if folder not in folders:
                    folders.add(folder)
                    entry = tarfile.TarInfo(folder)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
            entry = tarfile.TarInfo("/".join([".", *parts]))
            if text.startswith("-> "):
                entry.type, entry.mode, entry.linkname = tarfile.SYMTYPE, 0o777, text[3:]
                tar.addfile(entry)
            else:
                data = text.encode()
                entry.size, entry.mode = len(data), mode
                tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


class Signer:
    """A throw-away key that signs a repository. `fingerprint`: 40 hex digits; `public`: the key, armored."""

    def __init__(self, name: str):
        self._home = tempfile.TemporaryDirectory(prefix="gpg-")
        os.chmod(self._home.name, 0o700)
        # Signing only, as vendors' keys are; RSA, which every release's apt takes.
        self._gpg(
            "--passphrase",
            "",
            "--quick-generate-key",
            f"{name} <{name}@example.org>",
            "rsa2048",
            "sign",
            "never",
        )
        listed = self._gpg("--list-keys", "--with-colons").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        self.public = self._gpg("--armor", "--export").decode()

    def __enter__(self) -> Signer:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["gpgconf", "--homedir", self._home.name, "--kill", "gpg-agent"], capture_output=True)
        self._home.cleanup()

    def clearsign(self, text: str) -> bytes:
        return self._gpg("--clearsign", data=text.encode())

    def detach(self, text: str) -> bytes:
        return self._gpg("--armor", "--detach-sign", data=text.encode())

    def _gpg(self, *words: str, data: bytes = b"") -> bytes:
        command = [
            "gpg",
            "--homedir",
            self._home.name,
            "--batch",
            "--quiet",
            "--pinentry-mode",
            "loopback",
            *words,
        ]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def write_flat(folder: Path, packages: Iterable[Package], signer: Signer, fields: Mapping[str, str]) -> None:
    """A repository without suites, as `Suites: /` names it: everything in one folder."""
    folder.mkdir(parents=True)
    index = _index(((package, package.write(folder)) for package in packages), folder, "./")
    _write_lists(folder, {"Packages": index}, signer, fields)


def write_suites(
    folder: Path,
    suites: Mapping[str, Mapping[str, Iterable[Package]]],
    signer: Signer,
    fields: Mapping[str, str],
) -> None:
    """A repository with suites: {suite: {component: packages}}."""
    for suite, components in suites.items():
        lists = {}
        for component, packages in components.items():
            pool = folder / "pool" / suite / component
            pool.mkdir(parents=True)
            written = [(package, package.write(pool)) for package in packages]
            lists[f"{component}/binary-amd64/Packages"] = _index(written, folder, "")
        own = {"Suite": suite, "Codename": suite, "Components": " ".join(components)}
        _write_lists(folder / "dists" / suite, lists, signer, {**fields, **own})


def _index(written: Iterable[tuple[Package, Path]], root: Path, prefix: str) -> str:
    """The text of a Packages file."""
    entries = []
    for package, path in written:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        place = f"{prefix}{path.relative_to(root)}"
        entries.append(
            f"{package.control()}Filename: {place}\nSize: {path.stat().st_size}\nSHA256: {digest}\n"
        )
    return "\n".join(entries)


def _write_lists(folder: Path, lists: Mapping[str, str], signer: Signer, fields: Mapping[str, str]) -> None:
    """Write the Packages files below a folder, and the signed Release that vouches for them."""
    checksums = []
    for name, text in lists.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for file, content in ((name, text.encode()), (f"{name}.gz", gzip.compress(text.encode(), mtime=0))):
            (folder / file).write_bytes(content)
            checksums.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} {file}\n")
    head = {**fields, "Architectures": "amd64", "Date": formatdate(usegmt=True).replace("GMT", "UTC")}
    release = "".join(f"{name}: {value}\n" for name, value in head.items()) + "SHA256:\n" + "".join(checksums)
    (folder / "Release").write_text(release)
    (folder / "Release.gpg").write_bytes(signer.detach(release))
    (folder / "InRelease").write_bytes(signer.clearsign(release))
