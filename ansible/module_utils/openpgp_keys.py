"""Whose key is it? The fingerprints in an OpenPGP key file, without gpg, which a bare machine need not have."""

from __future__ import annotations

import base64
import hashlib
import re


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
