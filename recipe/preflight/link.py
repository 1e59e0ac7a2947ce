"""Check of the link between GPUs: do they add up what they should, with the NCCL settings of this host?

Cards whose driver offers peer access that does not work hang or give wrong sums (NVIDIA/nccl-tests issue 117).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from recipe import hostenv
from recipe.preflight.check import REPOSITORY, Check, Context

LOG = "nccl-all-reduce.log"
SECONDS = 90


def all_reduce(context: Context) -> Check:
    """One all-reduce over all ranks; where it fails, again with NCCL_DEBUG=INFO, into a log."""
    ranks, expected = context.plan.world_size, "every GPU gets the same, right sums"
    settings = {setting.name: setting.value for setting in hostenv.find(context.machine)}
    found = run(ranks, settings)
    if "error" not in found:
        with_settings = ", ".join(f"{name}={value}" for name, value in settings.items())
        return Check(
            "all-reduce",
            "ok",
            f"{found['gib_per_second']:.1f} GiB/s over {ranks} GPUs ({with_settings})",
            expected,
        )
    again = run(ranks, settings | {"NCCL_DEBUG": "INFO"})
    log = Path(context.settings.paths.runs) / LOG
    remedy = "look at `nvidia-smi topo -m` and `dmesg`; NCCL_P2P_DISABLE=1 make preflight tries without peer access"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(again["log"], encoding="utf-8")
        remedy = f"{log} has what NCCL said; {remedy}"
    except OSError:  # a place that cannot be written is no reason to hide the answer
        pass
    return Check("all-reduce", "fail", found["error"], expected, remedy)


def run(ranks: int, settings: dict[str, str], cpu: bool = False) -> dict:
    """What recipe/preflight/all_reduce.py prints, with its standard error as `log`; `error` where it failed."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "recipe.preflight.all_reduce", str(ranks), *(["--cpu"] if cpu else [])]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            # What the caller has set wins over what we found.
            env=settings | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS} s", "log": ""}
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = {"error": f"ended with {done.returncode} without an answer"}
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith(" ")]
    if "error" in found and said:
        found["error"] += f": {said[-1][:200]}"
    return found | {"log": done.stderr}


# Only where NCCL is used: needs_nccl in host.py.
WITH_NCCL = [all_reduce]
