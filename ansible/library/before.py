"""Ansible module: remember how something was before the play changed it, and say it again later.

    before: {name: swappiness, value: "60", folder: /var/lib/…}    # kept the first time only
    before: {name: swappiness, folder: /var/lib/…}                 # returns known and value
    before: {name: swappiness, state: absent, folder: /var/lib/…}  # forget it

One file per name in FOLDER/before, written aside and renamed.
"""

from __future__ import annotations

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "value": {"type": "str"},
            "folder": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    wanted = module.params
    file = Path(wanted["folder"], "before", wanted["name"])
    known = file.exists()
    changed = False
    if wanted["state"] == "absent":
        changed = known
        if known and not module.check_mode:
            file.unlink()
    elif wanted["value"] is not None and not known:
        # No change of the machine in the user's eyes, but one on its disk.
        changed = True
        if not module.check_mode:
            write(file, wanted["value"])
    value = file.read_text(encoding="utf-8") if file.exists() else wanted["value"]
    module.exit_json(changed=changed, known=known, value=value)


def write(file: Path, text: str) -> None:
    """All or nothing: a play may be killed here."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    part = file.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


if __name__ == "__main__":
    main()
