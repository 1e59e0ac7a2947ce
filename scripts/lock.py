"""Write requirements-gpu.lock and requirements-cpu.lock from requirements.in and requirements-dev.in.

    make lock                        # keep the locked versions where the inputs still allow them
    make lock ARGS=--upgrade         # take the newest that agree
    make lock ARGS="-P numpy"        # only numpy

The GPU lock is what uv resolves for Linux and Python 3.11 to 3.14. The CPU lock is the same list, without
the CUDA libraries that only torch's CUDA build needs, and with the hashes of torch's CPU builds. The head of
each says which inputs it was made from, and that of the GPU lock which NVIDIA driver it needs.

Needs nothing but Python's standard library to be read: other scripts import it to take a lock apart.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("requirements.in", "requirements-dev.in")
GPU_LOCK, CPU_LOCK = "requirements-gpu.lock", "requirements-cpu.lock"
CPU_TORCH = "requirements-torch-cpu.sha256"
CUDA_ONLY = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton==)")
# The oldest driver branch for each major CUDA version: NVIDIA's "CUDA minor version compatibility".
DRIVER_BRANCHES = {12: 525, 13: 580}
HEADER = """\
# Made from requirements.in and requirements-dev.in by `make lock`; do not edit.
# {what}
# Linux x86_64 and aarch64, Python 3.11 to 3.14; every file by its SHA-256.
# Inputs: sha256:{inputs}
"""


def fail(message: str) -> SystemExit:
    """Exit code 2, after one line that says why."""
    print(f"lock: {message}", file=sys.stderr)
    return SystemExit(2)


# --- reading a lock ---------------------------------------------------------------------------------------


def entries(text: str) -> list[str]:
    """The lock's entries: a requirement with the hashes and comments under it."""
    return [e for e in re.split(r"^(?=[a-zA-Z0-9])", text, flags=re.MULTILINE) if e[:1].isalnum()]


def package(requirement: str) -> str:
    """The name that a requirement, an entry or a `# via` begins with: normalised, without extras."""
    name = re.match(r"[a-zA-Z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", name.group() if name else "").lower()


def version(entry: str) -> str:
    return entry.split()[0].partition("==")[2]


def asked_by(entry: str) -> set[str]:
    """Who asked for this entry, from its `# via` comment: packages, and input files as `-r FILE`."""
    lines = re.findall(r"^    # (?:via|  ) *(\S.*?) *$", entry, re.MULTILINE)
    return {line if line.startswith("-") else package(line) for line in lines}


def needed_by(lock_entries: list[str], *roots: str) -> list[str]:
    """The part of a lock that these roots need, directly or through others, in the lock's order.

    A root is an input file (`requirements.in`: the packages it names) or a package (`cyclonedx-bom`: itself).
    Where both inputs are roots, that is the whole lock. A package with two entries, for two ranges of Python,
    keeps both. As the comments do not say under which extra or marker a package is needed, the part may
    hold a package too many, never one too few.
    """
    needs = defaultdict(set)
    for entry in lock_entries:
        for parent in asked_by(entry):
            needs[parent].add(package(entry))
    names = {package(entry) for entry in lock_entries}
    reached: set[str] = set()
    for root in roots:
        todo = {package(root)} & names or needs.get(f"-r {root}", set()).copy()
        if not todo:  # an empty part would pass for an answer
            raise ValueError(f"{root}: neither an input nor a package of this lock")
        while todo:
            name = todo.pop()
            reached.add(name)
            todo |= needs[name] - reached
    return [entry for entry in lock_entries if package(entry) in reached]


# --- what a lock was made from ----------------------------------------------------------------------------


def inputs_sha256(folder: Path = ROOT) -> str:
    """SHA-256 of what the inputs ask for, whatever their comments and blank lines say."""
    digest = hashlib.sha256()
    for name in INPUTS:
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (folder / name).read_text().splitlines())
        digest.update("\n".join([name, *filter(None, lines), ""]).encode())
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    digest.update(f"requires-python {project['requires-python']}\n".encode())
    return digest.hexdigest()


def stale(lock_path: Path) -> str | None:
    """One line when this lock was not made from the inputs beside it, else None."""
    found = re.search(r"^# Inputs: sha256:(\w+)$", lock_path.read_text(), re.MULTILINE)
    made_from, now = found.group(1) if found else "none", inputs_sha256(lock_path.parent)
    if made_from == now:
        return None
    return (
        f"{lock_path.name} was made from other inputs (SHA-256 {made_from[:12]}) than {', '.join(INPUTS)} and "
        f"pyproject.toml's requires-python now are ({now[:12]}): run `make lock`"
    )


# --- writing ----------------------------------------------------------------------------------------------


def driver_line(gpu_entries: list[str]) -> str:
    """The header line with the NVIDIA driver that the locked CUDA needs, or exit 2 if that is not known."""
    locked = {package(entry): version(entry) for entry in gpu_entries}
    cuda = locked.get("cuda-toolkit") or locked.get("nvidia-cuda-runtime") or "none"
    # NCCL is built for a major version of CUDA, and names it.
    nccl = next((name for name in locked if re.fullmatch(r"nvidia-nccl-cu\d+", name)), "none")
    majors = {cuda.partition(".")[0], nccl.partition("-cu")[2] or "none"}
    known = {DRIVER_BRANCHES.get(int(major)) if major.isdigit() else None for major in majors}
    branches = [branch for branch in known if branch]
    if len(branches) < len(known):
        raise fail(
            f"the driver branch for cuda-toolkit {cuda} and {nccl} is not on record, only those for CUDA "
            f"{', '.join(map(str, DRIVER_BRANCHES))}: add it to DRIVER_BRANCHES in scripts/lock.py"
        )
    number = ".".join(cuda.split(".")[:2])
    return f"# NVIDIA driver: branch {max(branches)} or newer (CUDA {number}, NCCL {locked[nccl]})\n"


def cpu_torch_hashes(torch: str) -> list[str]:
    """SHA-256 of each CPU build of this torch version that we accept, or exit 2 if none is on record."""
    lines = (line.split() for line in (ROOT / CPU_TORCH).read_text().splitlines() if line[:1] != "#")
    hashes = [digest for digest, file in lines if file.startswith(f"torch-{torch}+cpu-")]
    if not hashes:
        raise fail(f"{CPU_TORCH} has no hash of torch {torch}+cpu: renew it as its head says")
    return hashes


def cpu_entries(gpu_entries: list[str]) -> list[str]:
    """The CPU flavour's entries, from those of the GPU flavour."""
    kept = []
    for entry in gpu_entries:
        if package(entry) == "torch":
            requirement, _, rest = entry.partition(" \\\n")
            via = rest[rest.index("    # via") :]
            hashes = " \\\n".join(
                f"    --hash=sha256:{digest}" for digest in cpu_torch_hashes(version(entry))
            )
            entry = f"{requirement} \\\n{hashes}\n{via}"
        if not CUDA_ONLY.match(entry):
            kept.append(entry)
    return kept


def resolve(options: list[str]) -> list[str]:
    """The entries that uv resolves, near to the GPU lock as it is; or exit 2, where uv has said why."""
    env = dict(os.environ)
    if "PIP_INDEX_URL" in env:  # uv does not read pip's settings
        env.setdefault("UV_DEFAULT_INDEX", env["PIP_INDEX_URL"])
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    uv += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header"]
    with tempfile.TemporaryDirectory() as scratch:  # a failure leaves both locks as they were
        draft = Path(scratch) / GPU_LOCK
        if (ROOT / GPU_LOCK).exists():
            shutil.copy(ROOT / GPU_LOCK, draft)
        command = [*uv, *INPUTS, "--output-file", str(draft), *options]
        if subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(2)
        return entries(draft.read_text())


def main() -> int:
    gpu = resolve(sys.argv[1:])
    cpu, driver, inputs = cpu_entries(gpu), driver_line(gpu), inputs_sha256()
    gpu_head = (
        HEADER.format(what="GPU flavour: torch's CUDA build and its libraries.", inputs=inputs) + driver
    )
    cpu_head = HEADER.format(what="CPU flavour: torch's CPU build, without CUDA.", inputs=inputs)
    for name, head, kept in ((GPU_LOCK, gpu_head, gpu), (CPU_LOCK, cpu_head, cpu)):
        (ROOT / name).write_text(head + "".join(kept))
        print(f"{name}: {len(kept)} entries, {len(needed_by(kept, INPUTS[0]))} of them for {INPUTS[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
