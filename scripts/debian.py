"""The image's Debian packages: lock them, fetch them by hash, and make of them the base of the image.

    make lock      # image/debian.lock: every package by version, place in the archive and SHA-256
    make base      # build/image/base.tar: the same bytes everywhere (a few seconds)
    scripts/debian.py fetch cpu|gpu    # what an image needs, into build/image/debs

apt resolves and downloads, in a folder of its own and without root, and dpkg-deb unpacks: both are on every Debian and
Ubuntu. The packages come from the Debian mirrors that apt uses on this machine, or from DEBIAN_MIRROR=
(the address that ends with /debian; /debian-security is looked for beside it). A mirror keeps a version only until the
next one: an archive of the lock's date, such as Debian's snapshot service, keeps all.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from setup import SetupError, say

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "image/debian.lock"
SUITE, RELEASE, ARCHITECTURE = "bookworm", "12", "amd64"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
APT_HELPER = "/usr/lib/apt/apt-helper"
ARCHIVES = {"debian": (SUITE, f"{SUITE}-updates"), "debian-security": (f"{SUITE}-security",)}

# What each part brings; apt adds what these depend on. The base is Debian's essential packages, without apt.
WANTED = {
    "base": ["?essential ?not(?name(^apt$))", "usr-is-merged"],
    "cpu": [
        "python3",
        "libstdc++6",
        "libgomp1",
        "tini",
    ],  # torch and bitsandbytes are linked with the libraries
    "gpu": ["gcc", "libc6-dev", "libpython3.11-dev"],  # Triton compiles its launchers on first use
}
# Parts of an image, each on top of those before.
PARTS = {"cpu": ("base", "cpu"), "gpu": ("base", "cpu", "gpu")}
# Documentation and translations, which nobody reads in a container (image/install-debian has dpkg leave them out too).
LEFT_OUT = tuple(f"usr/share/{kind}/" for kind in ("doc", "doc-base", "man", "info", "locale", "lintian"))
MERGED = ("bin", "sbin", "lib", "lib64")  # links into /usr, as everywhere in Debian 12
HEADER = """\
# Made by `make lock`; do not edit. Debian {release} ({suite}), {architecture}.
# Date: {date}
# part  package  version  archive  place  SHA-256
"""


def read_lock(lock=LOCK):
    """(date, entries): each entry a dict of part, package, version, archive, place, sha256."""
    names = ("part", "package", "version", "archive", "place", "sha256")
    lines = lock.read_text().splitlines()
    date = next(line.partition("Date: ")[2] for line in lines if line.startswith("# Date: "))
    return date, [
        dict(zip(names, line.split(), strict=True)) for line in lines if line and not line.startswith("#")
    ]


def epoch(lock=LOCK):
    """SOURCE_DATE_EPOCH of the image, seconds: the lock's date, so that it does not depend on the clone's history."""
    import calendar

    return calendar.timegm(time.strptime(read_lock(lock)[0], "%Y-%m-%dT%H:%M:%SZ"))


# --- where the packages come from -------------------------------------------------------------------------


def mirrors(environ=os.environ, apt="/etc/apt"):
    """Address of each archive. Raises SetupError where no mirror is known."""
    given = environ.get("DEBIAN_MIRROR", "").rstrip("/")
    if given:
        if not given.endswith("/debian") and "/debian/" not in given:
            raise SetupError(f"DEBIAN_MIRROR={given}: expected an address that ends with /debian")
        beside = re.sub(r"(?<!/)/debian(?=/|$)", "/debian-security", given, count=1)
        security = environ.get("DEBIAN_SECURITY_MIRROR") or beside
        return {"debian": given, "debian-security": security.rstrip("/")}
    found: dict[str, str] = {}
    for source in [Path(apt, "sources.list"), *sorted(Path(apt, "sources.list.d").glob("*"))]:
        if source.is_file() and source.suffix in (".list", ".sources"):
            for line in source.read_text(errors="replace").splitlines():
                named = re.match(r"\s*(?:URIs:|deb\s+(?:\[[^]]*\]\s+)?)\s*(\S+)", line)
                for address in _listed(named[1]) if named else ():
                    name = address.rpartition("/")[2]
                    if name in ARCHIVES:
                        found.setdefault(name, address)
    if "debian" not in found:
        raise SetupError(
            "apt on this machine has no Debian mirror: give one with DEBIAN_MIRROR=http://HOST/debian "
            "(https://www.debian.org/mirror/list)"
        )
    found.setdefault("debian-security", found["debian"] + "-security")
    return found


def _listed(address):
    """The addresses that a source names; Debian's cloud images keep them in a file (`mirror+file:`)."""
    addresses = [address]
    if address.startswith("mirror+file:"):
        file = Path("/" + address.removeprefix("mirror+file:").lstrip("/"))
        addresses = file.read_text(errors="replace").split() if file.is_file() else []
    return [address.rstrip("/") for address in addresses]


def require(program, package):
    if not shutil.which(program):
        raise SetupError(f"{program} is not installed: on Debian and Ubuntu, `sudo apt install {package}`")


# --- the lock ---------------------------------------------------------------------------------------------


class Apt:
    """apt with a world of its own: no packages installed, no settings of this machine, no root."""

    def __init__(self, folder, addresses):
        for name in ("lists/partial", "archives/partial", "state"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(
            "".join(
                f"deb [signed-by={KEYRING}] {addresses[archive]} {suite} main\n"
                for archive, suites in ARCHIVES.items()
                for suite in suites
            )
        )
        options = {
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::ForceHash": "SHA256",
            "Acquire::Languages": "none",
            "pkgCacheGen::ForceEssential": ",",
        }
        self.command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]

    def run(self, *arguments):
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W: Failed to fetch"))]
        if done.returncode or errors:
            raise SetupError(
                f"apt: {errors[0][3:] if errors else done.stderr.strip() or 'failed'}; DEBIAN_MIRROR= names another mirror"
            )
        return done.stdout

    def resolve(self, wanted):
        """{package: (version, address, SHA-256)} of these and all that they depend on."""
        found = {}
        for line in self.run("install", "-y", "--print-uris", *wanted).splitlines():
            address, file, _size, digest = line.split()
            package, version, _ = file.split("_")
            found[package] = version.replace("%3a", ":"), address.strip("'"), digest.partition("SHA256:")[2]
        return found


def renew():
    """Write image/debian.lock: the newest packages that the mirrors have."""
    require("apt-get", "apt")
    if not Path(KEYRING).exists():
        raise SetupError(f"{KEYRING} is missing: `sudo apt install debian-archive-keyring`")
    import tempfile

    addresses = mirrors()
    lines, wanted, known = [], [], set()
    with tempfile.TemporaryDirectory() as scratch:
        apt = Apt(Path(scratch), addresses)
        apt.run("update")
        for part, names in WANTED.items():
            wanted += names
            for package, (version, address, digest) in sorted(apt.resolve(wanted).items()):
                if package not in known:
                    known.add(package)
                    archive = max((a for a in ARCHIVES if address.startswith(addresses[a] + "/")), key=len)
                    place = address[len(addresses[archive]) + 1 :]
                    lines.append(f"{part}  {package}  {version}  {archive}  {place}  {digest}\n")
    previous = LOCK.read_text().partition("SHA-256\n")[2] if LOCK.exists() else ""
    if "".join(lines) != previous:
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        head = HEADER.format(release=RELEASE, suite=SUITE, architecture=ARCHITECTURE, date=date)
        LOCK.write_text(head + "".join(lines))
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


# --- the packages -----------------------------------------------------------------------------------------


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(parts, folder, lock=LOCK):
    """Put the locked packages of these parts into `folder`, which then holds nothing else. Raises SetupError."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        os.path.basename(e["place"]).replace("%3a", ":").replace("%2b", "+"): e
        for e in read_lock(lock)[1]
        if e["part"] in parts
    }
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    missing = {
        n: e for n, e in wanted.items() if not (folder / n).exists() or sha256_of(folder / n) != e["sha256"]
    }
    if not missing:
        return
    require("apt-get", "apt")
    addresses = mirrors()
    say(f"fetching {len(missing)} Debian packages")
    # One at a time: a helper that is given many ends with the first that fails.
    for name, entry in missing.items():
        address = f"{addresses[entry['archive']]}/{entry['place']}"
        command = [
            APT_HELPER,
            "-oAPT::Sandbox::User=root",
            "download-file",
            address,
            str(folder / name),
            "SHA256:" + entry["sha256"],
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            for left in (folder / name, folder / f"{name}.FAILED"):  # apt's name for what has another hash
                left.unlink(missing_ok=True)
            said = [line[3:] for line in (done.stdout + done.stderr).splitlines() if line.startswith("E:")]
            if any(re.search(r"\b404\b", line) for line in said):  # a hash may hold these digits too
                raise SetupError(
                    f"the Debian mirror no longer has {entry['package']} {entry['version']} ({LOCK.name} of {read_lock(lock)[0]}): "
                    "`make lock` takes today's packages, or DEBIAN_MIRROR= names an archive of that date"
                )
            raise SetupError(
                f"{entry['package']} {entry['version']} cannot be fetched ({said[0] if said else 'apt-helper failed'}); "
                "check the network, or name another mirror with DEBIAN_MIRROR="
            )


def fetch_for(flavour, folder):
    """The packages of an image: base/ and others/, and what they are for."""
    fetch(("base",), folder / "base")
    fetch([part for part in PARTS[flavour] if part != "base"], folder / "others")
    (folder / "for").write_text(f"{SUITE} {ARCHITECTURE}\n")


def make_base(packages, tar):
    """Unpack Debian's essential packages into the tar of a root file system, unconfigured: debootstrap's first stage.

    The second stage, dpkg installing them properly, runs in the build (image/install-debian), with the locked dpkg
    and no tool of this machine: so the image does not depend on which distribution it was made on, and nobody needs
    root for it. What mmdebstrap makes depends on its version and apt's (docs/image.md).
    """
    require("dpkg-deb", "dpkg")
    part = tar.with_suffix(".part")
    try:
        with tarfile.open(str(part), "w", format=tarfile.PAX_FORMAT) as root:
            seen: set[str] = set()
            for name in MERGED:
                for entry in (_entry("usr"), _entry(f"usr/{name}"), _entry(name, f"usr/{name}")):
                    _add(root, entry, seen)
            for path in sorted(packages.glob("*.deb")):
                _unpack(path, root, seen)
        os.replace(str(part), str(tar))
    finally:
        part.unlink(missing_ok=True)


def _unpack(path, root, seen):
    """Add a package's files to the tar `root`, but for documentation and what is there already."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpack:
        assert unpack.stdout
        try:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as contents:
                for entry in contents:
                    entry.name = _merged(entry.name)
                    if entry.islnk():
                        entry.linkname = _merged(entry.linkname)
                    if entry.name and not f"{entry.name}/".startswith(LEFT_OUT):
                        _add(root, entry, seen, contents.extractfile(entry) if entry.isreg() else None)
            while unpack.stdout.read(1 << 20):  # its padding
                pass
        except tarfile.TarError:
            unpack.kill()
        if unpack.wait():
            raise SetupError(f"{path}: dpkg-deb cannot unpack it", code=1)


def _entry(name, link=None):
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname = (
        (tarfile.SYMTYPE, 0o777, link) if link else (tarfile.DIRTYPE, 0o755, "")
    )
    return entry


def _add(root, entry, seen, content=None):
    if entry.name not in seen:
        seen.add(entry.name)
        root.addfile(entry, content)


def _merged(name):
    """The place of a package's file in a merged /usr, without ./ before and / behind."""
    name = name.removeprefix(".").strip("/")
    return (
        f"usr/{name}"
        if name.split("/")[0] in MERGED and name not in MERGED
        else ""
        if name in MERGED
        else name
    )


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["fetch"]:  # whether the mirrors still have what is locked
            fetch_for(sys.argv[2], ROOT / "build/image/debs" / sys.argv[2])
        else:
            renew()
    except SetupError as error:
        print(f"lock: {error}", file=sys.stderr)
        sys.exit(error.code)
