"""What apt-get or dpkg printed when it failed, as one line: what is wrong, where, and what to do.

The texts are those of LC_ALL=C in apt 2.4 (Ubuntu 22.04) to 3.0 (Debian 13), and dpkg 1.21 to 1.22.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

GO_ON = "then run the play again: it goes on where it stopped"


def listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(names)


def one_line(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def explain(text: str, names: Iterable[str] = ()) -> str:
    """What apt-get or dpkg printed when it failed, as one line: what is wrong, and what to do."""
    wanted = listed(names) or "the packages"
    for about in (_disk, _script, _candidate, _unmet, _sources, _content, _signature, _network):
        line = about(text, wanted)
        if line:
            return one_line(line)
    errors = re.findall(r"^(?:E|dpkg): (.+)", text, re.MULTILINE) or text.splitlines()[-1:]
    return one_line(f"apt failed for {wanted}: {'; '.join(errors[:2]) or 'it printed nothing'}")


def _disk(text: str, wanted: str) -> str | None:
    found = re.search(r"You don't have enough free space in (\S+?)\.?$", text, re.MULTILINE)
    if found:
        return f"{found[1]} has too little free space to load {wanted}: make room there, {GO_ON}"
    found = re.search(r"^.*(No space left on device|Read-only file system).*$", text, re.MULTILINE)
    if not found:
        return None
    paths = re.findall(r"'(/[^']*)'|(/[^\s':]+)", found[0]) or [("", "")]
    where = paths[-1][0] or paths[-1][1] or "a file system"
    if found[1] == "Read-only file system":
        return f"{where} cannot be written (read-only file system), needed for {wanted}: mount it writable, {GO_ON}"
    return f"no space left on the file system of {where}, needed for {wanted}: make room there, {GO_ON}"


def _script(text: str, wanted: str) -> str | None:
    failed = [
        found
        for found in re.finditer(
            r"dpkg: error processing (?:package|archive) (\S+) \(--(\w+)\):\n +(.+)", text
        )
        # The others fail only because the first did.
        if "dependency problems" not in found[3]
    ]
    if not failed:
        return None
    found = failed[0]
    package = os.path.basename(found[1]).split("_")[0]
    script = re.match(r"(?:installed|new|old) \S+ package (\S+) script subprocess (.+)", found[3])
    if not script:
        return f"{package}: dpkg cannot {found[2]} it: {found[3]}; /var/log/apt/term.log has the rest"
    said: list[str] = []
    for line in reversed(text[: found.start()].splitlines()):
        headline = (
            r"(Setting up|Preparing to unpack|Unpacking|Removing|Purging|Processing triggers|\(Reading)\b"
        )
        if re.match(headline, line) or len(said) == 3:
            break
        if line.strip():
            said.insert(0, line.strip())
    how = script[2].replace("returned error exit status", "exit status")
    return (
        f"{package}: its {script[1]} script failed ({how}): {' / '.join(said) or 'it printed nothing'}; "
        f"/var/log/apt/term.log has all of it; correct that, {GO_ON}"
    )


def no_candidate(name: str) -> str:
    return f"{name}: no package of this name in apt's sources"


def _candidate(text: str, wanted: str) -> str | None:
    found = re.search(
        r"^E: (?:Unable to locate package (\S+)|Package '(.+?)' has no installation candidate)", text, re.M
    )
    if found:
        return no_candidate(found[1] or found[2])
    found = re.search(r"^E: Version '(.+?)' for '(.+?)' was not found", text, re.MULTILINE)
    return f"{found[2]}: no version {found[1]} in apt's sources" if found else None


def _unmet(text: str, wanted: str) -> str | None:
    found = re.search(r"unmet dependencies:\n((?: .+\n?)+)", text)
    if not found:
        return None
    needs = [re.sub(r"\s+:\s+", ": ", one_line(line)) for line in found[1].splitlines()]
    return f"{wanted} cannot be installed beside what is installed here: {'; '.join(needs[:3])}; nothing was changed"


def _sources(text: str, wanted: str) -> str | None:
    found = re.search(r"Conflicting values set for option (\S+) regarding source (\S+) (\S+): (.*)", text)
    if found:
        return (
            f"two of apt's sources have {found[2]} {found[3]} with different {found[1]} ({found[4].strip()}): "
            "remove one of them from /etc/apt/sources.list.d, then run the play again"
        )
    found = re.search(r"^E: (Malformed .+)", text, re.MULTILINE)
    return (
        f"apt cannot read its sources: {found[1]}; correct or remove it, then run the play again"
        if found
        else None
    )


def _content(text: str, wanted: str) -> str | None:
    found = re.search(r"Failed to fetch (\S+)\s+(Hash Sum mismatch|File has unexpected size[^.\n]*)", text)
    if not found:
        return None
    return (
        f"{found[1]} is not what its repository promised ({found[2]}): a mirror in the middle of its update, or a "
        f"proxy with an old copy; wait some minutes or take another mirror, {GO_ON}"
    )


def _signature(text: str, wanted: str) -> str | None:
    found = re.search(
        r"(?:GPG error|OpenPGP signature verification failed): (\S+\s.*?)\s*(?:In)?Release: (.+)", text
    )
    if found:
        reason = found[2].split("error message is: ")[-1]
        return f"the signature of the repository {found[1]} is refused: {reason}; expected one by the key in its source"
    found = re.search(r"The repository '(.+?)\s*(?:In)?Release' is (?:no longer|not) signed", text)
    if found:
        return f"the repository {found[1]} is not signed; expected a signature by the key in its source"
    found = re.search(r"The repository '(.+?)\s*Release' does not have a Release file", text)
    return (
        f"no repository at {found[1]}: it has no Release file; check address and release" if found else None
    )


def _network(text: str, wanted: str) -> str | None:
    found = re.search(r"^[EW]: Failed to fetch (\S+)\s*(.*)", text, re.MULTILINE)
    if not found:
        return None
    host, reason = urlsplit(found[1]).netloc.rpartition("@")[2] or found[1], found[2]
    if not reason or reason.endswith(":"):  # apt 3 prints only the last of several reasons
        for uri, reasons in re.findall(r"^Err:\d+ (\S+).*\n((?:  .+\n)+)", text, re.MULTILINE):
            if found[1].startswith(uri):
                reason = reasons.splitlines()[0]
    reason = re.sub(r"\s*\[IP: .*?\]", "", reason).strip().rstrip(".")
    if re.match(r"404\b", reason):
        return f"{found[1]} is not there (404), needed for {wanted}: its mirror is not up to date; take another, {GO_ON}"
    return f"apt cannot reach {host} ({reason}), needed for {wanted}; check the network, proxy or mirror, {GO_ON}"
