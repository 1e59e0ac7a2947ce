"""Ansible module: what this Debian or Ubuntu host has. See DOCUMENTATION; the work is in module_utils/machine_host.py."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # what follows could not even be read
    old = f"Python is {platform.python_version()} here, expected 3.10 or newer: Debian 12, Ubuntu 22.04, or newer"
    print(json.dumps({"failed": True, "msg": old}))
    sys.exit(1)

from ansible.module_utils.basic import AnsibleModule

from ansible.module_utils.machine_host import STATE_FILE, inspect
from ansible.module_utils.machine_reading import ProgramError

DOCUMENTATION = r"""
module: machine
short_description: What a bare Debian or Ubuntu host has
description:
  - Reads release, kernel, memory, swap, disks, NVIDIA GPUs on the PCI bus, Secure Boot, driver, packages, Docker,
    desktop and locks, and returns them as C(machine). Changes nothing, needs no other package than Python 3.10.
  - As root it sees all; as a user, who holds apt's lock or what Docker runs may stay unknown.
options:
  folders:
    description: Absolute paths whose disks are measured. They need not exist yet.
    type: list
    elements: str
    default: []
  packages:
    description: Names of Debian packages to look up, installed and to be had. Patterns (C(nvidia-*)) match installed ones.
    type: list
    elements: str
    default: []
  state_file:
    description: Where the module C(packages) keeps what it has added.
    type: path
    default: /var/lib/qlora-70b-recipe/packages.json
"""

EXAMPLES = r"""
- machine:
    folders: [/srv/models, /var/lib/docker]
    packages: [docker.io, nvidia-driver-*]
  register: found
"""

RETURN = r"""
machine:
  description: What was found; sizes in GiB. Its keys are those of C(inspect) in module_utils/machine_host.py.
  returned: success
  type: dict
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "folders": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "state_file": {"type": "path", "default": STATE_FILE},
        },
        supports_check_mode=True,
    )
    folders = module.params["folders"]
    relative = [folder for folder in folders if not folder.startswith("/")]
    if relative:
        module.fail_json(msg=f"machine: folders has `{relative[0]}`, expected an absolute path")
    try:
        machine = inspect(Path("/"), folders, module.params["packages"], module.params["state_file"])
    except ProgramError as error:
        module.fail_json(msg=f"machine: {error}")
    module.exit_json(changed=False, machine=machine)


if __name__ == "__main__":
    main()
