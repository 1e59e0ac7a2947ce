"""Building the image: what is refused before it begins, what the image is made of, how two builds are compared."""

import collections
import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import debian
import engine
import oci
import pytest
from setup import SetupError

import image
from tests.image.test_engine import contents, make, said_first

# --- refused before it begins -----------------------------------------------------------------------------

DIGEST = "@sha256:" + "0a" * 32


@pytest.mark.parametrize("base", ["debian:12", "debian", "debian@sha256:0a0a", "debian" + DIGEST + "0"])
def test_a_base_without_a_digest_is_refused(base):
    with pytest.raises(SetupError, match=rf"^BASE={base}: expected an image by digest \(NAME@sha256:…\)"):
        image.checked_base({"BASE": base})


@pytest.mark.parametrize("base", ["debian" + DIGEST, "docker.test:5000/library/debian:12" + DIGEST])
def test_a_base_by_digest_is_taken(base):
    assert image.checked_base({"BASE": base}) == base


def test_no_base_is_our_own():
    assert image.checked_base({}) == image.checked_base({"BASE": ""}) == "local"


def test_make_says_it_before_docker_is_asked(checkout, docker, environment):
    code, _, (told,) = make(checkout, environment(), "build", "BASE=debian:12")
    assert code == 2 and told.startswith("build: BASE=debian:12: expected an image by digest")
    assert docker.calls() == []


@pytest.mark.parametrize("target", ["build", "build-check"])
def test_locks_of_other_inputs_are_refused(checkout, docker, environment, target):
    with open(checkout / "requirements.in", "a") as inputs:
        inputs.write("a-new-package\n")
    before = contents(checkout)
    code, out, told = make(checkout, environment(), target)
    assert (code, out, len(told)) == (2, "", 1)
    stale = said_first(r"requirements-cpu\.lock was made from other inputs .*: run `make lock`")
    assert re.fullmatch(rf"{target}: {stale}", told[0])
    assert contents(checkout) == before and docker.calls() == []


@pytest.fixture
def able(tmp_path, monkeypatch):
    """A machine on which an image can be built."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(engine, "require_builder", lambda: None)
    monkeypatch.setattr(engine, "info", lambda: {"DockerRootDir": str(tmp_path / "docker")})
    monkeypatch.setattr(image, "OUT", tmp_path / "out")
    (tmp_path / "docker").mkdir()
    free = collections.defaultdict(lambda: 100 * 2**30)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free[str(folder)])
    )
    return free


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_an_able_machine_is_not_refused(able, flavour):
    image.check_machine(flavour)


@pytest.mark.parametrize("folder", ["out", "docker"])
@pytest.mark.parametrize(("flavour", "needed"), [("cpu", 8), ("gpu", 35)])
def test_too_little_room_is_refused(able, tmp_path, folder, flavour, needed):
    """On the disk of what is fetched, and on that of Docker's data."""
    able[str(tmp_path / folder)] = int((needed - 0.5) * 2**30)
    with pytest.raises(SetupError) as refused:
        image.check_machine(flavour)
    assert str(refused.value) == (
        f"{tmp_path / folder} has {needed - 0.5} GiB free, building the {flavour} image needs {needed} GiB: "
        "make room (`docker builder prune` frees the build cache)"
    )


def test_another_processor_is_refused(able, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SetupError, match=r"this machine is aarch64, the image is for x86_64; RUNTIME=host"):
        image.check_machine("cpu")


# --- what it is made of -----------------------------------------------------------------------------------


def dockerignore(checkout):
    """(what is let in, what is kept out again)."""
    lines = [x for x in (checkout / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    let_in = [line[1:] for line in lines if line.startswith("!")]
    kept_out = [line for line in lines[1:] if not line.startswith("!")]
    assert lines == ["*", *("!" + x for x in let_in), *kept_out]  # the last that matches decides
    return let_in, kept_out


def context(checkout):
    """Every file that the build can see."""
    let_in, kept_out = dockerignore(checkout)
    assert all(pattern.startswith("**/") for pattern in kept_out)
    found = set()
    for path in checkout.rglob("*"):
        place = path.relative_to(checkout)
        inside = any(place.is_relative_to(name) for name in let_in)
        outside = any(fnmatch.fnmatch(part, pattern[3:]) for part in place.parts for pattern in kept_out)
        if path.is_file() and inside and not outside:
            found.add(path)
    return found


def sources(checkout):
    return image.sources_sha256(checkout)


def test_all_that_the_build_can_see_counts_as_a_source(checkout):
    """Else an image could hold other files than the checkout and pass for its own."""
    (checkout / "build/image").mkdir(parents=True)
    base = checkout / "build/image/base.tar"
    base.touch()
    (checkout / "recipe/new folder").mkdir()
    (checkout / "recipe/new folder/new.txt").touch()
    counted, seen = set(image.source_files(checkout)), context(checkout)
    assert len(seen) > 50
    # Debian's packages, unpacked: of image/debian.lock alone, which counts.
    assert seen - counted == {base}
    assert {checkout / "image/debian.lock", checkout / "Dockerfile"} <= counted


def test_a_source_is_let_in_or_steers_the_build(checkout):
    seen = {str(path.relative_to(checkout)) for path in set(image.source_files(checkout)) - context(checkout)}
    assert seen == {"Dockerfile", "image/debian.lock"}


@pytest.mark.parametrize("name", [*image.SOURCES])
def test_a_changed_byte_of_any_source_is_noticed(checkout, name):
    before = sources(checkout)
    path = checkout / name
    file = path if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())[0]
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if kept else b"x")
    assert sources(checkout) != before
    file.write_bytes(kept)
    assert sources(checkout) == before


def test_a_new_file_a_name_and_an_executable_bit_are_noticed(checkout):
    found = {sources(checkout)}
    (checkout / "recipe/new.py").touch()
    found.add(sources(checkout))
    (checkout / "recipe/new.py").rename(checkout / "recipe/newer.py")
    found.add(sources(checkout))
    (checkout / "recipe/newer.py").chmod(0o755)
    found.add(sources(checkout))
    assert len(found) == 4


def test_the_border_between_two_files_is_noticed(checkout):
    (checkout / "recipe/a").write_text("one")
    (checkout / "recipe/b").write_text("two")
    before = sources(checkout)
    (checkout / "recipe/a").write_text("onet")
    (checkout / "recipe/b").write_text("wo")
    assert sources(checkout) != before


@pytest.mark.parametrize(
    "name",
    ["recipe/__pycache__/x.pyc", "recipe/.x.swp", "recipe/.cache/x", "README.md", "tests/x.py", "runs/x/y"],
)
def test_what_the_build_cannot_see_does_not_count(checkout, name):
    before = sources(checkout), context(checkout)
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text("x")
    assert (sources(checkout), context(checkout)) == before


def test_times_and_places_do_not_count(checkout):
    before = sources(checkout)
    os.utime(checkout / "recipe/cli.py", (1, 1))
    assert sources(checkout.rename(checkout.with_name("elsewhere"))) == before


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("requirements-cpu.lock", {"cpu"}),
        ("requirements-gpu.lock", {"gpu"}),
        ("image/debian.lock", {"cpu", "gpu"}),
        ("pyproject.toml", set()),
    ],
)
def test_the_packages_are_pythons_and_debians(checkout, file, changes):
    before = {flavour: image.lock_sha256(flavour, checkout) for flavour in ("cpu", "gpu")}
    with open(checkout / file, "a") as changed:
        changed.write("\n")
    assert {f for f in before if image.lock_sha256(f, checkout) != before[f]} == changes


def test_the_revision_says_whether_the_sources_differ_from_the_commit(checkout):
    assert image.revision(checkout) == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@a.test", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    commit = image.revision(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (checkout / "notes.txt").touch()
    assert image.revision(checkout) == commit
    (checkout / "recipe/new.py").touch()
    assert image.revision(checkout) == commit + "-dirty"


# --- two builds -------------------------------------------------------------------------------------------


def archive_of(path, *layers, labels=""):
    """An OCI archive of these layers, each a list of (name, content, changes of its entry)."""

    def tar(target, files):
        with tarfile.open(fileobj=target, mode="w") as out:
            for name, content, *changes in files:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), 1000
                for key, value in changes[0].items() if changes else ():
                    setattr(entry, key, value)
                out.addfile(entry, io.BytesIO(content) if entry.isreg() else None)
        return target

    blobs = {}

    def blob(content):
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"digest": f"sha256:{digest}", "size": len(content)}

    stacked = [blob(tar(io.BytesIO(), files).getvalue()) for files in layers]
    manifest = blob(json.dumps({"config": blob(labels.encode()), "layers": stacked}).encode())
    files = [*blobs.items(), ("index.json", json.dumps({"manifests": [manifest]}).encode())]
    with open(path, "wb") as target:
        tar(target, files)
    return path


FILES = [("etc/a", b"one"), ("usr/b", b"two"), ("usr/link", b"", {"type": tarfile.SYMTYPE, "linkname": "b"})]
OTHER = [("opt/c", b"three")]


def changed(name, content=None, **changes):
    """FILES, with one of them otherwise."""
    same = {entry[0]: entry for entry in FILES}
    old = same[name]
    same[name] = (name, old[1] if content is None else content, {**(old[2:] or ({},))[0], **changes})
    return list(same.values())


@pytest.mark.parametrize(
    ("layers", "labels", "expected"),
    [
        ([changed("usr/b", b"twO"), OTHER], "", r"layer 1, usr/b: other bytes"),
        ([changed("usr/b", b"longer"), OTHER], "", r"layer 1, usr/b: size is 3 and 6"),
        ([changed("etc/a", mtime=1001), OTHER], "", r"layer 1, etc/a: mtime is 1000 and 1001"),
        ([changed("etc/a", mode=0o755), OTHER], "", r"layer 1, etc/a: mode is 420 and 493"),
        ([changed("etc/a", uid=1), OTHER], "", r"layer 1, etc/a: uid is 0 and 1"),
        ([changed("usr/link", linkname="a"), OTHER], "", r"layer 1, usr/link: linkname is b and a"),
        ([FILES, [("opt/C", b"three")]], "", r"layer 2, opt/c: the other has opt/C there"),
        ([[FILES[0], ("etc/b", b""), *FILES[1:]], OTHER], "", r"layer 1, usr/b: the other has etc/b there"),
        ([FILES, [*OTHER, ("opt/d", b"")]], "", r"layer 2: one has more files"),
        ([FILES[:2], OTHER], "", r"layer 1: one has more files"),
        ([FILES, OTHER], "other", r"all files are the same: the settings of the image differ"),
        ([FILES, OTHER, [("opt/d", b"")]], "", r"layer 3: only one has it"),
    ],
)
def test_the_first_difference_of_two_images_is_named(tmp_path, layers, labels, expected):
    first = archive_of(tmp_path / "first.tar", FILES, OTHER)
    second = archive_of(tmp_path / "second.tar", *layers, labels=labels)
    assert oci.manifest_digest(first) != image.manifest_digest(second)
    assert re.match(expected, oci.first_difference(first, second))


def test_two_equal_images_have_one_digest(tmp_path):
    first, second = (
        archive_of(tmp_path / "first.tar", FILES, OTHER),
        archive_of(tmp_path / "second.tar", FILES, OTHER),
    )
    assert oci.manifest_digest(first) == image.manifest_digest(second)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", oci.manifest_digest(first))


@pytest.mark.parametrize("differs", [False, True])
def test_two_builds_are_compared_and_leave_nothing(able, monkeypatch, capsys, differs):
    def build(arguments, archive, log, fresh, sources):
        assert fresh and (sources == image.ROOT) == ("first" in archive.name)
        if sources != image.ROOT:
            copied = {p.relative_to(sources) for p in sources.rglob("*") if p.is_file()}
            assert {p.relative_to(image.ROOT) for p in image.source_files()} < copied
            assert all(
                p.stat().st_mode & 0o77 == 0 and p.stat().st_mtime == 1e9
                for p in map(sources.joinpath, copied)
            )
        archive_of(archive, changed("usr/b", b"twO") if differs and "second" in archive.name else FILES)

    monkeypatch.setattr(image, "fetch", lambda flavour, base: None)
    monkeypatch.setattr(debian, "make_base", lambda packages, tar: tar.touch())
    monkeypatch.setattr(image, "build", build)
    if differs:
        with pytest.raises(
            SetupError, match=r"two builds differ: sha256:\w+ and sha256:\w+; layer 1, usr/b: "
        ) as no:
            image.check("cpu", "local")
        assert no.value.code == 1
    else:
        image.check("cpu", "local")
        assert re.fullmatch(r"two builds from nothing, one digest: sha256:\w{64}\n", capsys.readouterr().out)
    assert [path.name for path in image.OUT.iterdir()] == ["base.tar"]


SITE = "opt/venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{SITE}/torch/lib/libtorch.so", "torch"),
        (f"{SITE}/torch-2.13.0+cpu.dist-info/METADATA", "torch"),
        (f"{SITE}/numpy.libs/libopenblas.so", "numpy"),
        (f"{SITE}/nvidia/nccl/lib/libnccl.so", "nvidia/nccl"),
        (f"{SITE}/six.py", "six"),
        (f"{SITE}/recipe.pth", "recipe"),
        ("opt/recipe/recipe/cli.py", "recipe"),
        ("opt/venv/bin/python", "python"),
        ("usr/lib/python3.11/os.py", "python"),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", "debian"),
        ("etc/passwd", "debian"),
    ],
)
def test_each_file_belongs_to_a_part(name, part):
    assert oci.part_of(name) == part


def test_the_parts_sizes_are_counted_largest_first(tmp_path):
    files = [
        ("etc/a", b"1"),
        (f"{SITE}/torch/a", b"1234"),
        (f"{SITE}/torch/b", b"", {"type": tarfile.SYMTYPE}),
    ]
    archive = archive_of(tmp_path / "a.tar", files, [("opt/recipe/a", b"12"), (f"{SITE}/torch/c", b"12345")])
    assert list(oci.sizes(archive).items()) == [("torch", 9), ("recipe", 2), ("debian", 1)]


# --- when a build fails -----------------------------------------------------------------------------------

FAILURE = """\
#1 [internal] load build definition from Dockerfile
#12 [bootstrap 1/1] RUN --network=none sh /dev/install-debian
#12 0.412 {line}
#12 ERROR: process "/bin/sh -c sh /dev/install-debian" did not complete successfully: exit code: {code}
ERROR: failed to solve: process "/bin/sh -c sh" did not complete successfully: exit code: {code}
"""
BASE = "debian" + DIGEST


@pytest.mark.parametrize(
    ("base", "text", "line"),
    [
        (
            BASE,
            FAILURE.format(line="error: BASE=debian: is ubuntu noble, expected Debian bookworm", code=2),
            r"^BASE=debian: is ubuntu noble, expected Debian bookworm$",
        ),
        (
            "local",
            FAILURE.format(line="dpkg: write: no space left on device", code=1),
            r"^the disk of Docker's data is full",
        ),
        (
            BASE,
            FAILURE.format(line="exec /bin/sh: exec format error", code=1),
            rf"^BASE={BASE}: is for another processor, expected amd64",
        ),
        (
            BASE,
            "ERROR: failed to solve: no match for platform in manifest: not found\n",
            r"is for another processor, expected amd64",
        ),
        (
            BASE,
            f"ERROR: failed to solve: {BASE}: failed to resolve source metadata for docker.test/{BASE}: not found\n",
            rf"^BASE={BASE}: cannot be fetched; check the name, the digest and the network",
        ),
        (
            BASE,
            "ERROR: failed to do request: Head x: dial tcp: lookup docker.test: no such host\n",
            r"cannot be fetched; check the name",
        ),
        (
            "local",
            "ERROR: Cannot connect to the Docker daemon at x. Is it?\n",
            r"^the Docker daemon does not answer",
        ),
    ],
)
def test_a_build_that_fails_is_explained_in_one_line(base, text, line):
    known = image.explain(text.splitlines(), base, "cpu.log")
    assert re.search(line, str(known)) and "\n" not in str(known) and known.code == 2


def test_a_failure_that_is_not_known_shows_its_end():
    told = image.explain([f"line {n}" for n in range(100)], "local", "build/image/cpu.log")
    assert told.code == 1
    assert str(told).startswith(
        "the build failed; its last lines (all of them: build/image/cpu.log):\n  line 88"
    )
    assert str(told).endswith("line 99")


def test_the_builds_noise_is_in_the_log_and_no_secret_reaches_it(docker, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(docker.folder))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    docker.set(build=[1, FAILURE.format(line="error: of our own", code=2)])
    with open(tmp_path / "log", "w") as log, pytest.raises(SetupError, match=r"^of our own$"):
        image.run_build(["buildx", "build", "."], log, "local")
    assert "#12 0.412 error: of our own" in Path(tmp_path / "log").read_text()
    assert capsys.readouterr().err == "setup:   bootstrap 1/1\n"
    (call,) = docker.calls()
    assert "hf_secret" not in json.dumps(call)
