"""Throw-away hosts for the tests of the Ansible playbook: Debian with systemd and ssh, each in a Docker container.

    with Host("bookworm", mirror, key) as host:      # started in two seconds
        host.play("provision.yml", "--tags", "swap")  # our playbook, from this machine, over ssh
        assert host.run("swapon --show --noheadings").stdout

Real are systemd, dpkg, apt, ssh, sudo and Ansible; what the machine lacks is played by tests/provision/standins.py. The
containers are privileged: root in them can change the machine's kernel settings, of which only vm.* are a host's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.provision.standin.mirror import Mirror
from tests.provision.standin.state import difference as difference  # for the tests, beside Host.state

ROOT = Path(__file__).resolve().parents[2]
FILES = Path(__file__).parent / "standin/files"
CACHE = Path("/var/tmp/qlora-provision-hosts")
RELEASES = ("bookworm", "trixie")
IMAGE = "qlora-provision-host"
COMMITTED: list[str] = []  # images that Host.commit made, for this session
START_SECONDS = 60
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
# What pip, Python and curl on this machine need to reach the network, the hosts need too.
CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PASSED_ON = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")
# A file is the host's own, whatever another's of the same name; a device is the machine's too.
CLEAN_UP = """
tail -n +2 /proc/swaps | while read -r path kind rest; do
  if [ -f "$path" ]; then swapoff "$path"; continue; fi
  case " $KEEP " in *" $path "*) ;; *) [ ! -e "$path" ] || swapoff "$path" ;; esac
done 2>/dev/null
losetup -nO NAME,BACK-FILE | while read -r loop file; do [ ! -e "$file" ] || losetup -d "$loop"; done
"""


def docker(*words: str, data: bytes | None = None, check: bool = True) -> str:
    """The output of a docker command. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run(
        ["docker", *words], input=data, stdin=None if data else subprocess.DEVNULL, capture_output=True
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace").strip()


def gateway() -> str:
    """The address at which a container reaches this machine."""
    return docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")


def make_key(folder: Path) -> Path:
    """A new key pair for ssh; the private key's file."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key], check=True)
    return key


def start_mirror() -> Mirror:
    """The hosts' network, with the Debian mirror of this machine (or DEBIAN_MIRROR=) behind it."""
    scripts = str(ROOT / "scripts")
    if scripts not in sys.path:
        sys.path.insert(0, scripts)
    import debian

    with alone():  # apt, too, is one session's at a time
        done = subprocess.run(["bash", ROOT / ".ci/hosts", "tools"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"what the lab needs could not be installed: {done.stderr.strip()}")
    return Mirror(gateway(), CACHE, debian.mirrors())


@contextmanager
def alone() -> Iterator[None]:
    """One session at a time fills the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- images -----------------------------------------------------------------------------------------------


def make_images(mirror: Mirror) -> dict[str, str]:
    """{release: image}: made by .ci/hosts where there is none of today, both at once (a minute and a half).

    Yesterday's would do, if only no update came in between: a package that needs it would then bring it along, and
    what removes the package would leave it.
    """
    script = ROOT / ".ci/hosts"
    made = f"{datetime.now(UTC):%Y%m%d}-{hashlib.sha256(script.read_bytes()).hexdigest()[:8]}"
    images = {release: f"{IMAGE}:{release}" for release in RELEASES}
    with alone():
        format_ = '{{index .Config.Labels "made"}}'
        missing = [
            release
            for release, image in images.items()
            if docker("image", "inspect", "--format", format_, image, check=False) != made
        ]
        tars = {release: CACHE / f"{release}-{made}.tar" for release in RELEASES}
        for old in CACHE.glob("*.tar*"):
            if old not in tars.values():
                old.unlink()
        for work in [
            _start_image(release, images[release], tars[release], made, mirror) for release in missing
        ]:
            _, errors = work.communicate()
            if work.returncode:
                raise RuntimeError(
                    f"the image of a host could not be made: {errors[-2000:].decode(errors='replace')}"
                )
    return images


def _start_image(release: str, image: str, tar: Path, made: str, mirror: Mirror) -> subprocess.Popen:
    make = (
        ""
        if tar.exists()
        else shlex.join(["bash", str(ROOT / ".ci/hosts"), release, mirror.address, str(tar)])
    )
    changes = ['CMD ["/lib/systemd/systemd"]', "STOPSIGNAL SIGRTMIN+3", f"LABEL made={made}"]
    options = [word for change in changes for word in ("--change", change)]
    load = shlex.join(["docker", "import", *options, str(tar), image])
    return subprocess.Popen(
        ["bash", "-ec", f"{make}\n{load}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def remove_committed() -> None:
    """Remove what `Host.commit` made."""
    while COMMITTED:
        docker("image", "rm", "--force", COMMITTED.pop(), check=False)


# --- hosts ------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What a run of a playbook against one host came to."""

    returncode: int
    stdout: str
    stderr: str
    recap: dict[str, int] = field(default_factory=dict)  # ok, changed, unreachable, failed, skipped, …
    tasks_changed: list[str] = field(default_factory=list)


class Host:
    """A Debian host from `with` to its end, reached by ssh as `owner`, who may sudo, or as `guest`, who may not."""

    def __init__(self, release: str, mirror: Mirror, key: Path, image: str | None = None):
        """A host of a release, or of an image that `commit` made of one."""
        self.release, self.mirror, self.key = release, mirror, key
        self.image = image or f"{IMAGE}:{release}"
        self.name = f"{release}-{secrets.token_hex(3)}"
        self.container = f"{IMAGE}-{self.name}"
        self.address = ""
        # Short: the path of a socket in it may have 108 characters.
        self._scratch = Path(tempfile.mkdtemp(prefix="lab-"))

    def __enter__(self) -> Host:
        self._swaps = [line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]]
        # /run, /run/lock and /tmp as systemd wants them. Docker's stores cannot lie on the container's overlay.
        mounts = ["--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp:exec"]
        mounts += ["--volume=/var/lib/docker", "--volume=/var/lib/containerd"]
        variables = [f"--env={name}={value}" for name, value in _variables().items()]
        options = ["--privileged", "--cgroupns=private", "--restart=unless-stopped"]
        options += [f"--name={self.container}", f"--hostname={self.name}"]
        try:
            docker("create", *options, *mounts, *variables, self.image)
            docker("cp", "-", f"{self.container}:/", data=self._settings())
            docker("start", self.container)
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for control in self._scratch.glob("cp/*"):  # ssh connections that Ansible keeps for a minute
            subprocess.run(["ssh", "-o", f"ControlPath={control}", "-O", "exit", "host"], capture_output=True)
        self._give_back()
        docker("rm", "--force", "--volumes", self.container, check=False)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def reboot(self, degraded: bool = False) -> None:
        """Restart the host. What `standins` put into it is there again, with the driver that would then be loaded.

        `reboot` in the host does the same, if later: the container's engine starts it again. With `degraded`, services
        may fail to start.
        """
        self._give_back()
        docker("restart", "--time", "30", self.container)
        self._wait(degraded)

    def _give_back(self) -> None:
        """End what would outlive the container, for the kernel is the machine's: swap and loop devices."""
        if self.address:
            self.run(f"KEEP={shlex.quote(' '.join(self._swaps))}\n{CLEAN_UP}", check=False)

    def run(
        self,
        command: str,
        user: str = "root",
        check: bool = True,
        input: str | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the host. Raises RuntimeError with its output where it fails and `check` is set."""
        words = ["docker", "exec", *(["-i"] if input is not None else []), "-u", user, self.container]
        done = subprocess.run(
            [*words, "sh", "-c", command],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: {command}: ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def python(self, script: Path, *arguments: str) -> str:
        """The output of a Python program of ours that runs in the host as root."""
        return self.run(f"python3 - {shlex.join(arguments)}", input=script.read_text()).stdout

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file as root, with the folders that it needs."""
        self.run(f"install -D -m {mode:o} /dev/stdin {shlex.quote(path)}", input=text)

    def read(self, path: str) -> str:
        return self.run(f"cat {shlex.quote(path)}").stdout

    def commit(self, name: str) -> str:
        """Make an image of the host as it is, without Docker's stores and what is mounted; its name, for other hosts.

        A host of it starts as this one would: with the stand-ins, and the driver that a start loads.
        """
        image = f"{IMAGE}:{name}-{secrets.token_hex(3)}"
        docker("commit", self.container, image)
        COMMITTED.append(image)
        return image

    def inventory(self) -> str:
        """An inventory with this host in it; to become root is the playbook's."""
        ssh = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        return (
            f"{self.name} ansible_host={self.address} ansible_user=owner"
            f" ansible_ssh_private_key_file={self.key} ansible_ssh_common_args='{ssh}'\n"
        )

    def play(
        self,
        playbook: str | Path,
        *options: str,
        extra: Mapping[str, object] | None = None,
        check: bool = True,
        timeout: float = 1200,
    ) -> Played:
        """Run a playbook of ansible/ against this host. Raises RuntimeError where it fails and `check` is set."""
        with self.start_play(playbook, *options, extra=extra) as running:
            try:
                stdout, stderr = running.communicate(timeout=timeout)
            except BaseException:
                os.killpg(running.pid, signal.SIGKILL)
                raise
        if check and running.returncode:
            raise RuntimeError(f"{self.name}: {playbook} ended with {running.returncode}\n{stdout}{stderr}")
        return Played(running.returncode, stdout, stderr, *_read_output(stdout, self.name))

    def start_play(
        self, playbook: str | Path, *options: str, extra: Mapping[str, object] | None = None
    ) -> subprocess.Popen[str]:
        """Start `play`, in a process group of its own, so that it can be killed with all that it started here."""
        inventory = self._scratch / "inventory"
        inventory.write_text(self.inventory())
        words = [_ansible_playbook(), "-i", str(inventory), str(playbook), *options]
        if extra:
            words += ["-e", json.dumps(extra)]
        settings = {
            "ANSIBLE_HOME": str(self._scratch),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._scratch / "cp"),
        }
        return subprocess.Popen(
            words,
            cwd=ROOT / "ansible",
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def state(self) -> dict:
        """What must be the same before provision and after its removal; `difference` compares two of them."""
        return json.loads(self.python(FILES / "take_state.py"))

    def _wait(self, degraded: bool = False) -> None:
        """Until systemd has started everything and ssh answers. Raises RuntimeError where it does not.

        With `degraded`, some of it may have failed.
        """
        self.address = docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", self.container)
        end = time.monotonic() + START_SECONDS
        state = ""
        while time.monotonic() < end:
            done = self.run("systemctl is-system-running --wait", check=False, timeout=START_SECONDS)
            state = done.stdout.strip()
            if state == "degraded" and not degraded:
                break
            if state in ("running", "degraded") and _ssh_answers(self.address):
                return
            time.sleep(0.1)
        failed = self.run("systemctl --no-pager --failed", check=False).stdout
        what = (
            f"ssh does not answer at {self.address}"
            if state == "running"
            else f"systemd says {state or 'nothing'!r}"
        )
        raise RuntimeError(f"{self.name}: {what}\n{failed}")

    def _settings(self) -> bytes:
        """A tar of what makes a host one of this session: keys, the mirror, certificates."""
        public = self.key.with_suffix(".pub").read_text()
        variables = _variables()
        proxy = f'Acquire::http::Proxy::deb.debian.org "{self.mirror.address}";\n'
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for user, number in (("owner", 1000), ("guest", 1001)):
                _add(tar, f"home/{user}/.ssh", None, 0o700, number)
                _add(tar, f"home/{user}/.ssh/authorized_keys", public, 0o600, number)
            _add(tar, "etc/apt/apt.conf.d/00mirror", proxy)
            _add(tar, "usr/lib/systemd/system/standin.service", (FILES / "standin.service").read_text())
            _add(tar, "usr/lib/systemd/system/sysinit.target.wants/standin.service", "-> ../standin.service")
            _add(tar, "opt/standin/boot", (FILES / "boot").read_text(), 0o755)
            _add(tar, "opt/lab/ca.crt", Path(CA_BUNDLE).read_text())
            # For sessions over ssh, and for what they start with sudo.
            _add(tar, "etc/environment", "".join(f"{name}={value}\n" for name, value in variables.items()))
            _add(tar, "etc/sudoers.d/lab", f'Defaults env_keep += "{" ".join(variables)}"\n', 0o440)
        return out.getvalue()


def _variables() -> dict[str, str]:
    found = {name: "/opt/lab/ca.crt" for name in CA_VARIABLES}
    return found | {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def _add(tar: tarfile.TarFile, name: str, text: str | None, mode: int = 0o644, owner: int = 0) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid, entry.mtime = mode, owner, owner, int(time.time())
    content = (text or "").encode()
    entry.size = len(content)
    if text is None:
        entry.type = tarfile.DIRTYPE
    elif text.startswith("-> "):
        entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, text[3:], 0
    tar.addfile(entry, io.BytesIO(content))


def _ssh_answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _ansible_playbook() -> str:
    """The set-up's own, or one on PATH; ANSIBLE_PLAYBOOK= names another."""
    named = os.environ.get("ANSIBLE_PLAYBOOK")
    beside = str(Path(sys.executable).parent)
    found = named or shutil.which("ansible-playbook", path=f"{ROOT / '.venv/bin'}{os.pathsep}{beside}")
    found = found or shutil.which("ansible-playbook")
    if not found:
        raise RuntimeError("ansible-playbook is not installed: `make setup`")
    return found


def _read_output(output: str, host: str) -> tuple[dict[str, int], list[str]]:
    """(recap, names of the tasks that changed something) of what ansible-playbook printed."""
    recap: dict[str, int] = {}
    changed: list[str] = []
    task = None
    for line in output.splitlines():
        if named := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*+$", line):
            task = named[1]
        elif line.startswith(f"changed: [{host}") and task is not None:
            changed.append(task)
            task = None  # a loop says it for each item
        elif re.match(rf"{re.escape(host)}\s+: ok=", line):
            recap = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}
    return recap, changed
