"""NCCL's environment for this host, in `host.env`: preflight writes it, compose (env_file) and the launcher read it.

It lies in the working directory, the root of the checkout. Containers mount that read-only: on a host that has no
packages, `python3 -m recipe.hostenv` writes it too (standard library only, Python 3.10).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from recipe import container
from recipe.errors import UserError
from recipe.files import write_text
from recipe.hardware import NVIDIA, Machine, peer_access, probe

FILE = "host.env"
HEADER = "# NCCL's environment for this host. `recipe preflight` wrote it: do not edit it, variables that you set win over it."
MEASURED = "Measured by preflight: "
# Docker compose and we must read the same, so nothing in a value that compose would expand, unquote or cut off.
LINE = re.compile(r"((?:NCCL|CUDA|GLOO)_[A-Z0-9_]+)=([^\s\"'`$#\\]+)")


class Setting(NamedTuple):
    """One variable, and in one line why this host needs it."""

    name: str
    value: str
    reason: str


def find(machine: Machine, wrong_copies: str | None = None) -> list[Setting]:
    """What NCCL must be told about this machine: nothing where fewer than two GPUs are visible.

    `wrong_copies`: what was measured to be wrong with copies from GPU to GPU, though the driver offers them.
    """
    if len(machine.gpus) < 2:
        return []
    settings = []
    if wrong_copies:
        settings.append(Setting("NCCL_P2P_DISABLE", "1", f"{MEASURED}{wrong_copies}."))
    visible = {gpu.index for gpu in machine.gpus}
    refused = [
        (pair, word)
        for pair, word in sorted((peer_access() or {}).items())
        if word != "OK" and visible.issuperset(pair)
    ]
    if refused and not wrong_copies:
        (reader, owner), word = refused[0]
        reason = (
            f"GPU {reader} cannot read the memory of GPU {owner} (`nvidia-smi topo -p2p r`: {word}); "
            "NCCL may hang or crawl where it tries."
        )
        settings.append(Setting("NCCL_P2P_DISABLE", "1", reason))
    settings.append(Setting("NCCL_IB_DISABLE", "1", "All GPUs are in this host: no search for InfiniBand."))
    return settings


def render(settings: list[Setting]) -> str:
    """The file: a reason above each line."""
    lines = [HEADER]
    for setting in settings:
        lines += [f"# {setting.reason}", f"{setting.name}={setting.value}"]
    if not settings:
        lines.append("# Fewer than two GPUs: NCCL is not used, and nothing has to be set.")
    return "\n".join(lines) + "\n"


def write(
    folder: str | Path, machine: Machine, wrong_copies: str | None = None, measured: bool = False
) -> str | None:
    """Bring `host.env` up to date. Returns the line that says so, or None where there is nothing to say.

    Where GPUs may be hidden from this process, what it sees is not the host, and the file stays as it is. What an earlier
    preflight measured stays too, until another one measures.
    """
    path = Path(folder) / FILE
    if why := _blind(machine):
        return f"{FILE}: left as it was, since {why}" if path.exists() else None
    settings = find(machine, wrong_copies if measured else _measured_before(path))
    text = render(settings)
    count = f"{len(settings) or 'no'} NCCL setting{'' if len(settings) == 1 else 's'}"
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
    except OSError as error:
        if settings or path.exists():
            wanted = " ".join(f"{setting.name}={setting.value}" for setting in settings) or "nothing set"
            return (
                f"{FILE}: could not be written ({(error.strerror or str(error)).lower()}), expected {wanted}; "
                f"run `python3 -m recipe.hostenv` on the host, in the checkout"
            )
    return f"{FILE}: {count}"


def read(path: str | Path = FILE) -> dict[str, str]:
    """The variables of the file, none where there is no file. Raises UserError where a line is not as `write` makes it."""
    remedy = f"remove {path} and run `make preflight`, which writes it anew"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}), expected NAME=value lines; {remedy}"
        ) from None
    except OSError as error:
        found = (
            "is a folder" if isinstance(error, IsADirectoryError) else (error.strerror or str(error)).lower()
        )
        raise UserError(f"{path}: {found}, expected a file of NAME=value lines; {remedy}") from None
    variables = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise UserError(
                f"{path}:{number}: found `{line[:80]}`, expected a # comment or NAME=value with a plain value and a name "
                f"that begins with NCCL_, CUDA_ or GLOO_; {remedy}"
            )
        variables[match[1]] = match[2]
    return variables


def _measured_before(path: Path) -> str | None:
    """What preflight measured when it wrote the file, or None."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    said = [line for line in lines if line.startswith(f"# {MEASURED}")]
    return said[0].removeprefix(f"# {MEASURED}").removesuffix(".") if said else None


def _blind(machine: Machine) -> str | None:
    """Why this process may see fewer GPUs than the host has, or None."""
    if machine.gpu_error:
        return machine.gpu_error
    if len(machine.gpus) >= 2:
        return None
    # The bus may be hidden too: WSL2 has none.
    if not machine.gpus and container.in_container():
        return "no GPU was given to this container"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return "CUDA_VISIBLE_DEVICES is set and leaves fewer than two GPUs"
    on_the_bus = sum(device.vendor == NVIDIA for device in machine.display_devices)
    if on_the_bus > len(machine.gpus):
        return f"{len(machine.gpus)} of {on_the_bus} NVIDIA GPUs can be used from here"
    return None


if __name__ == "__main__":
    line = write(".", probe())
    print(line or f"{FILE}: not written, since not all GPUs can be seen", file=sys.stderr)
