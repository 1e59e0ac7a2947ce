"""Call the real `ansible` for one of our modules or filters, here, as `ansible localhost -m MODULE -a ARGUMENTS`."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "ansible"


def ansible(home: Path, module: str, *options: str, **arguments: str) -> dict:
    """The module's result. About a second.

    Args:
        home: where Ansible keeps its own files, and works.
        options: of `ansible`, like --check.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    settings = {
        "ANSIBLE_CONFIG": str(FOLDER / "ansible.cfg"),
        "ANSIBLE_HOME": str(home / ".ansible"),
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "ANSIBLE_NOCOLOR": "1",
    }
    program = Path(sys.executable).with_name("ansible")
    words = ["-m", module, "-a", json.dumps(arguments), "-e", f"ansible_python_interpreter={sys.executable}"]
    done = subprocess.run(
        [program, "localhost", *words, *options],
        cwd=home,
        env=kept | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # localhost | CHANGED => {…}
    return json.loads(done.stdout.partition(" => ")[2])
