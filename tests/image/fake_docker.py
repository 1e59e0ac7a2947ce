"""A `docker` that answers as the real client does, for tests that need no engine.

It takes its answers from state.json beside it and writes what it was asked, with its environment, to calls.jsonl.
The texts and exit codes are those of the clients 26 (Debian's) and 28, and of 29 where it speaks otherwise.
"""

import json
import os
import sys
import time
from pathlib import Path

SOCKET = "unix:///var/run/docker.sock"
# Where the engine cannot be reached: (version of the client, what it says).
UNREACHABLE = {
    "down": (26, "Cannot connect to the Docker daemon at {at}. Is the docker daemon running?"),
    "down 28": (28, "Cannot connect to the Docker daemon at {at}. Is the docker daemon running?"),
    "down 29": (
        29,
        "failed to connect to the docker API at {at}; check if the path is correct and if the daemon is running: "
        "dial unix {socket}: connect: no such file or directory",
    ),
    "denied": (
        26,
        "permission denied while trying to connect to the Docker daemon socket at {at}: "
        'Get "http://{quoted}/v1.45{path}": dial unix {socket}: connect: permission denied',
    ),
    "denied 29": (29, "permission denied while trying to connect to the docker API at {at}"),
    "no such context": (
        28,
        'Failed to initialize: unable to resolve docker endpoint: context "nosuch": context not found: '
        "open /home/me/.docker/contexts/meta/9e62/meta.json: no such file or directory",
    ),
}
NO_PLUGIN = {
    # A flag that it does not know is what the client complains of first.
    ("compose", "26"): (
        125,
        "unknown flag: --short\nSee 'docker --help'.\n\nUsage:  docker [OPTIONS] COMMAND\n",
    ),
    ("compose", "28"): (
        125,
        "unknown flag: --short\n\nUsage:  docker [OPTIONS] COMMAND [ARG...]\n\nRun 'docker --help' for more information\n",
    ),
    ("compose", "no flag"): (1, "docker: 'compose' is not a docker command.\nSee 'docker --help'\n"),
    ("buildx", "26"): (1, "docker: 'buildx' is not a docker command.\nSee 'docker --help'\n"),
    ("buildx", "28"): (
        1,
        "docker: unknown command: docker buildx\n\nRun 'docker --help' for more information\n",
    ),
}
CONTAINERD_STORE = [["driver-type", "io.containerd.snapshotter.v1"]]
OVERLAY2_STORE = [["Backing Filesystem", "extfs"], ["Supports d_type", "true"]]
GOOD = {
    "engine": "up",
    "compose": "2.26.1-4",
    "buildx": "0.13.1",
    "images": {},
    "info": {"DriverStatus": CONTAINERD_STORE, "CDISpecDirs": [], "DockerRootDir": "/var/lib/docker"},
    "build": [0, ""],  # exit code and output of `buildx build`
    "runs": [],  # [exit code, stderr] of each `compose run`, in turn; 0 after those
    "until_killed": False,  # a container runs until `docker kill`
}


def end(code, out="", err=""):
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.exit(code)


def require_engine(state, path):
    if state["engine"] != "up":
        version, text = UNREACHABLE[state["engine"]]
        at = os.environ.get("DOCKER_HOST", SOCKET)
        socket = at.removeprefix("unix://")
        text = text.format(at=at, path=path, socket=socket, quoted=socket.replace("/", "%2F")) + "\n"
        if path == "/info":
            answer = {"DriverStatus": None, "CDISpecDirs": None, "DockerRootDir": ""}
            if version < 28:  # this one ends with 0
                end(0, json.dumps(answer | {"ServerErrors": [text.strip()]}) + "\n", text)
            end(1, json.dumps(answer) + "\n", text)
        end(1, "[]\n" if path.startswith("/images") else "", text)


def main(folder, arguments):
    state = json.loads((folder / "state.json").read_text())
    with open(folder / "calls.jsonl", "a") as log:
        print(json.dumps({"argv": arguments, "env": dict(os.environ)}), file=log)
    for plugin in ("compose", "buildx"):
        if arguments[0] == plugin and state[plugin].startswith("missing "):
            code, text = NO_PLUGIN[plugin, state[plugin].removeprefix("missing ")]
            end(code, err=text)
    match arguments:
        case ["info", "--format", "{{json .}}"]:
            require_engine(state, "/info")
            end(0, json.dumps(state["info"]) + "\n")
        case ["image", "inspect", name]:
            require_engine(state, f"/images/{name}/json")
            if name not in state["images"]:
                end(1, "[]\n", f"Error response from daemon: No such image: {name}\n")
            end(0, json.dumps([state["images"][name]]) + "\n")
        case ["compose", "version", "--short"]:
            end(0, state["compose"] + "\n")
        case ["buildx", "version"]:
            end(0, f"github.com/docker/buildx {state['buildx']} {state['buildx']}\n")
        case ["buildx", "build", *_]:
            end(*state["build"])
        case ["compose", *_]:
            code, text = state["runs"].pop(0) if state["runs"] else (0, "")
            (folder / "state.json").write_text(json.dumps(state))
            while state["until_killed"] and not (folder / "killed").exists():
                time.sleep(0.05)
            end(code, err=text)
        case ["kill", *_]:
            (folder / "killed").touch()
            end(0)
    end(125, err=f"unknown flag or command: {arguments}\n")


class FakeDocker:
    """A folder that is all of PATH: what `make` calls, and docker."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.put("python3", f'exec "{sys.executable}" "$@"')
        self.put("docker", f'exec "{sys.executable}" -IS "{__file__}" "{folder}" "$@"')
        self.set()

    def put(self, name, line):
        (self.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.folder / name).chmod(0o755)

    def set(self, **state):
        state["info"] = GOOD["info"] | state.get("info", {})
        (self.folder / "state.json").write_text(json.dumps(GOOD | state))

    def remove(self):
        (self.folder / "docker").unlink()

    def calls(self):
        """What docker was asked: dicts of argv and env."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def runs(self):
        """The calls that start a container."""
        return [call for call in self.calls() if call["argv"][0] == "compose" and "run" in call["argv"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
