"""What tokens and passwords look like. None may stand in a config, which is copied into a run's folder and its report."""

from __future__ import annotations

import os
import re

# Of environment variables. Not `tokens` or `tokenizer`, which settings and measurements have.
SECRET_NAME = re.compile(
    r"(?i)(token(?!s|iz)|secret|passw|credential|api_?key|auth|cookie|private_?key|access_?key)"
)
SHORTEST = 6  # of a secret; shorter ones would be found in other words

TOKENS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(sk|pk|rk|ghp|gho|ghs|glpat|xox[abpr])[-_][A-Za-z0-9_-]{8,}"),
    re.compile(r"\bgithub_pat_\w{8,}"),
    re.compile(r"\bAKIA[0-9A-Z]{12,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.?[\w-]*"),
)
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")  # https://user:password@host
WANDB_KEY = re.compile(r"\b[0-9a-fA-F]{40}\b")  # a commit looks so too
# What no path and no name of a data set is.
CERTAIN = (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), re.compile(r"\bgithub_pat_\w{8,}"), IN_ADDRESS)


def looks_secret(key: str, value: str) -> bool:
    """Whether a setting's value is a token or an address with a password."""
    patterns = (*TOKENS, IN_ADDRESS, WANDB_KEY) if key.startswith("track.") else CERTAIN
    return any(pattern.search(value) for pattern in patterns)


def secrets_in_environment() -> set[str]:
    return {
        value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }


def without_secrets(text: str) -> str:
    """For what a library says of its own errors."""
    for secret in sorted(secrets_in_environment(), key=len, reverse=True):
        text = text.replace(secret, "[hidden]")
    for pattern in (*TOKENS, IN_ADDRESS):
        text = pattern.sub("[hidden]", text)
    return text
