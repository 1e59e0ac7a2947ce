"""Write requirements-gpu.lock and requirements-cpu.lock from requirements.in.

    make lock                        # keep the locked versions where requirements.in still allows them
    make lock ARGS=--upgrade         # take the newest that agree
    make lock ARGS="-P numpy"        # only numpy

The GPU lock is what uv resolves for Linux and Python 3.11 to 3.14. The CPU lock is the same list, without
the CUDA libraries that only torch's CUDA build needs, and with the hashes of torch's CPU builds.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "requirements-torch-cpu.sha256"
CUDA_ONLY = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton==)")
HEADER = """\
# Made from requirements.in by `make lock`; do not edit.
# {what}
# Linux x86_64 and aarch64, Python 3.11 to 3.14; every file by its SHA-256.
"""


def entries(text: str) -> list[str]:
    """The lock's entries: a requirement with the hashes and comments under it."""
    return [e for e in re.split(r"^(?=[a-zA-Z0-9])", text, flags=re.MULTILINE) if not e.startswith("#")]


def cpu_torch_hashes(version: str) -> list[str]:
    """SHA-256 of each CPU build of this torch version that we accept, or exit 2 if none is on record."""
    lines = (line.split() for line in (ROOT / CPU_TORCH).read_text().splitlines() if line[:1] != "#")
    hashes = [digest for digest, file in lines if file.startswith(f"torch-{version}+cpu-")]
    if not hashes:
        print(
            f"lock: {CPU_TORCH} has no hash of torch {version}+cpu: renew it as its head says",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return hashes


def cpu_lock(gpu_entries: list[str]) -> str:
    """The CPU flavour's entries, from those of the GPU flavour."""
    kept = []
    for entry in gpu_entries:
        if entry.startswith("torch=="):
            requirement, _, rest = entry.partition(" \\\n")
            version = requirement.split()[0].removeprefix("torch==")
            via = rest[rest.index("    # via") :]
            hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in cpu_torch_hashes(version))
            entry = f"{requirement} \\\n{hashes}\n{via}"
        if not CUDA_ONLY.match(entry):
            kept.append(entry)
    return "".join(kept)


def main() -> int:
    gpu_path, cpu_path = ROOT / "requirements-gpu.lock", ROOT / "requirements-cpu.lock"
    env = dict(os.environ)
    if "PIP_INDEX_URL" in env:  # uv does not read pip's settings
        env.setdefault("UV_DEFAULT_INDEX", env["PIP_INDEX_URL"])
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    uv += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header"]
    uv += ["requirements.in", "--output-file", gpu_path.name, *sys.argv[1:]]
    status = subprocess.run(uv, cwd=ROOT, env=env).returncode
    if status:
        return 2
    resolved = entries(gpu_path.read_text())
    gpu_path.write_text(
        HEADER.format(what="GPU flavour: torch's CUDA build and its libraries.") + "".join(resolved)
    )
    cpu_path.write_text(
        HEADER.format(what="CPU flavour: torch's CPU build, without CUDA.") + cpu_lock(resolved)
    )
    for path in (gpu_path, cpu_path):
        print(f"{path.name}: {len(entries(path.read_text()))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
