"""The Debian packages of the image: what the lock holds, where they come from, fetched by hash, unpacked the same twice."""

import functools
import hashlib
import http.server
import os
import re
import socket
import subprocess
import tarfile
import threading
import time
from typing import ClassVar

import debian
import pytest
from setup import SetupError

# --- the lock ---------------------------------------------------------------------------------------------


def test_every_package_is_locked_by_hash_place_and_version():
    date, entries = debian.read_lock()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", date)
    assert len(entries) > 100
    for entry in entries:
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), entry
        assert entry["archive"] in debian.ARCHIVES, entry
        assert re.fullmatch(r"pool/\S+_(amd64|all)\.deb", entry["place"]), entry
        # A file's name has the version without its epoch.
        assert entry["version"].rpartition(":")[2].replace("+", "%2b").replace("~", "%7e") in entry["place"]
    names = [entry["package"] for entry in entries]
    assert len(set(names)) == len(names)


def test_each_part_brings_what_it_is_for():
    parts = {}
    for entry in debian.read_lock()[1]:
        parts.setdefault(entry["part"], set()).add(entry["package"])
    assert set(parts) == set(debian.WANTED) == set(debian.PARTS["gpu"])
    assert debian.PARTS["cpu"] == ("base", "cpu")
    assert {"dpkg", "libc6", "bash", "usr-is-merged"} <= parts["base"]
    assert set(debian.WANTED["cpu"]) <= parts["cpu"]
    assert set(debian.WANTED["gpu"]) <= parts["gpu"]
    assert "apt" not in set.union(*parts.values())


def write_lock(path, *entries, date="2026-01-02T03:04:05Z"):
    head = debian.HEADER.format(release="12", suite="bookworm", architecture="amd64", date=date)
    path.write_text(head + "".join("  ".join(entry) + "\n" for entry in entries))
    return path


def test_the_date_of_the_image_is_the_locks(tmp_path):
    lock = write_lock(tmp_path / "debian.lock", ("base", "tiny", "1:2", "debian", "pool/tiny.deb", "0" * 64))
    assert debian.epoch(lock) == 1767323045
    date, (entry,) = debian.read_lock(lock)
    assert (date, entry["package"], entry["version"]) == ("2026-01-02T03:04:05Z", "tiny", "1:2")
    assert 1700000000 < debian.epoch() < time.time()


# --- where they come from ---------------------------------------------------------------------------------

ONE_LINE = """\
# deb http://commented.test/debian bookworm main
deb-src http://source.test/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://one.test/debian/ bookworm main
deb http://two.test/debian bookworm-updates main
deb http://one.test/debian-security bookworm-security main
deb http://other.test/packages stable main
"""
DEB822 = """\
Types: deb
URIs: http://deb822.test/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://deb822.test/debian-security/
Suites: bookworm-security
"""


def test_the_mirrors_are_those_of_apt(tmp_path):
    (tmp_path / "sources.list").write_text(ONE_LINE)
    expected = {"debian": "http://one.test/debian", "debian-security": "http://one.test/debian-security"}
    assert debian.mirrors({}, tmp_path) == expected

    (tmp_path / "sources.list").unlink()
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/a.sources.disabled").write_text(DEB822.replace("deb822", "off"))
    expected = {k: v.replace("one.test", "deb822.test") for k, v in expected.items()}
    assert debian.mirrors({}, tmp_path) == expected


def test_without_a_security_archive_it_lies_beside(tmp_path):
    (tmp_path / "sources.list").write_text("deb http://one.test/debian bookworm main\n")
    assert debian.mirrors({}, tmp_path)["debian-security"] == "http://one.test/debian-security"


def test_a_list_of_mirrors_is_read(tmp_path):
    """As Debian's own cloud images have it."""
    (tmp_path / "mirrors").mkdir()
    (tmp_path / "mirrors/debian.list").write_text("https://cloud.test/debian\n")
    (tmp_path / "sources.list.d").mkdir()
    sources = tmp_path / "sources.list.d/debian.sources"
    sources.write_text(f"Types: deb\nURIs: mirror+file://{tmp_path}/mirrors/debian.list\nSuites: bookworm\n")
    assert debian.mirrors({}, tmp_path)["debian"] == "https://cloud.test/debian"


@pytest.mark.parametrize(
    ("given", "security"),
    [
        ({"DEBIAN_MIRROR": "http://m.test/debian/"}, "http://m.test/debian-security"),
        (
            {"DEBIAN_MIRROR": "http://m.test/archive/debian/20260102T030405Z"},
            "http://m.test/archive/debian-security/20260102T030405Z",
        ),
        ({"DEBIAN_MIRROR": "http://debian/debian"}, "http://debian/debian-security"),
        (
            {"DEBIAN_MIRROR": "http://m.test/debian", "DEBIAN_SECURITY_MIRROR": "http://s.test/sec/"},
            "http://s.test/sec",
        ),
    ],
)
def test_a_mirror_that_is_given_comes_first(tmp_path, given, security):
    (tmp_path / "sources.list").write_text(ONE_LINE)
    expected = {"debian": given["DEBIAN_MIRROR"].rstrip("/"), "debian-security": security}
    assert debian.mirrors(given, tmp_path) == expected


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({}, r"apt on this machine has no Debian mirror: give one with DEBIAN_MIRROR=http://HOST/debian"),
        (
            {"DEBIAN_MIRROR": "http://m.test/ubuntu"},
            r"DEBIAN_MIRROR=http://m\.test/ubuntu: expected an address",
        ),
    ],
)
def test_without_a_mirror_one_line_says_so(tmp_path, environ, line):
    """As on Ubuntu."""
    (tmp_path / "sources.list").write_text("deb http://archive.test/ubuntu noble main\n")
    with pytest.raises(SetupError, match=line) as refused:
        debian.mirrors(environ, tmp_path)
    assert "\n" not in str(refused.value) and refused.value.code == 2


# --- fetched by hash --------------------------------------------------------------------------------------


def make_deb(folder, name, files, version="2.0+x", mode=0o644):
    """A package of these files, at folder/NAME_VERSION_all.deb."""
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@a.test>\nDescription: a\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    for place, text in files.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        if place.endswith("/"):
            (tree / place).mkdir()
        elif text.startswith("-> "):
            (tree / place).symlink_to(text[3:])
        elif text.startswith("= "):
            os.link(tree / text[2:], tree / place)
        else:
            (tree / place).write_text(text)
            (tree / place).chmod(mode)
    for path in tree.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000), follow_symlinks=False)
    deb = folder / f"{name}_{version}_all.deb"
    environ = os.environ | {"SOURCE_DATE_EPOCH": "1000000000"}
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb)]
    subprocess.run(command, check=True, capture_output=True, env=environ)
    return deb


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A Debian mirror of this machine's own, with one package; its address is DEBIAN_MIRROR."""
    pool = tmp_path / "mirror/debian/pool"
    pool.mkdir(parents=True)
    deb = make_deb(tmp_path, "tiny", {"usr/share/tiny/file": "hello"}).rename(pool / "tiny_2.0+x_all.deb")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "mirror"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_mirror(monkeypatch, tmp_path, server.server_address[1])
    yield deb
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        self.asked.append(self.path)


def use_mirror(monkeypatch, tmp_path, port):
    """Neither a proxy nor apt's settings of this machine come between."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "apt.conf"
    settings.write_text('Dir::Etc::main "/dev/null";\nDir::Etc::parts "/dev/null";\nAcquire::Retries "0";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    monkeypatch.setenv("DEBIAN_MIRROR", f"http://127.0.0.1:{port}/debian")


def lock_of(tmp_path, digest, place="pool/tiny_2.0%2bx_all.deb", part="base"):
    return write_lock(tmp_path / "debian.lock", (part, "tiny", "2.0+x", "debian", place, digest))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_packages_are_fetched_once_and_nothing_else_stays(tmp_path, mirror):
    lock, folder = lock_of(tmp_path, sha256(mirror)), tmp_path / "debs"
    folder.mkdir()
    (folder / "of_another_lock.deb").touch()
    debian.fetch(("base",), folder, lock)
    assert names(folder) == ["tiny_2.0+x_all.deb"]
    assert (folder / "tiny_2.0+x_all.deb").read_bytes() == mirror.read_bytes()

    QuietHandler.asked.clear()
    debian.fetch(("base",), folder, lock)
    assert QuietHandler.asked == []

    (folder / "tiny_2.0+x_all.deb").write_bytes(b"damaged")
    debian.fetch(("base",), folder, lock)
    assert sha256(folder / "tiny_2.0+x_all.deb") == sha256(mirror)

    debian.fetch(("gpu",), folder, lock)  # a part that has nothing of this
    assert names(folder) == []


def test_another_file_under_a_locked_name_is_refused(tmp_path, mirror):
    lock, folder = lock_of(tmp_path, "0" * 64), tmp_path / "debs"
    with pytest.raises(SetupError, match=r"^tiny 2\.0\+x cannot be fetched \(.*[Hh]ash.*mismatch") as refused:
        debian.fetch(("base",), folder, lock)
    assert "\n" not in str(refused.value) and refused.value.code == 2
    assert names(folder) == []


def test_a_package_that_the_mirror_dropped(tmp_path, mirror):
    mirror.unlink()
    lock, folder = lock_of(tmp_path, "0" * 64), tmp_path / "debs"
    with pytest.raises(SetupError) as refused:
        debian.fetch(("base",), folder, lock)
    assert str(refused.value) == (
        "the Debian mirror no longer has tiny 2.0+x (debian.lock of 2026-01-02T03:04:05Z): `make lock` takes "
        "today's packages, or DEBIAN_MIRROR= names an archive of that date"
    )
    assert names(folder) == []


def test_a_mirror_that_is_not_there(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        use_mirror(monkeypatch, tmp_path, taken.getsockname()[1])
        with pytest.raises(SetupError) as refused:
            debian.fetch(("base",), tmp_path / "debs", lock_of(tmp_path, "0" * 64))
    said = str(refused.value)
    assert re.search(
        r"^tiny 2\.0\+x cannot be fetched \(.*127\.0\.0\.1.*\); check the network, or name", said
    )
    assert said.endswith("another mirror with DEBIAN_MIRROR=") and "\n" not in said
    assert names(tmp_path / "debs") == []


# --- the base ---------------------------------------------------------------------------------------------


def entries_of(path):
    with tarfile.open(path) as tar:
        return {entry.name: entry for entry in tar}


def test_the_base_is_the_same_twice_and_its_usr_is_merged(tmp_path):
    files = {"bin/tool": "#!", "sbin/admin": "#!", "lib/x/lib.so.1": "so", "lib/x/lib.so": "-> lib.so.1"}
    make_deb(tmp_path, "alpha", files | {"etc/alpha": "1", "bin/again": "= bin/tool"}, mode=0o755)
    files = {"usr/bin/other": "#!", "lib64/ld.so": "-> /lib/x/ld.so", "var/lib/beta/": "", "etc/alpha": "2"}
    docs = {f"usr/share/{name}/beta/text": "a" for name in ("doc", "doc-base", "man", "info", "locale")}
    make_deb(tmp_path, "beta", files | docs | {"usr/share/base-files/x": "b", "usr/share/docs-not": "c"})

    debian.make_base(tmp_path, tmp_path / "one.tar")
    time.sleep(1.1)
    debian.make_base(tmp_path, tmp_path / "two.tar")
    assert sha256(tmp_path / "one.tar") == sha256(tmp_path / "two.tar")
    assert not list(tmp_path.glob("*.part"))

    found = entries_of(tmp_path / "one.tar")
    for name in ("bin", "sbin", "lib", "lib64"):
        assert found[name].issym() and found[name].linkname == f"usr/{name}"
        assert found[f"usr/{name}"].isdir()
        assert not [other for other in found if other.startswith(name + "/")]
    files = {
        "usr/bin/tool",
        "usr/sbin/admin",
        "usr/lib/x/lib.so.1",
        "usr/bin/other",
        "usr/share/base-files/x",
    }
    assert files | {"usr/lib/x/lib.so", "usr/lib64/ld.so", "var/lib/beta", "etc/alpha"} <= set(found)
    assert "usr/share/docs-not" in found
    left_out = [name for name in found if re.match(r"usr/share/(doc|doc-base|man|info|locale)(/|$)", name)]
    assert left_out == []
    tool, again = (
        found["usr/bin/again"],
        found["usr/bin/tool"],
    )  # one of them is a link to the other, as packed
    link, file = (tool, again) if tool.islnk() else (again, tool)
    assert link.linkname == file.name and file.mode == 0o755 and file.uid == file.gid == 0
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert tar.extractfile("etc/alpha").read() == b"1"  # the first package's, once
        assert tar.getnames().count("etc/alpha") == 1
        assert tar.extractfile("usr/bin/tool").read() == b"#!"


def test_the_order_of_the_folder_does_not_matter(tmp_path):
    """Names decide: packages come in the order of their names, not in the disk's."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    alpha = make_deb(tmp_path, "alpha", {"etc/a": "a"})
    beta = make_deb(tmp_path, "beta", {"etc/b": "b"})
    for folder, order in (("one", (alpha, beta)), ("other", (beta, alpha))):
        for deb in order:
            (tmp_path / folder / deb.name).write_bytes(deb.read_bytes())
        debian.make_base(tmp_path / folder, tmp_path / f"{folder}.tar")
    assert sha256(tmp_path / "one.tar") == sha256(tmp_path / "other.tar")


@pytest.mark.parametrize("kept", [0, 300])
def test_a_package_that_cannot_be_unpacked_is_named(tmp_path, kept, capfd):
    deb = make_deb(tmp_path, "alpha", {"etc/a": os.urandom(2000).hex()})
    deb.write_bytes(deb.read_bytes()[:kept])
    (tmp_path / "base.tar").write_text("of before")
    with pytest.raises(SetupError, match=r"alpha_2\.0\+x_all\.deb: dpkg-deb cannot unpack it"):
        debian.make_base(tmp_path, tmp_path / "base.tar")
    assert (tmp_path / "base.tar").read_text() == "of before"
    assert not list(tmp_path.glob("*.part"))
