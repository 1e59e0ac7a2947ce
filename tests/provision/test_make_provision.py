"""`make provision` on the machine itself, as its owner types it: nothing but Python, make and sudo is there."""

import io
import json
import re
import subprocess
import tarfile

import pytest

from tests.provision import standins
from tests.provision.lab import ROOT, difference, docker
from tests.provision.plays import SWAP_FOLDER, settings

pytestmark = [pytest.mark.docker, pytest.mark.provision, pytest.mark.slow]
PARTS = ["Makefile", "requirements-cpu.lock", "requirements-gpu.lock", "scripts", "ansible", "recipe"]


def bring_checkout(host):
    """These sources, as a clone would bring them."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PARTS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            entry = tar.gettarinfo(ROOT / name, f"recipe/{name}")
            entry.uid = entry.gid = 1000
            with open(ROOT / name, "rb") as file:
                tar.addfile(entry, file if entry.isreg() else None)
    docker("cp", "-", f"{host.container}:/home/owner", data=out.getvalue())
    host.run("chown -R owner: /home/owner/recipe")


def test_as_its_owner_types_it(host):
    as_its_owner_types_it(host("bookworm"))


def as_its_owner_types_it(machine):
    """For Debian 13 in tests/long/test_make_provision_trixie.py."""
    standins.kernel(machine)
    standins.gpus(machine, [("0000:01:00.0", "RTX 3090")])
    bring_checkout(machine)
    # pyenv's: first on PATH, newer than the system's, and it starts nothing.
    machine.put(
        "/usr/local/bin/python3.13",
        "#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2; exit 127\n",
        0o755,
    )
    before = machine.state()
    machine.put("/tmp/settings.json", json.dumps(settings(machine.mirror, machine.release)))

    def make(target, arguments, check=True):
        command = f"cd ~/recipe && make {target} ARGS={arguments!r}"
        return machine.run(command, user="owner", check=check)

    looked = make("provision", "--tags checks -e @/tmp/settings.json")
    assert re.search(r"provision: bringing Ansible .*\n.*Ansible is ready", looked.stderr)
    assert (
        "GeForce RTX 3090" in looked.stdout and "failed=0" in looked.stdout and "changed=0" in looked.stdout
    )
    assert difference(before, machine.state()) == []

    done = make("provision", "--tags memory -e @/tmp/settings.json")
    assert done.stderr == "" and "failed=0" in done.stdout
    assert f"{SWAP_FOLDER}/recipe.swap" in machine.read("/proc/swaps")
    # The limit is for who called, not for root.
    assert "owner - memlock unlimited" in machine.read("/etc/security/limits.d/90-recipe.conf")
    make("unprovision", "-e @/tmp/settings.json")
    assert difference(before, machine.state()) == []

    refused = make("provision", "--tags nonsense --check -e @/tmp/none.json", check=False)
    assert refused.returncode and "/tmp/none.json" in refused.stderr + refused.stdout
