""".ci/engine: one that was killed leaves nothing that harms the next, and can be cleared away afterwards."""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.docker.calls import ROOT
from tests.machine import needs

PROGRAMS = ("dockerd", "unshare", "ldd")
pytestmark = [
    pytest.mark.docker,
    needs(os.getuid() == 0 and all(map(shutil.which, PROGRAMS)), "root and dockerd"),
]
# In name spaces of their own: the machine's firewall stays as it is, and `kill -1` reaches what was started here alone.
ALONE = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c")
STEPS = """
set -eu
engine() { env -u DOCKER_HOST bash .ci/engine "$@"; }
start() {
  mkdir "$1"
  engine start "$1" >"$1/settings"
  . "$1/settings"
  docker import - image <"$IMAGE" >/dev/null
}
address() {
  container=$(docker run --detach image sleep 600)
  docker inspect --format '{{.NetworkSettings.IPAddress}}' "$container"
}
left() { echo "$(grep -c " $1/" /proc/mounts) mounts, $(ip -o link show type bridge | grep -c engine-) bridges" || true; }

ip link set lo up
start "$A"
echo "first: $(address)"
kill -9 -1
start "$B"
echo "second: $(address)"
echo "killed: $(left "$A")"
engine stop "$A"
echo "cleared: $(left "$A")"
. "$B/settings"
echo "alive: $(docker ps --quiet | wc -l)"
engine stop "$B"
echo "stopped: $(left "$B")"
"""


def write_image(path: Path) -> None:
    """`sleep` and the libraries that it needs."""
    program = Path(shutil.which("sleep") or "").resolve()
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    with tarfile.open(path, "w") as tar:
        tar.add(program, "bin/sleep")
        for library in re.findall(r"(/\S+) \(0x", said):
            tar.add(os.path.realpath(library), library.lstrip("/"))


@pytest.fixture
def short():
    """A folder whose sockets have names of few enough characters."""
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/var/tmp") as folder:
        yield Path(folder)


def test_a_killed_engine_does_not_harm_the_next(short):
    """Its containers' network goes on answering: on a bridge that both used, their addresses were given away twice."""
    write_image(short / "image.tar")
    names = {"A": short / "killed", "B": short / "next", "IMAGE": short / "image.tar"}
    done = subprocess.run(
        [*ALONE, STEPS],
        cwd=ROOT,
        env=os.environ | {name: str(path) for name, path in names.items()},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert re.match(r"172\.31\.\d+\.2$", said["first"]) and said["second"] != said["first"]
    assert re.match(r"[1-9]\d* mounts, 2 bridges", said["killed"])
    assert said["cleared"] == "0 mounts, 1 bridges" and said["alive"] == "1"
    assert said["stopped"] == "0 mounts, 0 bridges"
    assert not names["A"].exists() and not names["B"].exists()
