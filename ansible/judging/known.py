"""What the choices (filter_plugins/choices.py) and the verdicts on them both go by."""

from __future__ import annotations

import re

# The first engine that gives GPUs by CDI, and keeps images as `make build` needs it.
OLDEST_DOCKER = 25
# RAM beyond the plan's need that lets a burst, such as another program, pass (recipe/preflight/host.py).
THIN_MARGIN = 0.2
# What their names begin with: nfs4, fuseblk.
NO_SWAP_FILE = ("zfs", "overlay", "tmpfs", "nfs", "fuse", "9p", "virtiofs")


def major(version: str | None) -> int:
    """The first number of a version, past a Debian epoch: 5:28.5.1-1 gives 28; 0 where there is none."""
    found = re.match(r"(?:\d+:)?(\d+)", version or "")
    return int(found[1]) if found else 0
