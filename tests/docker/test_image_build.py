"""The image by a real engine: known by its digest, and nothing in it that should not be.

That two builds from nothing have one digest, and other sources another: tests/long/test_image_twice.py.
"""

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docker.calls import ROOT, TOKEN, make
from tests.machine import lacks

sys.path.insert(0, str(ROOT / "scripts"))
import lock
import oci

import image as script

pytestmark = [pytest.mark.docker, pytest.mark.slow]


def test_the_engine_knows_it_by_that_digest(image):
    found = json.loads(subprocess.check_output(["docker", "image", "inspect", image.name]))[0]
    assert found["Id"] == image.record["digest"]


def test_it_says_how_large_it_is_and_why(image):
    said = image.said.stdout
    assert f"qlora-70b-recipe:cpu  {image.record['digest']}" in said
    assert image.record["bytes"] <= 1.8e9
    assert f"{image.record['bytes'] / 1e9:.2f} GB (at most 1.8)" in said
    assert len(re.findall(r"^ +\d\.\d\d GB  [a-z]+$", said, re.MULTILINE)) == 5


def test_labels_say_what_it_was_made_of(image):
    labels = json.loads(subprocess.check_output(["docker", "image", "inspect", image.name]))[0]["Config"][
        "Labels"
    ]
    assert labels["org.opencontainers.image.version"] == script.version()
    assert labels["org.opencontainers.image.revision"] == script.revision()
    assert labels["recipe.lock"] == script.lock_sha256("cpu")
    assert labels["recipe.sources"] == script.sources_sha256()


@pytest.fixture(scope="module")
def files(image, tmp_path_factory):
    """(name, bytes) of every file in every layer would not fit: names, and whether a layer has the token."""
    archive = tmp_path_factory.mktemp("saved") / "image.tar"
    subprocess.run(["docker", "save", "-o", str(archive), image.name], check=True)
    names = [entry.name for layer in oci.layers(archive) for entry in layer]
    yield archive, names
    archive.unlink()


def contains(path: Path, word: bytes) -> bool:
    with open(path, "rb") as file:
        tail = b""
        while block := file.read(1 << 24):
            if word in tail + block:
                return True
            tail = block[-len(word) :]
    return False


def test_it_holds_the_recipe_and_nothing_else_of_the_checkout(files):
    own = {name for name in files[1] if name.startswith("opt/recipe/")}
    allowed = {str(path.relative_to(ROOT)) for path in script.source_files()}
    strange = {
        name
        for name in own
        if not name.endswith((".pyc", "/"))
        and name.removeprefix("opt/recipe/") not in allowed
        and "__pycache__" not in name
    }
    assert {name for name in strange if "." in name.rpartition("/")[2]} == set()
    assert "opt/recipe/recipe/cli.py" in own
    for name in files[1]:
        assert not re.search(
            r"(^|/)(\.git|\.env|\.netrc|runs|models|tests/test_\w+\.py)(/|$)",
            name.removeprefix("opt/recipe/"),
        ) or ("site-packages" in name), name


def test_it_has_no_compiler_no_package_lists_and_no_logs(files):
    names = set(files[1])
    assert not any(
        re.fullmatch(r"usr/bin/(x86_64-linux-gnu-)?(gcc|cc|g\+\+|ld|as)(-\d+)?", name) for name in names
    )
    assert not any(re.match(r"var/(log|cache)/.|var/lib/apt/|usr/bin/apt", name) for name in names)


def test_a_token_in_the_environment_of_the_build_is_nowhere(image, files):
    assert not contains(files[0], TOKEN.encode())
    for name in ("cpu.log", "cpu.json", "cpu.cdx.json"):
        assert not contains(image.out / name, TOKEN.encode()), name
    history = subprocess.check_output(["docker", "history", "--no-trunc", "--format", "json", image.name])
    assert TOKEN.encode() not in history
    assert TOKEN not in image.said.stdout + image.said.stderr


def test_the_bill_of_materials_is_valid_and_names_every_package(image):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (image.out / "cpu.cdx.json").read_text()
    bom = json.loads(text)
    assert JsonStrictValidator(SchemaVersion.from_version(bom["specVersion"])).validate_str(text) is None
    assert bom["metadata"]["component"]["version"] == image.record["digest"]
    named = {
        lock.package(c["name"]): c["version"].partition("+")[0]
        for c in bom["components"]
        if c["purl"].startswith("pkg:pypi")
    }
    entries = lock.needed_by(lock.entries((ROOT / "requirements-cpu.lock").read_text()), "requirements.in")
    for entry in entries:
        assert lock.package(entry) in named, entry.split()[0]
    assert named["torch"] == next(lock.version(e) for e in entries if e.startswith("torch=="))
    debian = {c["name"]: c for c in bom["components"] if c["purl"].startswith("pkg:deb/")}
    assert {"libc6", "python3.11", "tini", "dpkg"} <= set(debian)
    assert all(c["hashes"][0]["alg"] == "SHA-256" for c in debian.values())


# --- a base that will not do --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """push(name, dockerfile, files) -> NAME@DIGEST in a real registry on this machine."""
    program = shutil.which("docker-registry")
    if not program:
        lacks("needs docker-registry, a registry to push to")
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: '{address}'}}\nlog: {{level: error}}\n"
    (folder / "config.yml").write_text(config)
    process = subprocess.Popen(
        [program, "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    host, port = address.split(":")
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.1)

    def push(name: str, dockerfile: str, **contents: bytes) -> str:
        context = folder / name
        context.mkdir()
        (context / "Dockerfile").write_text(dockerfile)
        for file, content in contents.items():
            (context / file).write_bytes(content)
            (context / file).chmod(0o755)
        command = [
            "docker",
            "buildx",
            "build",
            "-q",
            "--provenance=false",
            "--output",
            f"type=image,name={address}/{name},push=true",
            str(context),
        ]
        subprocess.run(command, check=True, capture_output=True)
        found = subprocess.check_output(
            [
                "docker",
                "buildx",
                "imagetools",
                "inspect",
                f"{address}/{name}",
                "--format",
                "{{json .Manifest.Digest}}",
            ]
        )
        pushed.append(f"{address}/{name}")
        return f"{address}/{name}@{json.loads(found)}"

    pushed: list[str] = []
    yield push
    process.terminate()
    process.wait()
    subprocess.run(["docker", "image", "rm", *pushed], capture_output=True)


def refused(base: str) -> str:
    before = subprocess.run(
        ["docker", "image", "inspect", "qlora-70b-recipe:cpu"], capture_output=True
    ).stdout
    done = make(ROOT, "build", BASE=base)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("build: BASE=")]
    assert len(said) == 1
    assert (
        subprocess.run(["docker", "image", "inspect", "qlora-70b-recipe:cpu"], capture_output=True).stdout
        == before
    )
    return said[0]


def test_a_base_of_another_release(image, registry):
    base = registry(
        "noble",
        "FROM qlora-70b-recipe:cpu\nCOPY release /etc/os-release\n",
        release=b"ID=ubuntu\nVERSION_CODENAME=noble\n",
    )
    assert refused(base) == (
        f"build: BASE={base}: is ubuntu noble, expected Debian bookworm, whose packages image/debian.lock holds; name such an image"
    )


def test_a_base_for_another_processor(image, registry):
    """Its shell is an ELF file for 64-bit ARM, as far as a kernel looks."""
    arm = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, 0x400078, 64, 0, 0, 64, 56, 0, 64, 0, 0)
    )
    base = registry("arm", "FROM scratch\nCOPY sh /bin/sh\n", sh=arm)
    assert (
        refused(base)
        == f"build: BASE={base}: is for another processor, expected amd64; name the image of that platform"
    )


def test_a_base_that_is_not_there(image, registry):
    there = registry("small", "FROM scratch\nCOPY file /\n", file=b"")
    base = there.partition("@")[0] + "@sha256:" + "0" * 64
    assert (
        refused(base)
        == f"build: BASE={base}: cannot be fetched; check the name, the digest and the network, or leave BASE out"
    )


def test_a_daemon_that_does_not_answer(tmp_path):
    done = make(ROOT, "build", DOCKER_HOST=f"unix://{tmp_path}/socket")
    assert done.returncode == 2
    assert "build: the Docker daemon does not answer" in done.stderr
