"""Filters for /etc/docker/daemon.json, which may be the user's: our settings into it, and out of it again.

settings | with_ours(runtime)     what it has to be; runtime: containers get GPUs by NVIDIA's runtime, not by CDI
text | without_ours(before)       the text to leave, "" for no file. `before`: the text before provision.yml, "" for none
"""

from __future__ import annotations

import json

FEATURES = {"containerd-snapshotter": True, "cdi": True}
RUNTIMES = {"nvidia": {"path": "nvidia-container-runtime", "args": []}}
# Drivers of the older store. With one of these names the engine would start all the same, but find no such driver in
# containerd's store, and so neither build nor run anything.
OLD_STORES = ("overlay2", "overlay", "aufs", "devicemapper", "vfs")


def with_ours(settings: dict, runtime: bool) -> dict:
    wanted = {**settings, "features": {**settings.get("features", {}), **FEATURES}}
    if runtime:
        wanted["runtimes"] = {**settings.get("runtimes", {}), **RUNTIMES}
    if wanted.get("storage-driver") in OLD_STORES:
        del wanted["storage-driver"]
    return wanted


def without_ours(text: str, before: str) -> str:
    """To the byte what was there before, unless somebody changed the settings since: then only ours go."""
    now, was = _parsed(text), _parsed(before)
    if now in (was, with_ours(was, False), with_ours(was, True)):
        return before
    for part, ours in (("features", FEATURES), ("runtimes", RUNTIMES)):
        kept = {name: value for name, value in now.get(part, {}).items() if value != ours.get(name)}
        kept |= {
            name: value for name, value in was.get(part, {}).items() if name in ours and name not in kept
        }
        if kept or part in was:
            now[part] = kept
        else:
            now.pop(part, None)
    if was.get("storage-driver") in OLD_STORES:
        now.setdefault("storage-driver", was["storage-driver"])
    return json.dumps(now, indent=4) + "\n" if now or before else ""


def _parsed(text: str) -> dict:
    return json.loads(text) if text.strip() else {}


class FilterModule:
    """The filters `with_ours` and `without_ours`."""

    def filters(self):
        return {"with_ours": with_ours, "without_ours": without_ours}
