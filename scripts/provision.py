"""`make provision`: run the Ansible playbook, with the Ansible of the locks, in a small environment of its own.

    make provision                          # this machine; asks for the sudo password where sudo does
    make provision ARGS="--tags checks"     # only look; ARGS is for ansible-playbook
    make unprovision                        # take back what it added

On a bare machine it needs Python 3.11 or newer with venv, and nothing else of ours: .venv with torch comes later, if at
all. `cd ansible && ansible-playbook provision.yml` with an Ansible of your own does the same. Standard library only.
"""

import json
import os
import subprocess
import sys
import time

import setup
from setup import ROOT, Pip, SetupError, go_on_in_a_new_python, say

go_on_in_a_new_python("provision")

import lock

FOLDER = ROOT / "ansible"
VENV = FOLDER / ".venv"
PLAYBOOKS = ("provision.yml", "unprovision.yml")
# What names hosts, or a connection, of the user's: nothing is added then.
ELSEWHERE = (
    "-i",
    "--inventory",
    "-K",
    "--ask-become-pass",
    "--become-password-file",
    "--become-pass-file",
    "-c",
    "--syntax-check",
    "--list-tasks",
    "--list-hosts",
    "--list-tags",
)


def main(arguments):
    setup.WHO = "provision"
    playbook, arguments = arguments[0], arguments[1:]
    try:
        if playbook not in PLAYBOOKS:
            raise SetupError(f"{playbook}: expected {' or '.join(PLAYBOOKS)}")
        setup.check_platform()
        bring_ansible()
    except SetupError as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    command = [str(VENV / "bin/ansible-playbook"), playbook, *password_option(arguments), *arguments]
    os.chdir(FOLDER)
    os.execve(command[0], command, {**os.environ, "ANSIBLE_CONFIG": str(FOLDER / "ansible.cfg")})


def wanted_entries():
    """Ansible and what it needs, as locked."""
    return lock.needed_by(lock.entries((ROOT / "requirements-cpu.lock").read_text()), "ansible-core")


def bring_ansible():
    """Make ansible/.venv unless it is there. Raises SetupError."""
    entries = wanted_entries()
    stamp = VENV / "made.json"
    if stamp.exists() and json.loads(stamp.read_text()) == entries and (VENV / "bin/python").exists():
        return
    started = time.monotonic()
    version, python = setup.find_python(os.environ.get("PYTHON"))
    say(
        f"bringing Ansible for Python {version[0]}.{version[1]}: {len(entries)} packages by hash, into ansible/.venv"
    )
    stamp.unlink(missing_ok=True)
    subprocess.run([python, "-m", "venv", "--clear", str(VENV)], check=True)
    Pip(VENV).install(entries, "requirements-cpu.lock")
    stamp.write_text(json.dumps(entries))
    say(f"Ansible is ready ({time.monotonic() - started:.0f} s)")


def password_option(arguments):
    """-K where sudo on this machine asks for a password and somebody can type it."""
    named = any(word.split("=")[0] in ELSEWHERE for word in arguments)
    if os.getuid() == 0 or named or not sys.stdin.isatty():
        return []
    free = subprocess.run(["sudo", "--non-interactive", "true"], capture_output=True).returncode == 0
    return [] if free else ["--ask-become-pass"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
