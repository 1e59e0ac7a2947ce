"""Ask a public list of vulnerabilities about every package of both locks; pip-audit does the asking.

    make audit                                     # PyPI's list, or OSV's if that does not answer
    make audit ARGS="--ignore-vuln ID"             # what was looked at and does not concern us
    OSV_URL=http://HOST/v1/query make audit        # only this service, which speaks OSV: a mirror

Exit codes: 0 nothing known; 1 a line for each known vulnerability, with the version that fixes it; 2 nothing
can be said, since no service answered for every package (one line says why).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import lock

WIDTH = 110
COULD_NOT_ASK = 2


class NoAnswer(Exception):
    """Why a service said nothing, or not about every package."""


def rounds(pins: list[str]) -> list[list[str]]:
    """The pins in lists that hold no package twice.

    pip-audit refuses two versions of one package, and where markers tell them apart, it drops the one that is
    not for the Python it runs on. So it gets pins without markers, and second versions in a round of their own.
    """
    made: list[dict[str, str]] = []
    for pin in pins:
        name = lock.package(pin)
        free = next((pins for pins in made if name not in pins), None)
        if free is None:
            made.append(free := {})
        free[name] = pin
    return [list(pins.values()) for pins in made]


def reason(stderr: str) -> str:
    """What stopped pip-audit, from its stack trace or its last words."""
    said = [line for line in stderr.splitlines() if line.strip()] or ["no output"]
    line = next((line for line in reversed(said) if line.startswith(("requests.", "ERROR:"))), said[-1])
    host, cause = re.search(r"host='([^']+)'", line), re.search(r"Caused by (\w+)", line)
    if host and cause:
        return f"{host.group(1)} cannot be reached, {cause.group(1)}"
    return textwrap.shorten(line.rpartition("ERROR:pip_audit._cli:")[2], 160, placeholder="…")


def ask(service: list[str], pins: list[str], options: list[str]) -> list[dict[str, Any]]:
    """What this service says of each pinned package."""
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "pins.txt"
        pinned.write_text("\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip_audit", *service, "--requirement", str(pinned)]
        # Hashes are pip's business, and were checked when it installed.
        command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", *options]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == COULD_NOT_ASK:  # it does not know an option
        print(f"audit: {reason(done.stderr)}", file=sys.stderr)
        raise SystemExit(COULD_NOT_ASK)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):  # pip-audit ends with 1 for a vulnerability and for its own failure
        raise NoAnswer(reason(done.stderr)) from None
    # It skips a package that the service does not know, and would call the rest clean: a proxy that answers
    # 404 to everything looks like that.
    skipped = [answer["name"] for answer in answers if "skip_reason" in answer]
    if skipped or len(answers) < len(pins):
        raise NoAnswer(f"knows nothing of {len(skipped)} packages, {', '.join(skipped[:3])} …")
    return answers


def audit(services: dict[str, list[str]], pins: list[str], options: list[str]) -> list[dict[str, Any]]:
    """The answers of the first service that knows every package, or exit 2."""
    failures = []
    for name, service in services.items():
        try:
            return [answer for part in rounds(pins) for answer in ask(service, part, options)]
        except NoAnswer as why:
            failures.append(f"{name}: {why}")
    print(
        f"audit: no vulnerability service answered ({'; '.join(failures)}): check the network and the proxy, "
        "or set OSV_URL to a service that speaks OSV",
        file=sys.stderr,
    )
    raise SystemExit(COULD_NOT_ASK)


def main(options: list[str], root: Path = lock.ROOT) -> int:
    locked = [e for name in (lock.GPU_LOCK, lock.CPU_LOCK) for e in lock.entries((root / name).read_text())]
    pins = sorted({entry.split()[0] for entry in locked})
    at_run_time = {entry.split()[0] for entry in lock.needed_by(locked, lock.INPUTS[0])}
    pypi, osv = ["--vulnerability-service", "pypi"], ["--vulnerability-service", "osv"]
    url = os.environ.get("OSV_URL")
    services = {"OSV_URL": [*osv, "--osv-url", url]} if url else {"PyPI": pypi, "OSV": osv}
    known = 0
    for answer in audit(services, pins, options):
        for found in answer["vulns"]:
            known += 1
            pin = f"{answer['name']}=={answer['version']}"
            part = "run time" if pin in at_run_time else "development"
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            about = textwrap.shorten(found.get("description", ""), WIDTH, placeholder="…")
            names = " ".join([found["id"], *sorted(found.get("aliases", []))])
            print(f"{pin} ({part}): {names}, fixed in {fixed}\n    {about}")
    number = "1 known vulnerability" if known == 1 else f"{known or 'no'} known vulnerabilities"
    print(f"audit: {number} in {len(pins)} locked packages")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
