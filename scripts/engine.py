"""The Docker engine of this machine: is it there, may we use it, does it have what is asked of it?

Each thing that is missing has a line of its own, with the fix. Standard library only.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setup import SetupError

CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")  # where Docker looks for them
NEEDED_COMPOSE = (2, 24)  # env_file that may be missing
INSTALL = "`make provision` installs it (docs/provision.md), or see https://docs.docker.com/engine/install"


class EngineError(SetupError):
    """What keeps Docker from doing it, in one line."""


def docker(*arguments, **options):
    """Run docker and return what it printed. Raises EngineError."""
    done = call(*arguments, **options)
    if done.returncode:
        raise EngineError(explain(done.stderr) or f"docker {arguments[0]}: {last_line(done.stderr)}")
    return done.stdout


def call(*arguments, **options):
    if not shutil.which("docker"):
        raise EngineError(f"Docker is not installed: {INSTALL}; RUNTIME=host runs without it")
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, **options)


def explain(text):
    """One line for a known complaint of docker's, else None."""
    address = os.environ.get("DOCKER_HOST", "/var/run/docker.sock")
    if re.search(r"permission denied.*(docker\.sock|daemon socket|docker API)", text):
        return (
            f"you may not use Docker ({address}): `sudo usermod -aG docker $USER`, then log in again; "
            "members of that group are as good as root"
        )
    if re.search(
        r"[Cc]annot connect to the Docker|failed to connect to the docker API|error during connect", text
    ):
        return f"the Docker daemon does not answer ({address}): `sudo systemctl start docker`, then `systemctl status docker`"
    if re.search(r"is not a docker command|unknown (?:shorthand )?flag|unknown command", text):
        return None  # the caller knows which plugin that is
    if "no space left on device" in text:
        return "the disk of Docker's data is full: `docker system df` shows what is on it, `docker builder prune` frees the build cache"
    if re.search("could not select device driver|unresolvable CDI devices|CDI device injection failed", text):
        return no_gpu_line()
    if "rlimit" in text or "RLIMIT" in text:
        return (
            "this host forbids locking memory (ulimit memlock), which pinned buffers want: for rootless Docker set "
            "LimitMEMLOCK=infinity in its systemd unit, or take the lines `ulimits` out of compose.yaml"
        )
    return None


def no_gpu_line():
    return (
        "Docker has no NVIDIA GPU to give: `make provision` brings the NVIDIA container toolkit; where it is there, "
        "`sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`; without a GPU, FLAVOUR=cpu"
    )


def last_line(text):
    return (text.strip().splitlines() or ["no message"])[-1]


def info():
    """What the daemon says of itself. Raises EngineError where it does not answer."""
    found = json.loads(docker("info", "--format", "{{json .}}"))
    errors = found.get("ServerErrors")
    if errors:  # some versions of docker end with 0 all the same
        raise EngineError(explain(" ".join(errors)) or errors[0])
    return found


def require_compose():
    done = call("compose", "version", "--short")
    version = re.match(r"v?(\d+)\.(\d+)", done.stdout.strip())
    if done.returncode or not version:
        raise EngineError(
            "the compose plugin of Docker is missing: `sudo apt install docker-compose-plugin` (Debian: docker-compose)"
        )
    if (int(version[1]), int(version[2])) < NEEDED_COMPOSE:
        raise EngineError(
            f"docker compose is {done.stdout.strip()}, expected {'.'.join(map(str, NEEDED_COMPOSE))} or newer: update Docker's packages"
        )


def require_builder():
    """What `make build` needs beside the daemon."""
    if call("buildx", "version").returncode:
        raise EngineError(
            "the buildx plugin of Docker is missing: `sudo apt install docker-buildx-plugin` (Debian: docker-buildx)"
        )
    if ["driver-type", "io.containerd.snapshotter.v1"] not in (info().get("DriverStatus") or []):
        raise EngineError(
            "Docker keeps images in its old store, which cannot make one of a known digest: put "
            '{"features": {"containerd-snapshotter": true}} into /etc/docker/daemon.json, then `sudo systemctl restart docker`'
        )


def gpu_devices(folders=CDI_FOLDERS):
    """CDI names of NVIDIA GPUs that a container may be given, as far as this machine's files say.

    CDI makes the GPUs part of the container's own description, so that runc and systemd know of them. GPUs that
    the older hook slips in (`--gpus`) are lost at the next `systemctl daemon-reload` (container toolkit, issues 48, 1227).
    """
    for folder in folders:
        for file in sorted(Path(folder).glob("*")):
            if file.suffix not in (".yaml", ".json"):
                continue
            if re.search(r"kind[\"']?:\s*[\"']?nvidia\.com/gpu", file.read_text(errors="replace")):
                return ["nvidia.com/gpu=all"]
    return []


def require_gpus():
    folders = info().get("CDISpecDirs") or []
    if not gpu_devices([*folders, *CDI_FOLDERS]):
        raise EngineError(no_gpu_line())
    if not folders:
        raise EngineError(
            'Docker does not read the GPUs\' description (CDI): put {"features": {"cdi": true}} into /etc/docker/daemon.json, '
            "then `sudo systemctl restart docker`; Docker 25 or newer is needed"
        )


def image(name):
    """(digest, labels) of a local image, or None."""
    done = call("image", "inspect", name)
    if done.returncode:
        if re.search(r"[Nn]o such image|image.* not found", done.stderr):  # not: "context not found"
            return None
        raise EngineError(explain(done.stderr) or f"docker image inspect: {last_line(done.stderr)}")
    found = json.loads(done.stdout)[0]
    return found["Id"], found["Config"].get("Labels") or {}
