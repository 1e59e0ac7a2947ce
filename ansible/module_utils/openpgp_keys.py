"""Whose key is it? Loads OpenPGP keys and reads their fingerprints, without gpg, which a bare machine need not have."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from ansible.module_utils.apt_failures import GO_ON, one_line
from ansible.module_utils.apt_tools import AptError

KEY_BYTES = 2**20  # the largest keys of vendors have 100 KiB


def dearmor(data: bytes) -> bytes:
    """The packets of a key file, whether it is text (one block or several) or binary already."""
    blocks = re.findall(
        rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[ \t]*\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", data, re.S
    )
    if not blocks:
        return data
    packets = b""
    for block in blocks:
        lines = block.replace(b"\r", b"").split(b"\n")
        body = lines[lines.index(b"") + 1 :] if b"" in lines[:-1] else lines  # headers end with an empty line
        packets += base64.b64decode(b"".join(line for line in body if not line.startswith(b"=")))
    return packets


def fingerprints(packets: bytes) -> list[str]:
    """The fingerprints (upper-case hex) of the primary keys in a key file. ValueError: it is not one."""
    found, at = [], 0
    try:
        while at < len(packets):
            head = packets[at]
            if not head & 0x80:
                raise ValueError(f"no packet begins at byte {at}")
            if head & 0x40:  # the newer format
                tag, first = head & 0x3F, packets[at + 1]
                if first < 192:
                    length, at = first, at + 2
                elif first < 224:
                    length, at = ((first - 192) << 8) + packets[at + 2] + 192, at + 3
                elif first == 255:
                    length, at = int.from_bytes(packets[at + 2 : at + 6], "big"), at + 6
                else:
                    raise ValueError("a packet of unknown length")
            else:
                tag, size = head >> 2 & 0x0F, head & 3
                if size == 3:
                    raise ValueError("a packet of unknown length")
                length, at = (
                    int.from_bytes(packets[at + 1 : at + 1 + (1 << size)], "big"),
                    at + 1 + (1 << size),
                )
            body, at = packets[at : at + length], at + length
            if len(body) < length:
                raise ValueError("its last packet is cut off")
            # signature, marker, trust, user id, subkey, user attribute, padding may follow a primary key (6)
            if tag not in (2, 6, 10, 12, 13, 14, 17, 21):
                raise ValueError(f"a packet of kind {tag}, which is none of a public key's")
            if tag == 6:
                found.append(_fingerprint(body))
    except IndexError:
        raise ValueError("its last packet is cut off") from None
    if not found:
        raise ValueError("no public key in it")
    return found


def _fingerprint(body: bytes) -> str:
    if body[0] == 4:  # RFC 9580, 5.5.4
        return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper()
    if body[0] == 6:
        return hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body).hexdigest().upper()
    raise ValueError(f"a key of version {body[0]}; expected 4 or 6")


def key_in(path: str | Path, fingerprint: str, only: bool = False) -> bool:
    """Does this keyring, which is on the host, have the key; and, with `only`, no other?"""
    try:
        found = fingerprints(dearmor(Path(path).read_bytes()))
    except (OSError, ValueError):
        return False
    return found == [fingerprint] if only else fingerprint in found


def load(name: str, url: str, fingerprint: str, timeout: int) -> bytes:
    """The key's packets from the network, once it is sure that it is the wanted one and nothing else."""
    data = download(name, url, timeout)
    try:
        packets = dearmor(data)
        found = fingerprints(packets)
    except ValueError as error:
        begins = one_line(data[:40].decode(errors="replace"))
        raise AptError(
            f"key of {name} ({url}): not an OpenPGP key ({error}; it begins with {begins!r}), expected {fingerprint}: "
            "a mirror or proxy serves another file; nothing was changed"
        ) from None
    if found != [fingerprint]:
        raise AptError(
            f"key of {name} ({url}): fingerprint {' and '.join(found)}, expected {fingerprint}: not the vendor's key, "
            "a mirror or proxy serves another file; nothing was changed"
        )
    return packets


def download(name: str, url: str, timeout: int) -> bytes:
    for attempt in range(3):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                data = answer.read(KEY_BYTES + 1)
            if len(data) > KEY_BYTES:
                raise AptError(
                    f"key of {name} ({url}): more than {KEY_BYTES} bytes, expected a key; nothing was changed"
                )
            return data
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        time.sleep(attempt)
    raise AptError(
        f"key of {name}: cannot load {url} ({one_line(reason)}); check the network, proxy or mirror, {GO_ON}"
    )
