"""What dpkg and apt know: packages, candidates, holds, locks, kernels; and what of NVIDIA came past them."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from ansible.module_utils.machine_disks import read_mounts
from ansible.module_utils.machine_reading import answered, inside, number, read, said

# Looked up always, beside what the caller asks for.
ALWAYS = (
    "nvidia-*",
    "libnvidia-*",
    "cuda-*",
    "docker*",
    "containerd*",
    "linux-headers-*",
    "linux-image-*",
    "linux-generic*",
    "linux-modules-nvidia-*",
    "earlyoom",
    "systemd-zram-generator",
)
LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock", "/var/lib/apt/lists/lock")
RUNFILE_PROGRAMS = ("/usr/bin/nvidia-uninstall", "/usr/bin/nvidia-installer")
DRIVER_FILES = (
    "usr/bin/nvidia-smi",
    "usr/lib/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/*/libcuda.so.1",
)
DRIVER_SOURCES = re.compile(
    r"developer\.download\.nvidia\.com/compute/(cuda|nvidia-driver)"
    r"|graphics-drivers|lambdalabs|lambda\.ai|archive\.lambda|apt\.pop-os\.org|system76",
    re.IGNORECASE,
)
KNOWN_COMPONENTS = {
    "main",
    "contrib",
    "non-free",
    "non-free-firmware",
    "universe",
    "multiverse",
    "restricted",
}
OURS = "recipe-"  # how this playbook's own files in /etc/apt/sources.list.d begin


def database(root: Path) -> dict[str, tuple[str, str]]:
    """Every package that is installed: its version, and dpkg's two letters for it (`ii`; `hi`: held).

    Raises:
        ProgramError: dpkg-query failed: the database is damaged.
    """
    form = "${db:Status-Abbrev}\\t${Package}\\t${Version}\\n"
    found: dict[str, tuple[str, str]] = {}
    for line in answered("dpkg-query", *_admin(root), "--show", f"--showformat={form}").splitlines():
        status, package, version = [*line.split("\t"), "", ""][:3]
        if status[:2] in ("ii", "hi"):
            found.setdefault(package, (version, status[:2]))  # several architectures: all have one version
    return found


def installed(packages: dict[str, tuple[str, str]], wanted: list[str]) -> dict[str, str]:
    """The versions of the installed packages that match `wanted` (names or patterns), or ALWAYS."""
    patterns = [*ALWAYS, *wanted]
    return {
        name: version
        for name, (version, _) in sorted(packages.items())
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def held(packages: dict[str, tuple[str, str]]) -> list[str]:
    return sorted(name for name, (_, status) in packages.items() if status == "hi")


def candidates(root: Path, wanted: list[str]) -> dict[str, str]:
    """What apt would install of the plain names in `wanted`; empty where its lists are."""
    names = [name for name in wanted if not re.search(r"[*?\[]", name)]
    if not names:
        return {}
    found, name = {}, ""
    for line in said("apt-cache", *_apt_folders(root), "policy", *names).splitlines():
        if line[:1].strip() and line.endswith(":"):
            name = line[:-1].partition(":")[0]
        label, _, version = line.strip().partition(": ")
        if label == "Candidate" and name and version != "(none)":
            found[name] = version
    return found


def owner(root: Path, path: str | Path) -> str | None:
    """The package that a file belongs to, also where /bin and /lib were merged into /usr; None for nobody's."""
    path = "/" + str(path).lstrip("/")
    for name in (path, path.removeprefix("/usr"), "/usr" + path):
        packages = said("dpkg-query", *_admin(root), "--search", name).partition(": /")[0]
        if packages and not packages.startswith("diversion by"):
            return packages.split(",")[0].partition(":")[0].strip()
    return None


def lock_holder(root: Path) -> dict | None:
    """{pid, name} of the program that holds dpkg's or apt's lock."""
    wanted = set()
    for lock in LOCKS:
        try:
            status = os.stat(inside(root, lock))
        except OSError:
            continue
        wanted.add(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}")
        # btrfs and overlay show files under another device than stat does, one whose major number is 0.
        wanted.add(f"00:{status.st_ino}")
    for line in read(root / "proc/locks").splitlines():
        words = line.split()
        if len(words) < 6:
            continue
        # NUMBER: KIND ADVISORY WRITE PID DEVICE:INODE …; one that waits has an arrow before KIND, and no match here.
        major, _, inode = ([*words[5].split(":"), "", ""])[:3]
        if words[5] in wanted or f"{major}:{inode}" in wanted:
            pid = number(words[4]) or 0
            return {"pid": pid, "name": read(root / f"proc/{pid}/comm") or "unknown"}
    return None


def dpkg_interrupted(root: Path) -> bool:
    """Whether an installation was cut off: `dpkg --configure -a` has something to do."""
    updates = inside(root, "/var/lib/dpkg/updates")
    if updates.is_dir() and any(file.name.isdigit() for file in updates.iterdir()):
        return True
    return bool(said("dpkg", *_admin(root), "--audit").strip())


def kernel_package(root: Path, kernel: str, packages: dict[str, tuple[str, str]]) -> str | None:
    """The package that the running kernel came in; None for one that no package brought (self-made, a container's)."""
    for name in (f"linux-image-{kernel}", f"linux-image-unsigned-{kernel}"):
        if name in packages:
            return name
    found = owner(root, f"/lib/modules/{kernel}/kernel") or owner(root, f"/lib/modules/{kernel}")
    return found if found and not found.startswith("linux-headers") else None


def newer_kernel(kernel: str, packages: dict[str, tuple[str, str]]) -> str | None:
    """The installed kernel image of the running kernel's flavour that the next boot takes instead; None: no newer."""
    running, flavour = _kernel_key(kernel)
    if f"linux-image-{kernel}" not in packages and f"linux-image-unsigned-{kernel}" not in packages:
        return None
    newest = kernel
    for name in packages:
        version = re.sub(r"^linux-image-(unsigned-)?", "", name)
        if version != name and version[:1].isdigit():
            key, other = _kernel_key(version)
            if other == flavour and key > running:
                running, newest = key, version
    return newest if newest != kernel else None


def runfile_driver(root: Path) -> bool:
    """Whether NVIDIA's .run installer put a driver here, past dpkg."""
    # Container runtimes and WSL2 bind the host's driver to these places: not installed here.
    bound = {mount["point"] for mount in read_mounts(root)}
    files = [inside(root, program) for program in RUNFILE_PROGRAMS]
    files += [path for pattern in DRIVER_FILES for path in sorted(root.glob(pattern))]
    for path in files:
        # Debian's own are links through /etc/alternatives: whose is what they end at?
        target = _target(root, path)
        if target is None or target in bound or target.startswith("/usr/lib/wsl/"):
            continue
        if owner(root, target) is None:
            return True
    return False


def foreign_sources(root: Path) -> list[str]:
    """Files of apt's sources, other than this playbook's, that bring NVIDIA drivers."""
    folder = inside(root, "/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    found = []
    for file in files:
        if file.name.startswith(OURS) or file.suffix not in (".list", ".sources"):
            continue
        if any(DRIVER_SOURCES.search(stanza) for stanza in _active(read(file), file.suffix)):
            found.append("/" + str(file.relative_to(root)))
    return found


def mirrors(root: Path) -> list[str]:
    """Where apt's sources point, without this playbook's own: the distribution's mirrors first, each once."""
    folder = inside(root, "/etc/apt")
    found: dict[str, bool] = {}
    for file in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if not file.name.startswith(OURS) and file.suffix in (".list", ".sources"):
            for stanza in _active(read(file), file.suffix):
                # Only distributions have suites like trixie-updates.
                own = re.search(r"[a-z]-(updates|security)\b", stanza) is not None
                for url in re.findall(r"https?://[^\s\]]+", stanza):
                    found[url] = found.get(url, False) or own
    return sorted(found, key=lambda url: not found[url])


def components(root: Path) -> list[str]:
    """Components of the distribution (main, contrib, …) that apt's sources, without this playbook's own, name."""
    folder = inside(root, "/etc/apt")
    found: set[str] = set()
    for file in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if not file.name.startswith(OURS) and file.suffix in (".list", ".sources"):
            for stanza in _active(read(file), file.suffix):
                words = stanza.split() if file.suffix == ".list" else _field(stanza, "components")
                found |= KNOWN_COMPONENTS.intersection(words)
    return sorted(found)


def ours(root: Path, state_file: str) -> dict:
    """What this playbook has brought in earlier runs: {sources: names of its apt sources, packages: names}."""
    files = inside(root, "/etc/apt/sources.list.d").glob(f"{OURS}*.sources")
    try:
        record = json.loads(read(inside(root, state_file)) or "{}")
        pending = record.get("pending") or {}  # of a play that was killed, which the next one completes
        packages = sorted(
            {*record.get("added", []), *pending.get("planned", [])} - {*pending.get("before", [])}
        )
    except (ValueError, AttributeError, TypeError):  # a broken record: the module `packages` says so
        packages = []
    return {"sources": sorted(file.stem.removeprefix(OURS) for file in files), "packages": packages}


def _field(stanza: str, name: str) -> list[str]:
    found = re.search(rf"(?im)^{name}:((?:.*)(?:\n[ \t]+.*)*)", stanza)
    return found[1].split() if found else []


def _active(text: str, suffix: str) -> list[str]:
    """The entries of a sources file that count: no comments, nothing switched off."""
    if suffix == ".list":  # there a comment may follow an entry
        return [entry for line in text.splitlines() if (entry := line.partition("#")[0].strip())]
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stanzas = re.split(r"\n\s*\n", "\n".join(lines))
    return [s for s in stanzas if s.strip() and not re.search(r"(?im)^enabled:\s*(no|false|0)\s*$", s)]


def _kernel_key(kernel: str) -> tuple[list[int], str]:
    """6.8.0-45-generic -> [6, 8, 0, 45], generic; 6.12.41+deb13-cloud-amd64 -> [6, 12, 41, 13], cloud-amd64."""
    parts = re.match(r"([\d.]+(?:\+[a-z]+\d*)?(?:-\d+)?)-?(.*)", kernel)
    version, flavour = parts.groups() if parts else ("", kernel)
    return [int(digits) for digits in re.findall(r"\d+", version)], flavour


def _target(root: Path, path: Path) -> str | None:
    """Where a file really is, as the machine calls it; None where there is none. Links inside another root work too."""
    for _ in range(10):
        if not path.is_symlink():
            # The folders on the way may be links as well (/lib of a merged /usr).
            real = path.resolve() if root == Path("/") else path
            return "/" + str(real.relative_to(root)) if real.is_file() else None
        link = os.readlink(path)
        path = inside(root, link) if link.startswith("/") else path.parent / link
    return None


def _admin(root: Path) -> list[str]:
    """Where dpkg's database is, for a tree that is not this machine's."""
    return [] if root == Path("/") else [f"--admindir={inside(root, '/var/lib/dpkg')}"]


def _apt_folders(root: Path) -> list[str]:
    if root == Path("/"):
        return []
    folders = {
        "State": "var/lib/apt",
        "State::status": "var/lib/dpkg/status",
        "Etc": "etc/apt",
        "Cache": "var/cache/apt",
    }
    return [f"-oDir::{name}={root / folder}" for name, folder in folders.items()]
