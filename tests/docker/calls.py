"""How the tests with a real Docker engine call the project."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As a user may have it in the environment; it must turn up nowhere.
TOKEN = "hf_canaryCanaryCanaryCanaryCanary42"
# Files are to belong to the caller, which is not root: as root we call as through sudo.
CALLER = (1234, 1234) if os.getuid() == 0 else (os.getuid(), os.getgid())


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, for the CPU image in a container, with a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "RECIPE_"))}
    if os.getuid() == 0:
        kept |= {"SUDO_UID": str(CALLER[0]), "SUDO_GID": str(CALLER[1])}
    return (
        kept | {"FLAVOUR": "cpu", "RUNTIME": "docker", "HF_TOKEN": TOKEN, "PYTHON": sys.executable} | changes
    )


def make(folder: Path, *words: str, timeout: int = 900, **changes: str) -> subprocess.CompletedProcess:
    """make in a checkout."""
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=folder,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
