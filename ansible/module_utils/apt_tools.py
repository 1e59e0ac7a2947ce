"""What the modules `packages` and `apt_source` share: running apt and waiting for its locks, dpkg's database, and files
that are whole or not there.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.apt_failures import explain, one_line

LOCKS = (
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
)
ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",  # the texts that explain() reads are apt's English ones
    "LANGUAGE": "",
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_MODE": "a",
    "UCF_FORCE_CONFFOLD": "1",
}
APT_GET = (
    "apt-get",
    "-q",
    "-oAcquire::Retries=3",
    "-oDPkg::Lock::Timeout=0",  # we wait ourselves, so as to end with a line that says for whom
    "-oAPT::Get::AutomaticRemove=false",  # whatever the user's settings: never more than we were asked for
)
UPDATE = (*APT_GET, "-oAPT::Update::Error-Mode=any", "update")
LISTS = Path("/var/lib/apt/lists")


class AptError(Exception):
    """One line for the user; `text` is what apt printed."""

    def __init__(self, message: str, text: str = ""):
        super().__init__(without_passwords(message))
        self.text = text

    @property
    def log(self) -> list[str]:
        return self.text.splitlines()[-40:]


def without_passwords(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


class LockError(AptError):
    """Another program has apt for longer than we wait."""


def run(command: Sequence[str]) -> tuple[int, str]:
    """Exit status, and stdout and stderr as they came."""
    # Not a pipe, and a session of its own: when the play is killed or the connection drops, apt and dpkg go on to their
    # end instead of dying in the middle of a package. In memory, as the disk may be what is full.
    with os.fdopen(os.memfd_create("apt"), "w+b") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise AptError(f"{command[0]} not found: expected Debian or Ubuntu with apt and dpkg") from None
        output.seek(0)
        text = output.read().decode(errors="replace").replace("\r\n", "\n")
    if done.returncode < 0:
        text += f"\nE: {command[0]} was killed (signal {-done.returncode})"
    # Errors come unbuffered, in the middle of a line.
    text = re.sub(r"(\.\.\.)(?=[EW]: )", r"\1\n", text)
    # dpkg counts up within one line when it believes in a terminal.
    text = without_passwords(text)
    return done.returncode, re.sub(r"\(Reading database \.\.\. (?:\d+%)?\r?", "", text)


def lock_holder(path: str) -> tuple[int, str] | None:
    """Who holds a write lock on this file: its process id and its program's name."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise AptError(f"{path} cannot be read; expected to run as root (become: true)") from None
    try:
        # struct flock of 64-bit Linux: type, whence, start, length, process
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, process = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
    finally:
        os.close(file)
    return None if kind == fcntl.F_UNLCK else (process, program(process))


def program(process: int) -> str:
    """The name that a person knows a process by: the script's, where an interpreter runs one."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = [""]
    name = os.path.basename(words[0])
    if (
        re.fullmatch(r"(python|perl|bash|sh|dash)[\d.]*", name)
        and len(words) > 1
        and words[1].startswith("/")
    ):
        name = os.path.basename(words[1])
    return name or "another program"


def await_locks(lock_seconds: float) -> None:
    """Returns when nobody holds one of apt's locks. LockError when that takes longer than `lock_seconds`."""
    end = time.monotonic() + lock_seconds
    while True:
        holder = next((found for path in LOCKS if (found := lock_holder(path))), None)
        if not holder:
            return
        if time.monotonic() >= end:
            raise LockError(
                f"apt is locked by {holder[1]} (pid {holder[0]}) since more than {lock_seconds:g} s; "
                "expected it to be free; wait until it ends, then run the play again"
            )
        time.sleep(0.5)


def run_locked(command: Sequence[str], lock_seconds: float) -> tuple[int, str]:
    """run(), once nobody else has apt. LockError when that takes longer than `lock_seconds`."""
    end = time.monotonic() + lock_seconds
    while True:
        await_locks(lock_seconds)
        status, text = run(command)
        # Another one may have been faster between our look and apt's.
        taken = re.search(r"Could not get lock|frontend lock was locked|is another process using it", text)
        if not status or not taken or time.monotonic() > end:
            return status, text
        time.sleep(0.5)


@dataclass(frozen=True)
class Package:
    """A line of dpkg's database. `name` has ":ARCHITECTURE" only where that is not the host's."""

    name: str
    version: str
    want: str  # i install, h hold, r remove, p purge, u unknown
    status: str  # i installed, c only its settings, n nothing, others: in between
    essential: bool
    depends: str
    provides: str

    @property
    def installed(self) -> bool:
        return self.status == "i"

    @property
    def exists(self) -> bool:
        """Installed, or in between."""
        return self.status not in "nc"

    @property
    def held(self) -> bool:
        return self.want == "h"


def database(*names: str) -> dict[str, Package]:
    """All packages that dpkg knows something of, by name; or only these."""
    fields = (
        "${Package}",
        "${Architecture}",
        "${Version}",
        "${db:Status-Abbrev}",
        "${Essential}${Protected}",
        "${Pre-Depends}, ${Depends}",
        "${Provides}",
    )
    command = ["dpkg-query", "-W", "-f", "\x1f".join(fields) + "\x1e", "--", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    except FileNotFoundError:
        raise AptError("dpkg-query not found: expected Debian or Ubuntu") from None
    if done.returncode > 1 or (done.returncode and not names):
        raise AptError(f"dpkg's database cannot be read: {one_line(done.stderr)}")
    rows = [row.split("\x1f") for row in done.stdout.split("\x1e") if "\x1f" in row]
    packages = {}
    for name, architecture, version, status, essential, depends, provides in rows:
        if architecture not in ("all", native_architecture()):
            name = f"{name}:{architecture}"
        packages[name] = Package(name, version, status[0], status[1], "yes" in essential, depends, provides)
    return packages


_native: list[str] = []


def native_architecture() -> str:
    if not _native:
        _native.append(run(["dpkg", "--print-architecture"])[1].strip())
    return _native[0]


def relations(text: str) -> list[list[str]]:
    """Names in a field such as Depends: a list of groups, each of which any one name satisfies."""
    groups = []
    for group in text.split(","):
        names = [re.sub(r"[(\[<:].*", "", word, flags=re.DOTALL).strip() for word in group.split("|")]
        if any(names):
            groups.append([name for name in names if name])
    return groups


@dataclass(frozen=True)
class Plan:
    """What a call of apt-get would do; versions by name."""

    new: dict[str, str]
    other: dict[str, tuple[str, str]]  # from, to: upgrades, downgrades, reinstallations
    gone: dict[str, str]
    configure: list[str]

    def __bool__(self) -> bool:
        return bool(self.new or self.other or self.gone or self.configure)

    def lines(self) -> list[str]:
        return [
            *(f"+ {name} {version}" for name, version in sorted(self.new.items())),
            *(f"- {name} {version}" for name, version in sorted(self.gone.items())),
            *(f"~ {name} {old} -> {new}" for name, (old, new) in sorted(self.other.items())),
        ]


def simulate(words: Sequence[str], names: Iterable[str]) -> Plan:
    """The plan for `apt-get WORDS`. AptError (about `names`) where apt finds none."""
    status, text = run([*APT_GET, "-s", *words])
    if status:
        raise AptError(explain(text, names), text)
    new, other, gone, configure = {}, {}, {}, []
    for line in text.splitlines():
        if found := re.match(r"Inst (\S+) (?:\[(\S+)\] )?\((\S+)", line):
            name, old, version = found.groups()
            if old:
                other[name] = (old, version)
            else:
                new[name] = version
        elif found := re.match(r"(?:Remv|Purg) (\S+)(?: \[(\S+)\])?", line):
            gone[found[1]] = found[2] or ""
        elif line.startswith("Conf "):
            configure.append(line.split()[1])
    return Plan(new, other, gone, configure)


@dataclass(frozen=True)
class Known:
    """What apt's lists say of a name."""

    installed: str | None
    candidate: str | None
    versions: tuple[str, ...]


def policy(names: Iterable[str]) -> dict[str, Known]:
    """Of these names, those that apt can install or has installed."""
    status, text = run(["apt-cache", "policy", "--", *names])
    if status:
        raise AptError(explain(text, names), text)
    known = {}
    for block in re.split(r"^(?=\S+:$)", text, flags=re.MULTILINE):
        values = dict(re.findall(r"^  (Installed|Candidate): (.+)", block, re.MULTILINE))
        if values.get("Candidate", "(none)") != "(none)":
            # one blank less before the version that is installed: "*** 1.0 100"
            versions = re.findall(r"^ (?:   |\*\*\*) (\S+) -?\d+$", block, re.MULTILINE)
            installed = values.get("Installed", "(none)")
            known[block.split(":\n")[0]] = Known(
                None if installed == "(none)" else installed, values["Candidate"], tuple(versions)
            )
    return known


def auto_installed() -> set[str]:
    """Names that apt keeps only as long as another package needs them."""
    try:
        text = Path("/var/lib/apt/extended_states").read_text()
    except FileNotFoundError:
        return set()
    found = re.findall(r"^Package: (\S+)\nArchitecture: (\S+)\nAuto-Installed: 1$", text, re.MULTILINE)
    # packages of no architecture stand there with the host's
    return {
        name if architecture == native_architecture() else f"{name}:{architecture}"
        for name, architecture in found
    }


def lists_age_seconds() -> float:
    """How long ago `apt-get update` ended; each one leaves its time on the folder that it loads into."""
    times = [path.stat().st_mtime for path in (LISTS, LISTS / "partial") if path.exists()]
    return time.time() - max(times, default=0)


def write_whole(path: Path, data: bytes) -> None:
    """The file (0644) is the old one or the new one whenever the machine stops; its folder (0755) is made."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o755)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
