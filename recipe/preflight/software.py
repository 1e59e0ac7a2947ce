"""Checks of the software: the versions of the lock, and that torch and bitsandbytes really work here."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from recipe.container import in_container
from recipe.preflight.check import Check, Context, judged, not_measured

# The packages that shape results; the rest of the lock follows from them.
STACK = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets", "safetensors")
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
# NF4 loses about 9 % (root mean square) of normally distributed weights; a broken kernel loses everything.
NF4_ERROR = 0.12
# A weight on the bound between two codes may fall to either side; a wrong kernel differs everywhere.
NF4_CODES_DIFFER, NF4_VALUES_DIFFER = 0.001, 1e-3
SETUP = "run `make setup`, and start through make or .venv/bin/python"
REBUILD = "the image is not what was built: run `make build`"


def versions(context: Context) -> Check:
    """Installed packages against the lock of this machine's flavour."""
    lock = context.lock_folder / f"requirements-{context.plan.device}.lock"
    if not lock.is_file():
        return Check("versions", "skip", f"{lock.name} is not here", "the lock beside the package")
    locked = locked_versions(lock)
    installed = {name: _installed(name) for name in STACK}
    missing = [name for name, version in installed.items() if version is None]
    other = [
        f"{name} {version} (lock: {locked[name]})"
        for name, version in installed.items()
        # 2.13.0+cpu is a build of the locked 2.13.0.
        if version and name in locked and version.partition("+")[0] != locked[name]
    ]
    expected = f"{len(STACK)} packages as in {lock.name}"
    if missing:
        return Check("versions", "fail", f"missing: {', '.join(missing)}", expected, _set_up())
    found = ", ".join(other) or f"torch {installed['torch']} and the others as locked"
    remedy = f"results may differ from the lock's; {_set_up()}"
    return judged("versions", not other, found, expected, remedy, otherwise="warn")


def torch_imports(context: Context) -> Check:
    """torch starts, and is of a version that the code is tested with."""
    expected = f"torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} to {NEWEST_TORCH[0]}.{NEWEST_TORCH[1]}"
    if answer := not_measured("torch", context.stack, expected):
        return answer
    error = context.stack.get("torch_error")
    if error:
        return Check("torch", "fail", error, expected, _set_up())
    version = context.stack["torch"]
    number = tuple(int(part) for part in version.split(".")[:2])
    return judged("torch", OLDEST_TORCH <= number <= NEWEST_TORCH, version, expected, _set_up())


def torch_sees_gpus(context: Context) -> Check:
    """A CPU build of torch, or a driver that it cannot use, shows as GPUs that only nvidia-smi sees."""
    stack, there = context.stack, len(context.machine.gpus)
    expected = f"{there} GPUs seen by torch" if context.on_gpu else "not needed: this config runs on the CPU"
    if context.on_gpu and (answer := not_measured("torch cuda", stack, expected)):
        return answer
    if "torch_error" in stack or not context.on_gpu:
        return Check(
            "torch cuda", "skip", "torch does not start" if "torch_error" in stack else "CPU run", expected
        )
    build = f"CUDA {stack['cuda']}" if stack["cuda"] else "no CUDA"
    if stack["cuda"]:
        remedy = "the driver may be too old, or the container got no GPU (--gpus all)"
    elif in_container():
        remedy = "this image has the CPU build of torch: run `make build` on the machine with the GPU"
    else:
        remedy = (
            "this is the CPU build of torch: remove .venv and run `make setup` on the machine with the GPU"
        )
    return judged(
        "torch cuda", stack["gpus"] >= there, f"{stack['gpus']} GPUs, built for {build}", expected, remedy
    )


def nf4(context: Context) -> Check:
    """bitsandbytes quantises and dequantises as a reference does, on the device that will train."""
    stack = context.stack
    expected = (
        f"the reference's codes and values on the {context.plan.device}; a round trip loses < {NF4_ERROR:.0%}"
    )
    if answer := not_measured("bitsandbytes", stack, expected):
        return answer
    if "torch_error" in stack:
        return Check("bitsandbytes", "skip", "torch does not start", expected)
    if "bitsandbytes_error" in stack:
        return Check("bitsandbytes", "fail", stack["bitsandbytes_error"], expected, _set_up())
    remedy = f"bitsandbytes computes wrongly on this device; {_set_up()}"
    error, codes, values = (stack[f"nf4_{name}"] for name in ("error", "codes_differ", "values_differ"))
    good = error < NF4_ERROR and codes < NF4_CODES_DIFFER and values < NF4_VALUES_DIFFER
    found = f"NF4 round trip loses {error:.1%}; {codes:.1%} of the codes differ from the reference's, values by {values:.0e}"
    return judged("bitsandbytes", good, found, expected, remedy, measured=error)


def locked_versions(lock: Path) -> dict[str, str]:
    """Version by package name of a lock file: its lines `name==version …`."""
    pairs = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): version for name, version in pairs}


def _set_up() -> str:
    return REBUILD if in_container() else SETUP


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS = [versions, torch_imports, torch_sees_gpus, nf4]
