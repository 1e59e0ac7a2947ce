"""What a container cannot see of its host: kernel log, PCI tree, swap, services, Docker, clock. Prints JSON.

    python3 -m recipe.probe

The host runs it before the container's preflight (scripts/run.py) and hands the JSON in; on the host preflight calls it
itself. Plain Python 3.10, standard library only. Every part may be missing: then it is None, with the reason. Nothing
here takes longer than SECONDS: a part that hangs, as nvidia-smi does with a driver in trouble, is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from recipe import hardware, pci

GIB = 2**30
PROBE_FILE = "RECIPE_HOST_PROBE"  # names the file in a container
PROBE_AGE_SECONDS = 600
SECONDS = 5.0
COMMAND_SECONDS = 3.0
MOST_LINES = 40
# What a kernel log says when hardware or memory is in trouble.
TROUBLE = {
    "xid": re.compile(r"NVRM: Xid"),
    "oom": re.compile(r"Out of memory:|oom-kill:|Memory cgroup out of memory"),
    "mce": re.compile(r"mce: \[Hardware Error\]|Machine check|EDAC .* (?:UE|CE) "),
    "aer": re.compile(r"AER: |PCIe Bus Error"),
    "nvrm": re.compile(r"NVRM: (?!Xid|loading)"),
}
UNITS = ("nvidia-persistenced", "docker", "earlyoom", "systemd-oomd")


class Unknown(Exception):
    """A part that this host does not tell; the message is the reason."""


def gather(root: Path = Path("/"), folder: str | Path = ".") -> dict:
    """All parts as plain data: {"time", "machine", "parts": {name: {"found", "why"}}}; never raises, never hangs."""
    work: dict[str, Callable[[], object]] = {
        "machine": lambda: hardware.probe(folder, root).to_dict(),
        "kernel_log": kernel_log,
        "gpu_processes": lambda: gpu_processes(root),
        "gpu_paths": lambda: [dataclasses.asdict(path) for path in pci.gpu_paths(root)],
        "iommu": lambda: iommu(root),
        "swap": lambda: swap_devices(root),
        "limits": lambda: limits(root),
        "units": units,
        "docker": docker,
        "user": user,
        "clock": clock,
        "hub_token": lambda: bool(token_file() or os.environ.get("HF_TOKEN")),
    }
    parts: dict[str, dict] = {
        name: {"found": None, "why": f"no answer within {SECONDS:.0f} s"} for name in work
    }

    def answer(name: str) -> None:
        try:
            parts[name] = {"found": work[name](), "why": None}
        except Unknown as error:
            parts[name] = {"found": None, "why": str(error)}
        except Exception as error:  # what one part stumbles over must not cost the others
            parts[name] = {"found": None, "why": f"{type(error).__name__}: {error}"}

    # Daemons: one that hangs in the driver does not keep the interpreter from ending.
    threads = [threading.Thread(target=answer, args=(name,), daemon=True) for name in work]
    deadline = time.monotonic() + SECONDS - 0.5
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    found = dict(parts)
    return {"time": time.time(), "machine": found.pop("machine")["found"], "parts": found}


def read_probe(file: Path) -> dict:
    """The host's probe from its file, or `why` it does not count."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        age = time.time() - float(found["time"])
        if not isinstance(found["parts"], dict):
            raise ValueError("no parts")
    except OSError as error:
        return {"why": f"the host's probe {file} cannot be read ({(error.strerror or 'no file').lower()})"}
    except (ValueError, KeyError, TypeError):
        return {"why": f"the host's probe {file} is not what recipe/probe.py prints"}
    if abs(age) > PROBE_AGE_SECONDS:
        return {"why": f"the host's probe {file} is {age / 60:.0f} minutes old, expected at most 10"}
    return found


# --- the parts --------------------------------------------------------------------------------------------


def kernel_log() -> list[dict]:
    """The newest lines about trouble since the boot: kind, seconds since the boot, text."""
    found = []
    for line in _kernel_text().splitlines():
        kind = next((kind for kind, pattern in TROUBLE.items() if pattern.search(line)), None)
        if kind:
            stamp = re.match(r"\[\s*(\d+\.\d+)\]\s*(.*)", line)
            seconds, said = (float(stamp[1]), stamp[2]) if stamp else (None, line)
            found.append({"kind": kind, "seconds": seconds, "text": said[:200]})
    return found[-MOST_LINES:]


def _kernel_text() -> str:
    """dmesg, or the journal's copy, which members of `adm` may read where kernel.dmesg_restrict is set."""
    try:
        return _run("dmesg")
    except Unknown as error:
        try:
            return _run(
                "journalctl", "--dmesg", "--boot", "--no-pager", "--output=short-monotonic", "--quiet"
            )
        except Unknown:
            raise Unknown(f"{error}; as root, or with kernel.dmesg_restrict=0, it could be read") from None


def gpu_processes(root: Path) -> list[dict]:
    """Who computes on the GPUs: pid, name and user's command from /proc, the GPU's uuid and GiB held."""
    said = _run(
        "nvidia-smi", "--query-compute-apps=pid,gpu_uuid,used_memory", "--format=csv,noheader,nounits"
    )
    found = []
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0].isdigit():
            name = hardware.text_of(root / "proc" / cells[0] / "comm").strip() or "unknown"
            held = int(cells[2]) / 1024 if cells[2].isdigit() else None
            found.append({"pid": int(cells[0]), "name": name, "gpu": cells[1], "gib": held})
    return found


def iommu(root: Path) -> str:
    """`off`, `passthrough` or `translated`: what the kernel does with addresses that devices use."""
    groups = root / "sys/kernel/iommu_groups"
    if not groups.is_dir():
        raise Unknown("sysfs shows no iommu_groups")
    kinds = {hardware.text_of(group / "type").strip() for group in groups.iterdir()}
    if not kinds:
        return "off"
    return "passthrough" if kinds <= {"identity", ""} and kinds != {""} else "translated"


def swap_devices(root: Path) -> list[dict]:
    """Path, kind (partition, file or zram), size in GiB and priority of each."""
    table = root / "proc/swaps"
    if not table.is_file():
        raise Unknown("no /proc/swaps")
    found = []
    for line in hardware.text_of(table).splitlines()[1:]:
        words = line.split()
        if len(words) == 5:
            kind = "zram" if words[0].startswith("/dev/zram") else words[1]
            found.append(
                {
                    "path": words[0],
                    "kind": kind,
                    "gib": int(words[2]) * 1024 / GIB,
                    "priority": int(words[4]),
                }
            )
    return found


def limits(root: Path) -> dict:
    """memlock of this user in bytes (None: no limit) and the kernel's overcommit mode."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    mode = hardware.text_of(root / "proc/sys/vm/overcommit_memory").strip()
    return {
        "memlock_bytes": None if locked == resource.RLIM_INFINITY else locked,
        "overcommit": int(mode) if mode.isdigit() else None,
    }


def units() -> dict:
    """ActiveState of the units that matter (absent: not installed), and the names of all that have failed."""
    said = _run("systemctl", "show", "--property=Id,LoadState,ActiveState", *UNITS)
    states = {}
    for block in said.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        if values.get("LoadState") == "loaded":
            states[values["Id"].removesuffix(".service")] = values["ActiveState"]
    failed = _run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager")
    return {"states": states, "failed": [line.split()[0] for line in failed.splitlines() if line.split()]}


def docker() -> dict:
    """Version of the engine (None: the client gets no answer) and of NVIDIA's container toolkit."""
    if not shutil.which("docker"):
        raise Unknown("docker is not installed")
    try:
        engine, why = _run("docker", "version", "--format", "{{.Server.Version}}").strip() or None, None
    except Unknown as error:
        engine, why = None, str(error)
    try:
        words = _run("nvidia-ctk", "--version").split()
        toolkit = next((word for word in words if re.match(r"\d+\.\d+", word)), None)
    except Unknown:
        toolkit = None
    return {"engine": engine, "why": why, "toolkit": toolkit}


def user() -> dict:
    import grp

    names = []
    for number in os.getgroups():
        try:
            names.append(grp.getgrgid(number).gr_name)
        except KeyError:  # a group without a name
            names.append(str(number))
    return {"uid": os.getuid(), "gid": os.getgid(), "groups": sorted(names)}


def clock() -> bool:
    """Whether the clock is synchronised, as systemd says."""
    said = _run("timedatectl", "show", "--property=NTPSynchronized", "--value").strip()
    if said not in ("yes", "no"):
        raise Unknown("timedatectl does not tell")
    return said == "yes"


def token_file() -> Path | None:
    """Where `hf auth login` has kept a token. It is not read: only that it is there counts."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return file if file.stat().st_size else None
    except OSError:
        return None


def _run(*command: str) -> str:
    """What a program prints. Raises Unknown where it is missing, fails or hangs."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin:/usr/lib/wsl/lib")
    if program is None:
        raise Unknown(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise Unknown(f"{command[0]} gave no answer within {COMMAND_SECONDS:.0f} s") from None
    except OSError as error:
        raise Unknown(f"{command[0]} could not start ({error.strerror})") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unknown(f"{command[0]} ended with {done.returncode}: {said[0][:150] if said else 'no message'}")
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(gather()), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that hangs in the driver would hold the interpreter
