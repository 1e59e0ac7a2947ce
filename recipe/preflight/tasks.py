"""How many tasks, which are processes and threads, the control groups of this process allow, and how many there are."""

from __future__ import annotations

from pathlib import Path

from recipe.hardware import cgroup_folders


def tasks(root: Path = Path("/")) -> dict[str, int]:
    """`limit` and `used` of the group that has the fewest left, or nothing where none is limited."""
    found = []
    for folder, _ in cgroup_folders(root, "pids"):
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("pids.max", "pids.current"))
        except OSError:  # the root group has neither
            continue
        if limit.isdigit() and used.isdigit():  # `max`: no limit
            found.append({"limit": int(limit), "used": int(used)})
    return min(found, key=lambda group: group["limit"] - group["used"], default={})
