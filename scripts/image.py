"""Build the container image: one digest for one commit, on every machine.

    make build                 # FLAVOUR=cpu|gpu; else gpu if this machine has an NVIDIA GPU
    make build BASE=IMAGE      # on a Debian image by digest, not on the one that `make base` makes
    make build-check           # builds twice from nothing, the second time of a copy, and names the first file that differs
    scripts/image.py digest    # the digest alone, of an image that is not kept
    make base                  # Debian's essential packages alone: build/image/base.tar

Packages and wheels are fetched first and checked against the locks; the build itself has no network. What is made
lies in build/image/: FLAVOUR.json (digest, sizes), FLAVOUR.cdx.json (bill of materials), FLAVOUR.log. The image gets
its name when all is done and checked, so that there is never half of one.

Standard library only: Docker and Python 3.11 are enough to build.
"""

import collections
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import setup
from setup import LOCKS, SetupError, go_on_in_a_new_python, say, stop, wanted_flavour

go_on_in_a_new_python("build")

import tomllib

import debian
import engine
import lock
import wheels
from oci import first_difference, manifest_digest, sizes

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/image"
NAME = "qlora-70b-recipe"
# Largest size, GB, of the unpacked layers; what a build needs on the disk, GiB (packages, image, Docker's two copies).
LIMIT_GB = {"cpu": 1.8, "gpu": 7.0}
DISK_GIB = {"cpu": 8, "gpu": 35}
# All that docker needs of the environment, in which a token may be.
ENVIRONMENT = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "XDG_RUNTIME_DIR", "TMPDIR")
SOURCES = ("Dockerfile", "LICENSE", "image", "recipe", *sorted(LOCKS.values()))


# --- what the image is made of ----------------------------------------------------------------------------


def source_files(root=ROOT):
    """What of the checkout determines the image, in order: what .dockerignore lets in, and the Dockerfile."""
    found: list[Path] = []
    for name in SOURCES:
        path = root / name
        found += [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())
    return sorted(
        p
        for p in found
        if not any(part.startswith(".") or part == "__pycache__" for part in p.relative_to(root).parts)
    )


def sources_sha256(root=ROOT):
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(
            f"{path.relative_to(root)}\0{'x' if os.stat(path).st_mode & 0o100 else '-'}\0".encode()
            + path.read_bytes()
            + b"\0"
        )
    return digest.hexdigest()


def lock_sha256(flavour, root=ROOT):
    """Of the packages: Python's and Debian's."""
    return hashlib.sha256(
        (root / LOCKS[flavour]).read_bytes() + (root / "image/debian.lock").read_bytes()
    ).hexdigest()


def revision(root=ROOT):
    """The commit, with `-dirty` where what goes into the image differs from it; `unknown` without git."""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *SOURCES], capture_output=True, text=True, check=True
        ).stdout
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(root=ROOT):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


def checked_base(environ):
    base = environ.get("BASE") or "local"
    if base != "local" and not re.search(r"@sha256:[0-9a-f]{64}$", base):
        raise SetupError(
            f"BASE={base}: expected an image by digest (NAME@sha256:…), so that it is the same tomorrow, or nothing"
        )
    return base


def take_turns():
    """One build at a time in a checkout, until this process ends."""
    OUT.mkdir(parents=True, exist_ok=True)
    folder = os.open(OUT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("another build is at work here: waiting for it")
        fcntl.flock(folder, fcntl.LOCK_EX)


def check_machine(flavour):
    if platform.machine() != "x86_64":
        raise SetupError(
            f"this machine is {platform.machine()}, the image is for x86_64; RUNTIME=host runs on aarch64 too"
        )
    for name in LOCKS.values():
        stale = lock.stale(ROOT / name)
        if stale:
            raise SetupError(stale)
    engine.require_builder()
    take_turns()
    docker_folder = engine.info().get("DockerRootDir") or "/"
    for folder in {str(OUT), docker_folder if os.path.exists(docker_folder) else str(OUT)}:
        free_gib = shutil.disk_usage(folder).free / 2**30
        if free_gib < DISK_GIB[flavour]:
            raise SetupError(
                f"{folder} has {free_gib:.1f} GiB free, building the {flavour} image needs {DISK_GIB[flavour]} GiB: "
                "make room (`docker builder prune` frees the build cache)"
            )


# --- packages ---------------------------------------------------------------------------------------------


def fetch(flavour, base, out=OUT):
    """All that the build will ask for, by hash: Debian packages and wheels. What is there already is kept."""
    debs = out / "debs" / flavour
    debian.fetch_for(flavour, debs)
    if base == "local":
        debian.make_base(debs / "base", out / "base.tar")
    else:
        (out / "base.tar").touch()  # COPY and ADD want a file, also in a stage that is not built
    wheels.fetch(flavour, out)


# --- the build --------------------------------------------------------------------------------------------


def build_arguments(flavour, base):
    """What the Dockerfile is told, which also is what its labels say."""
    return {
        "BASE": base,
        "FLAVOUR": flavour,
        "VERSION": version(),
        "REVISION": revision(),
        "LOCK": lock_sha256(flavour),
        "SOURCES": sources_sha256(),
        "SOURCE_DATE_EPOCH": str(debian.epoch()),
    }


def command_of(arguments, out=OUT):
    """docker's words for a build, all but what is to come of it and the folder of the sources."""
    flavour = arguments["FLAVOUR"]
    command = ["buildx", "build", "--progress=plain", "--provenance=false", "--network=none"]
    command += [f"--platform=linux/{debian.ARCHITECTURE}"]
    command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
    return [*command, *(f"--build-context={kind}={out / kind / flavour}" for kind in ("debs", "wheels"))]


def build(arguments, archive, log, fresh=False, sources=ROOT):
    """The image, as an OCI archive."""
    # Not compressed: what a compressor writes depends on its version.
    output = f"type=oci,dest={archive},rewrite-timestamp=true,compression=uncompressed,force-compression=true"
    command = [*command_of(arguments), "--target=image", f"--output={output}"]
    with open(log, "w") as file:
        run_build([*command, *(["--no-cache"] if fresh else []), str(sources)], file, arguments["BASE"])


def list_packages(arguments, folder, log):
    """What pip and dpkg say is installed in the image that was just built."""
    command = [*command_of(arguments), "--target=bom", f"--output=type=local,dest={folder}", str(ROOT)]
    with open(log, "a") as file:
        run_build(command, file, arguments["BASE"])


def run_build(command, log, base):
    """docker buildx, its noise in the log, its steps on the terminal."""
    environ = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(
        ["docker", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environ,
    )
    lines: collections.deque[str] = collections.deque(maxlen=2000)
    told = {""}
    try:
        for line in process.stdout or ():
            log.write(line)
            lines.append(line.rstrip())
            step = re.match(
                r"#\d+ \[(\S+ \d+/\d+)\]|#\d+ (exporting layers|rewriting layers|sending tarball)", line
            )
            name = step and (step[1] or step[2])
            if name and name not in told:
                told.add(name)
                say(f"  {name}")
    finally:
        if process.poll() is None and sys.exc_info()[0]:
            process.terminate()
        process.wait()
    if process.returncode:
        raise explain(lines, base, log.name)


def explain(lines, base, log):
    text = "\n".join(lines)
    own = re.findall(r"^#\d+ [\d.]+ error: (.*)", text, re.MULTILINE)
    if own:
        return SetupError(own[-1])
    if "exec format error" in text or "no match for platform" in text:
        return SetupError(
            f"BASE={base}: is for another processor, expected {debian.ARCHITECTURE}; name the image of that platform"
        )
    if base != "local" and re.search(
        r"failed to resolve source metadata|pull access denied|failed to do request|dial tcp", text
    ):
        return SetupError(
            f"BASE={base}: cannot be fetched; check the name, the digest and the network, or leave BASE out"
        )
    known = engine.explain(text)
    if known:
        return SetupError(known)
    tail = "\n  ".join(line for line in list(lines)[-12:])
    return SetupError(f"the build failed; its last lines (all of them: {log}):\n  {tail}", code=1)


# --- what was built ---------------------------------------------------------------------------------------


def bill_of_materials(arguments, digest, out=OUT):
    """CycloneDX: what cyclonedx-py found in the image's venv, Debian's packages, and the image that holds them."""
    flavour = arguments["FLAVOUR"]
    bom = json.loads((out / f"bom-{flavour}" / "python.json").read_text())
    _, locked = debian.read_lock()
    hashes = {(e["package"], e["version"]): e["sha256"] for e in locked}
    for line in (out / f"bom-{flavour}" / "debian.txt").read_text().splitlines():
        name, number, architecture = line.split()
        purl = f"pkg:deb/debian/{name}@{number.replace(':', '%3A').replace('+', '%2B')}?arch={architecture}&distro=debian-{debian.RELEASE}"
        component = {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}
        if (name, number) in hashes:
            component["hashes"] = [{"alg": "SHA-256", "content": hashes[name, number]}]
        bom["components"].append(component)
    bom["metadata"]["component"] = {
        "type": "container",
        "bom-ref": f"{NAME}@{digest}",
        "name": NAME,
        "version": digest,
        "properties": [
            {"name": "recipe:lock", "value": arguments["LOCK"]},
            {"name": "recipe:revision", "value": arguments["REVISION"]},
        ],
    }
    bom["dependencies"] = [d for d in bom.get("dependencies", []) if d["ref"] != "root-component"]
    (out / f"{flavour}.cdx.json").write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")


def make_image(flavour, base):
    started = time.monotonic()
    check_machine(flavour)
    fetch(flavour, base)
    fetched = time.monotonic()
    arguments, archive = build_arguments(flavour, base), OUT / f"{flavour}.tar"
    say(f"building the {flavour} image (log: {OUT.relative_to(ROOT)}/{flavour}.log)")
    try:
        build(arguments, archive, OUT / f"{flavour}.log")
        digest, parts = manifest_digest(archive), sizes(archive)
        total_gb = sum(parts.values()) / 1e9
        if total_gb > LIMIT_GB[flavour]:
            largest = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in list(parts.items())[:5])
            raise SetupError(
                f"the {flavour} image has {total_gb:.2f} GB, expected at most {LIMIT_GB[flavour]} (largest: {largest})",
                code=1,
            )
        list_packages(arguments, OUT / f"bom-{flavour}", OUT / f"{flavour}.log")
        bill_of_materials(arguments, digest)
        say("loading it into Docker")
        name = f"{NAME}:{flavour}"
        previous = engine.image(name)
        engine.docker("load", "--quiet", "--input", str(archive))
        engine.docker("tag", digest, name)
        if previous and previous[0] != digest:
            engine.call("image", "rm", previous[0])  # refused while a container uses it
    finally:
        archive.unlink(missing_ok=True)
    record = {
        "digest": digest,
        "flavour": flavour,
        "revision": arguments["REVISION"],
        "lock": arguments["LOCK"],
        "sources": arguments["SOURCES"],
        "bytes": sum(parts.values()),
        "parts": parts,
        "seconds": {"fetch": round(fetched - started, 1), "build": round(time.monotonic() - fetched, 1)},
    }
    (OUT / f"{flavour}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}  {digest}")
    print(f"{total_gb:.2f} GB (at most {LIMIT_GB[flavour]}); the largest parts:")
    for part, size in list(parts.items())[:5]:
        print(f"  {size / 1e9:6.2f} GB  {part}")
    print(f"packages: {(OUT / f'{flavour}.cdx.json').relative_to(ROOT)}; {time.monotonic() - started:.0f} s")


def only_digest(flavour, base):
    """The digest that these sources have, without loading the image: to compare with one that somebody has published."""
    check_machine(flavour)
    fetch(flavour, base)
    archive = OUT / f"{flavour}-digest.tar"
    try:
        build(build_arguments(flavour, base), archive, archive.with_suffix(".log"))
        print(manifest_digest(archive))
    finally:
        archive.unlink(missing_ok=True)


# --- the same twice ---------------------------------------------------------------------------------------


def check(flavour, base):
    """Build twice from nothing, of wheels and packages fetched once, and compare.

    The second build is of a copy, as another person's clone may be: of another day, and closed to all others.
    """
    check_machine(flavour)
    fetch(flavour, base)
    arguments = build_arguments(flavour, base)
    archives = [OUT / f"{flavour}-{turn}.tar" for turn in ("first", "second")]
    try:
        with tempfile.TemporaryDirectory(dir=OUT) as clone:
            for archive, sources in zip(archives, (ROOT, Path(clone)), strict=True):
                say(f"building the {flavour} image from nothing: {archive.stem}")
                if base == "local":
                    debian.make_base(OUT / "debs" / flavour / "base", OUT / "base.tar")
                if sources != ROOT:
                    copy_sources(sources)
                build(arguments, archive, archive.with_suffix(".log"), fresh=True, sources=sources)
        digests = [manifest_digest(archive) for archive in archives]
        if digests[0] != digests[1]:
            raise SetupError(
                f"two builds differ: {digests[0]} and {digests[1]}; {first_difference(*archives)}", code=1
            )
        print(f"two builds from nothing, one digest: {digests[0]}")
    finally:
        for archive in archives:
            archive.unlink(missing_ok=True)


def copy_sources(clone):
    """What a build reads of the checkout, with times and modes that a clone may have."""
    copies = {path: clone / path.relative_to(ROOT) for path in [*source_files(), ROOT / ".dockerignore"]}
    for path, copy in (copies | {OUT / "base.tar": clone / "build/image/base.tar"}).items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(path.stat().st_mode & 0o700)
        os.utime(copy, (1e9, 1e9))
    for folder in (path for path in clone.rglob("*") if path.is_dir()):
        folder.chmod(0o700)


def base_alone():
    take_turns()
    debian.fetch(("base",), OUT / "debs/cpu/base")
    debian.make_base(OUT / "debs/cpu/base", OUT / "base.tar")
    print(f"{(OUT / 'base.tar').relative_to(ROOT)}  sha256:{debian.sha256_of(OUT / 'base.tar')}")


def main(argv):
    signal.signal(signal.SIGTERM, stop)
    setup.WHO = argv[0]
    try:
        if argv == ["base"]:
            base_alone()
            return 0
        work = {"build": make_image, "build-check": check, "digest": only_digest}[argv[0]]
        work(wanted_flavour(os.environ), checked_base(os.environ))
        return 0
    except SetupError as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{argv[0]}: stopped; what was fetched is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
