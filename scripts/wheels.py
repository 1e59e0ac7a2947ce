"""The wheels of the container image, by hash: what runs in it, and the tool that lists it. Standard library only."""

import json
import os
import shutil
import subprocess

import lock
from setup import (
    DEFAULT_TORCH_INDEX,
    LOCKS,
    ROOT,
    Pip,
    find_python,
    host_of,
    index_answers,
    lock_entries,
    make_venv,
    say,
)

PYTHON = "3.11"  # Debian 12's, which the image has
# What it can use, for pip, which would ask this machine's.
TAGS = f"--implementation cp --python-version {PYTHON} --abi cp311 --abi abi3 --abi none".split()
TAGS += [word for minor in range(5, 37) for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
TAGS += [word for old in ("1", "2010", "2014") for word in ("--platform", f"manylinux{old}_x86_64")]


def fetch(flavour, out):
    """The wheels of what runs in the image, and of the tool that lists it, each with its part of the lock."""
    pip = own_pip(flavour, out / "tools")
    entries = for_the_image(pip, lock.entries((ROOT / LOCKS[flavour]).read_text()))
    for part, root in (("run", "requirements.in"), ("bom", "cyclonedx-bom")):
        wanted = lock.needed_by(entries, root)
        folder, text = out / "wheels" / flavour / part, "".join(wanted)
        stamp = folder / "requirements.txt"
        if stamp.exists() and stamp.read_text() == text and len(list(folder.glob("*.whl"))) == len(wanted):
            continue  # the build checks their hashes again
        say(f"fetching {len(wanted)} wheels ({part})")
        aside = folder.with_name(part + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        torch = [e for e in wanted if flavour == "cpu" and e.startswith("torch==")]
        if torch:
            download(pip, torch, aside, LOCKS[flavour], torch_source())
        download(pip, [e for e in wanted if e not in torch], aside, LOCKS[flavour])
        (aside / "requirements.txt").write_text(text)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def own_pip(flavour, folder):
    """The locked pip in a venv of its own, so that neither .venv nor the system's pip is needed."""
    locked = "".join(lock_entries(LOCKS[flavour])["pip"])
    stamp = folder / "pip.lock"
    if not stamp.exists() or stamp.read_text() != locked:
        make_venv(find_python(os.environ.get("PYTHON"))[1], folder)
        Pip(folder).install([locked], LOCKS[flavour])
        stamp.write_text(locked)
    return Pip(folder)


def for_the_image(pip, entries):
    """The lock's entries whose markers hold for the image's Python, which need not be this machine's."""
    program = (
        "import json, sys; from pip._vendor.packaging.requirements import Requirement as R; "
        "e = dict(python_version=sys.argv[1], python_full_version=sys.argv[1] + '.2', sys_platform='linux', "
        "platform_machine='x86_64', implementation_name='cpython', platform_python_implementation='CPython', extra=''); "
        "print(json.dumps([not (m := R(line).marker) or m.evaluate(e) for line in json.load(sys.stdin)]))"
    )
    lines = [entry.partition(" \\\n")[0] for entry in entries]
    done = subprocess.run(
        [pip.python, "-c", program, PYTHON],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return [entry for entry, holds in zip(entries, json.loads(done.stdout), strict=True) if holds]


def torch_source():
    """pip's arguments for torch's CPU build: PyTorch's own index, or whatever pip finds where that does not answer."""
    index = os.environ.get("TORCH_INDEX") or DEFAULT_TORCH_INDEX
    reason = index_answers(index)
    if reason is None:
        return ["--index-url", index]
    say(f"TORCH_INDEX {host_of(index)} does not answer ({reason}): looking where pip looks")
    return []


def download(pip, entries, folder, lock_name, extra=()):
    requirements = folder / "wanted.txt"
    requirements.write_text("".join(entries))
    args = ["-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    pip.run([*args, *TAGS, *extra, "-d", str(folder), "-r", str(requirements)], lock_name, total=len(entries))
    requirements.unlink()
