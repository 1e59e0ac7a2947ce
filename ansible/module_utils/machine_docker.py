"""Docker's engine on this host: which, of whom, how it is set up, and whether containers run."""

from __future__ import annotations

import json
from pathlib import Path

from ansible.module_utils.machine_packages import owner
from ansible.module_utils.machine_reading import found_program, inside, read, said

SETTINGS = "/etc/docker/daemon.json"
DATA_ROOT = "/var/lib/docker"
SNAP = ("/snap/bin/docker", "/var/snap/docker")
# How `docker info` names the engine's newer store, which keeps images' digests as registries count them.
CONTAINERD_STORE = "io.containerd.snapshotter"


def docker(root: Path, packages: dict[str, tuple[str, str]]) -> dict:
    """What the host has of Docker; None for what nobody tells (no engine, or it does not answer)."""
    settings, settings_error = daemon_settings(root)
    info = _json(said("docker", "info", "--format", "{{json .}}"))
    answers = bool(info.get("ServerVersion"))
    version = (
        info.get("ServerVersion") or said("docker", "version", "--format", "{{.Client.Version}}").strip()
    )
    store = None
    if answers:
        kinds = [
            pair[1] for pair in info.get("DriverStatus") or [] if len(pair) == 2 and pair[0] == "driver-type"
        ]
        store = "containerd" if any(CONTAINERD_STORE in kind for kind in kinds) else "old"
    return {
        "version": version.splitlines()[0] if version else None,
        "origin": _origin(root, packages),
        "data_root": info.get("DockerRootDir") or settings.get("data-root") or DATA_ROOT,
        "running": info.get("ContainersRunning") if answers else None,
        "store": store,
        "rootless": _rootless(root, info),
        "settings": settings,
        "settings_error": settings_error,
    }


def daemon_settings(root: Path) -> tuple[dict, str | None]:
    """/etc/docker/daemon.json, and the line that says why it cannot be read."""
    text = read(inside(root, SETTINGS))
    if not text:
        return {}, None
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"{SETTINGS}, line {error.lineno}: {error.msg}"
    if not isinstance(settings, dict):
        return {}, f"{SETTINGS} holds a {type(settings).__name__}, expected an object"
    return settings, None


def _origin(root: Path, packages: dict[str, tuple[str, str]]) -> str | None:
    """`docker`: Docker's own packages; `distribution`; `other`: a snap, a copied binary, Podman's stand-in."""
    if "docker-ce" in packages:
        return "docker"
    if "docker.io" in packages:
        return "distribution"
    if any(inside(root, path).exists() for path in SNAP) or "podman-docker" in packages:
        return "other"
    program = found_program("docker")
    if program is None:
        return None
    # Docker's client alone, without an engine, is nobody's engine.
    package = owner(root, program)
    return None if package in ("docker-ce-cli", "docker-cli") else "other"


def _rootless(root: Path, info: dict) -> bool:
    """Whether a user runs an engine without root, beside or instead of the system's."""
    if any("rootless" in option for option in info.get("SecurityOptions") or []):
        return True
    return any(read(process) == "rootlesskit" for process in (root / "proc").glob("[0-9]*/comm"))


def _json(text: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
