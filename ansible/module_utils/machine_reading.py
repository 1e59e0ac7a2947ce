"""Reading files and programs for library/machine.py: what is missing reads as nothing, what hangs is given up."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAM_SECONDS = 20
# Ansible's sessions and `su` often lack the system programs' folders.
SYSTEM_FOLDERS = ["/usr/local/sbin", "/usr/sbin", "/sbin"]


class ProgramError(Exception):
    """A program that must answer did not; the message is one line for the user."""


def read(path: Path) -> str:
    """A file's text without surrounding blanks; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def number(text: str, base: int = 10) -> int | None:
    """The whole number that `text` is (base 0: with 0x where hexadecimal), or None."""
    try:
        return int(text.strip(), base)
    except ValueError:
        return None


def link_name(path: Path) -> str | None:
    """The last part of where a link points, as sysfs names drivers and groups; None where it is no link."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def inside(root: Path, path: str | Path) -> Path:
    """The absolute `path` of the machine whose root folder is `root`."""
    return root / str(path).lstrip("/")


def found_program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


def run(*command: str, seconds: float = PROGRAM_SECONDS) -> tuple[int | None, str]:
    """A program's exit status and what it printed, its words in English; None where it is missing or hangs."""
    program = found_program(command[0])
    if program is None:
        return None, ""
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (subprocess.TimeoutExpired, OSError):
        return None, ""
    return done.returncode, done.stdout


def said(*command: str, seconds: float = PROGRAM_SECONDS) -> str:
    """What a program printed, whatever its exit status."""
    return run(*command, seconds=seconds)[1]


def answered(*command: str, seconds: float = PROGRAM_SECONDS) -> str:
    """What a program printed; "" where it is not installed.

    Raises:
        ProgramError: it is there, but failed or gave no answer in time.
    """
    if found_program(command[0]) is None:
        return ""
    status, text = run(*command, seconds=seconds)
    if status:
        raise ProgramError(f"`{' '.join(command)}` ended with {status}, expected 0; run it to see why")
    if status is None:
        raise ProgramError(f"`{' '.join(command)}` gave no answer within {seconds:g} s; run it to see why")
    return text
