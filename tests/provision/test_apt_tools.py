"""What the modules for apt are built of: keys read without gpg, apt's failures in a line, locks, dpkg's fields."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import lacks

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))  # where ansible-core is not installed, `ansible` is our folder

import ansible.module_utils  # noqa: E402

ansible.module_utils.__path__.append(str(REPOSITORY / "ansible/module_utils"))

from ansible.module_utils import apt_tools, openpgp_keys  # noqa: E402
from ansible.module_utils.apt_failures import explain, listed  # noqa: E402
from ansible.module_utils.package_record import Record  # noqa: E402

# --- keys -----------------------------------------------------------------------------------------------------------


class Gpg:
    """A gpg with a home of its own."""

    def __init__(self, home: Path):
        home.mkdir(mode=0o700)
        self.home = home

    def __call__(self, *words: str) -> bytes:
        command = ["gpg", "--homedir", self.home, "--batch", "--quiet", "--passphrase", "", *words]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def make(self, name: str, algorithm: str) -> str:
        """The fingerprint of a new key, as gpg says it."""
        self("--quick-generate-key", f"{name} <{name}@example.org>", algorithm, "default", "never")
        rows = self("--list-keys", "--with-colons", name).decode().splitlines()
        return next(row.split(":")[9] for row in rows if row.startswith("fpr:"))


@pytest.fixture(scope="module")
def gpg(tmp_path_factory):
    """gpg is needed: on Debian and Ubuntu it is the package of that name."""
    # Its agent's socket has to have a short path.
    gpg = Gpg(tmp_path_factory.mktemp("g") / "h")
    yield gpg
    subprocess.run(["gpgconf", "--homedir", gpg.home, "--kill", "gpg-agent"], check=True)


@pytest.fixture(scope="module")
def keys(gpg):
    """{name: fingerprint}; rsa and ed25519, each with a subkey."""
    return {"rsa": gpg.make("rsa", "rsa2048"), "curve": gpg.make("curve", "future-default")}


@pytest.mark.parametrize("name", ["rsa", "curve"])
@pytest.mark.parametrize("armor", [(), ("--armor",)])
def test_the_fingerprint_is_gpgs_own(gpg, keys, name, armor):
    exported = gpg(*armor, "--export", name)
    packets = openpgp_keys.dearmor(exported)
    assert openpgp_keys.fingerprints(packets) == [keys[name]]
    assert packets == gpg("--export", name)


def test_each_primary_key_of_a_file_is_seen(gpg, keys):
    both = sorted(keys.values())
    assert sorted(openpgp_keys.fingerprints(gpg("--export"))) == both
    blocks = (
        gpg("--armor", "--export", "rsa") + b"Comment between them\n" + gpg("--armor", "--export", "curve")
    )
    assert sorted(openpgp_keys.fingerprints(openpgp_keys.dearmor(blocks.replace(b"\n", b"\r\n")))) == both


def test_a_key_of_the_distribution_is_read_as_gpg_reads_it(gpg):
    keyrings = sorted(Path("/usr/share/keyrings").glob("*-archive-keyring.gpg"))
    if not keyrings:
        lacks("no keyring of a distribution in /usr/share/keyrings")
    for keyring in keyrings:
        rows = gpg("--show-keys", "--with-colons", str(keyring)).decode().splitlines()
        # A key's own is the first after its line; others there may revoke it.
        primary = [
            next(row.split(":")[9] for row in rows[i:] if row.startswith("fpr:"))
            for i, row in enumerate(rows)
            if row.startswith("pub:")
        ]
        assert sorted(openpgp_keys.fingerprints(keyring.read_bytes())) == sorted(primary)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda key: b"<html><body>please log in", "no packet begins at byte 0"),
        (lambda key: b"", "no public key"),
        (lambda key: key[:-1], "cut off"),
        (lambda key: key[:1], "cut off"),
        (
            lambda key: b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n%%%\n-----END PGP PUBLIC KEY BLOCK-----\n",
            "no public key",
        ),
    ],
)
def test_what_is_no_key_is_said(gpg, keys, damage, message):
    with pytest.raises(ValueError, match=message):
        openpgp_keys.fingerprints(openpgp_keys.dearmor(damage(gpg("--export", "rsa"))))


def test_a_secret_key_is_none_for_apt(gpg, keys):
    secret = gpg("--pinentry-mode", "loopback", "--export-secret-keys", "rsa")
    with pytest.raises(ValueError, match="a packet of kind 5"):
        openpgp_keys.fingerprints(secret)


def test_the_key_of_the_standard_for_version_6():
    """RFC 9580, A.3: its sample certificate and the fingerprint that stands there."""
    primary = bytes.fromhex(
        "c62a0663877fe31b00000020f94da7bb48d60a61e567706a6587d0331999bb9d891a08242ead84543df895a3"
    )
    fingerprint = "CB186C4F0609A697E4D52DFA6C722B0C1F1E27C18A56708F6525EC27BAD9ACC9"
    assert openpgp_keys.fingerprints(primary) == [fingerprint]


# --- failures: what apt 2.4, 2.6 and 3.0 and dpkg have printed ------------------------------------------------------

REFUSED = """\
Err:1 http://127.0.0.1:9  InRelease
  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
Reading package lists...
E: Failed to fetch http://127.0.0.1:9/InRelease  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
REFUSED_3 = """\
Err:1 http://127.0.0.1:9  InRelease
  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
  Unable to connect to 127.0.0.1:9:
Reading package lists...
E: Failed to fetch http://127.0.0.1:9/InRelease  Unable to connect to 127.0.0.1:9:
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
NO_NAME = """\
Err:1 http://no.such.host.example  InRelease
  Could not resolve 'no.such.host.example'
E: Failed to fetch http://no.such.host.example/InRelease  Could not resolve 'no.such.host.example'
"""
HANDSHAKE = """\
E: Failed to fetch https://127.0.0.1:8000/InRelease  SSL connection failed: error:0A00010B:SSL routines::wrong version number / Success [IP: 127.0.0.1 8000]
"""
NOT_THERE = """\
Err:1 http://127.0.0.1:8000  qa-big 1.0
  404  File not found [IP: 127.0.0.1 8000]
E: Failed to fetch http://127.0.0.1:8000/./qa-big_1.0_all.deb  404  File not found [IP: 127.0.0.1 8000]
E: Unable to fetch some archives, maybe run apt-get update or try with --fix-missing?
"""
HASH = """\
Err:1 http://127.0.0.1:8000  qa-hash 1.0
  Hash Sum mismatch
E: Failed to fetch http://127.0.0.1:8000/./qa-hash_1.0_all.deb  Hash Sum mismatch
   Hashes of expected file:
    - Filesize:20672 [weak]
E: Unable to fetch some archives, maybe run apt-get update or try with --fix-missing?
"""
INDEX = """\
E: Failed to fetch http://127.0.0.1:8000/Packages  File has unexpected size (1552 != 1551). Mirror sync in progress? [IP: 127.0.0.1 8000]
"""
OTHER_KEY = """\
W: An error occurred during the signature verification. The repository is not updated and the previous index files will be used. GPG error: http://127.0.0.1:8000  InRelease: The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 8A3498286E7B0660
E: Failed to fetch http://127.0.0.1:8000/InRelease  The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 8A3498286E7B0660
"""
CHANGED_3 = """\
W: An error occurred during the signature verification. The repository is not updated and the previous index files will be used. OpenPGP signature verification failed: http://127.0.0.1:8000  InRelease: Sub-process /usr/bin/sqv returned an error code (1), error message is: Verifying signature:            Message has been manipulated
E: Failed to fetch http://127.0.0.1:8000/InRelease  Sub-process /usr/bin/sqv returned an error code (1), error message is: Verifying signature:            Message has been manipulated
"""
UNSIGNED = "E: The repository 'http://127.0.0.1:8000  Release' is no longer signed.\n"
NO_RELEASE = "E: The repository 'http://127.0.0.1:8000/nono x Release' does not have a Release file.\n"
TWO_KEYS = """\
E: Conflicting values set for option Signed-By regarding source http://127.0.0.1:8000/ /: /etc/apt/keyrings/recipe-qa.gpg !=\x20
E: The list of sources could not be read.
"""
MALFORMED = """\
E: Malformed entry 1 in list file /etc/apt/sources.list.d/bad.list (Suite)
E: The list of sources could not be read.
"""
UNKNOWN = "Reading package lists...\nBuilding dependency tree...\nE: Unable to locate package nonono\n"
VIRTUAL = """\
Package awk is a virtual package provided by:
  mawk 1.3.4.20200120-3.1

E: Package 'awk' has no installation candidate
"""
VERSION = "E: Version '9.9' for 'mtools' was not found\n"
UNMET = """\
The following packages have unmet dependencies:
 qa-broken : Depends: qa-missing (>= 2) but it is not installable
E: Unable to correct problems, you have held broken packages.
E: The following information from --solver 3.0 may provide additional context:
   Unable to satisfy dependencies. Reached two conflicting decisions:
"""
SCRIPT = """\
Unpacking qa-script (1.0) ...
Setting up qa-script (1.0) ...
building the module
Error! it does not build
dpkg: error processing package qa-script (--configure):
 installed qa-script package post-installation script subprocess returned error exit status 7
dpkg: dependency problems prevent configuration of qa-more:
 qa-more depends on qa-script; however:
  Package qa-script is not configured yet.

dpkg: error processing package qa-more (--configure):
 dependency problems - leaving unconfigured
Errors were encountered while processing:
 qa-script
E: Sub-process /usr/bin/dpkg returned an error code (1)
"""
PREINST = """\
Preparing to unpack .../archives/qa-pre_1.0_all.deb ...
no no
dpkg: error processing archive /var/cache/apt/archives/qa-pre_1.0_all.deb (--unpack):
 new qa-pre package pre-installation script subprocess returned error exit status 1
E: Sub-process /usr/bin/dpkg returned an error code (1)
"""
OVERWRITE = """\
Unpacking qa-over (2.0) ...
dpkg: error processing archive /srv/over.deb (--unpack):
 trying to overwrite '/usr/bin/python3', which is also in package python3-minimal 3.11.2-1+b1
E: Sub-process /usr/bin/dpkg returned an error code (1)
"""
FULL = """\
Unpacking qa-big (1.0) ...
dpkg: error processing archive /var/cache/apt/archives/qa-big_1.0_all.deb (--unpack):
 cannot copy extracted data for './opt/qa/big' to '/opt/qa/big.dpkg-new': failed to write (No space left on device)
dpkg-deb: error: paste subprocess was killed by signal (Broken pipe)
E: Sub-process /usr/bin/dpkg returned an error code (1)
"""
FULL_CACHE = "E: You don't have enough free space in /var/cache/apt/archives/.\n"
READ_ONLY = """\
dpkg: error processing archive /var/cache/apt/archives/mtools_4.0.48-1_amd64.deb (--unpack):
 error creating directory './usr/share/doc/mtools': Read-only file system
"""
GO_ON = "then run the play again: it goes on where it stopped"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (REFUSED, "apt cannot reach 127.0.0.1:9 (Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection "
         f"refused)), needed for a, b; check the network, proxy or mirror, {GO_ON}"),
        (REFUSED_3, "apt cannot reach 127.0.0.1:9 (Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection "
         f"refused)), needed for a, b; check the network, proxy or mirror, {GO_ON}"),
        (NO_NAME, "apt cannot reach no.such.host.example (Could not resolve 'no.such.host.example'), needed for a, b; check "
         f"the network, proxy or mirror, {GO_ON}"),
        (HANDSHAKE, "apt cannot reach 127.0.0.1:8000 (SSL connection failed: error:0A00010B:SSL routines::wrong version "
         f"number / Success), needed for a, b; check the network, proxy or mirror, {GO_ON}"),
        (NOT_THERE, "http://127.0.0.1:8000/./qa-big_1.0_all.deb is not there (404), needed for a, b: its mirror is not up to "
         f"date; take another, {GO_ON}"),
        (HASH, "http://127.0.0.1:8000/./qa-hash_1.0_all.deb is not what its repository promised (Hash Sum mismatch): a mirror "
         f"in the middle of its update, or a proxy with an old copy; wait some minutes or take another mirror, {GO_ON}"),
        (INDEX, "http://127.0.0.1:8000/Packages is not what its repository promised (File has unexpected size (1552 != 1551)):"
         " a mirror in the middle of its update, or a proxy with an old copy; wait some minutes or take another mirror, "
         f"{GO_ON}"),
        (OTHER_KEY, "the signature of the repository http://127.0.0.1:8000 is refused: The following signatures couldn't be "
         "verified because the public key is not available: NO_PUBKEY 8A3498286E7B0660; expected one by the key in its source"),
        (CHANGED_3, "the signature of the repository http://127.0.0.1:8000 is refused: Verifying signature: Message has been "
         "manipulated; expected one by the key in its source"),
        (UNSIGNED, "the repository http://127.0.0.1:8000 is not signed; expected a signature by the key in its source"),
        (NO_RELEASE, "no repository at http://127.0.0.1:8000/nono x: it has no Release file; check address and release"),
        (TWO_KEYS, "two of apt's sources have http://127.0.0.1:8000/ / with different Signed-By "
         "(/etc/apt/keyrings/recipe-qa.gpg !=): remove one of them from /etc/apt/sources.list.d, then run the play again"),
        (MALFORMED, "apt cannot read its sources: Malformed entry 1 in list file /etc/apt/sources.list.d/bad.list (Suite); "
         "correct or remove it, then run the play again"),
        (UNKNOWN, "nonono: no package of this name in apt's sources"),
        (VIRTUAL, "awk: no package of this name in apt's sources"),
        (VERSION, "mtools: no version 9.9 in apt's sources"),
        (UNMET, "a, b cannot be installed beside what is installed here: qa-broken: Depends: qa-missing (>= 2) but it is not "
         "installable; nothing was changed"),
        (SCRIPT, "qa-script: its post-installation script failed (exit status 7): building the module / Error! it does not "
         f"build; /var/log/apt/term.log has all of it; correct that, {GO_ON}"),
        (PREINST, "qa-pre: its pre-installation script failed (exit status 1): no no; /var/log/apt/term.log has all of it; "
         f"correct that, {GO_ON}"),
        (OVERWRITE, "over.deb: dpkg cannot unpack it: trying to overwrite '/usr/bin/python3', which is also in package "
         "python3-minimal 3.11.2-1+b1; /var/log/apt/term.log has the rest"),
        (FULL, f"no space left on the file system of /opt/qa/big.dpkg-new, needed for a, b: make room there, {GO_ON}"),
        (FULL_CACHE, f"/var/cache/apt/archives/ has too little free space to load a, b: make room there, {GO_ON}"),
        (READ_ONLY, "/usr/share/doc/mtools cannot be written (read-only file system), needed for a, b: mount it writable, "
         f"{GO_ON}"),
        ("E: something new\n", "apt failed for a, b: something new"),
        ("", "apt failed for a, b: it printed nothing"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_that_says_what_to_do(text, line):
    assert explain(text, ["a", "b"]) == line


def test_long_lists_are_shortened():
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefghij") == "a, b, c, d, e, 5 more"


def test_passwords_in_addresses_are_not_shown():
    error = apt_tools.AptError("cannot load https://me:secret@example.org/key (404)")
    assert str(error) == "cannot load https://example.org/key (404)"
    assert apt_tools.run(["echo", "http://me:secret@example.org/x a@b"])[1] == "http://example.org/x a@b\n"


# --- dpkg and locks -------------------------------------------------------------------------------------------------


def test_relations():
    text = "libc6 (>= 2.34), a:any | b [amd64] | c (<< 1~), default <!nocheck>, "
    assert apt_tools.relations(text) == [["libc6"], ["a", "b", "c"], ["default"]]
    assert apt_tools.relations("") == []


def test_the_holder_of_a_lock_is_named(tmp_path, monkeypatch):
    script = tmp_path / "unattended"
    script.write_text(
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('has it', flush=True)\nsys.stdin.read()\n"
    )
    lock = tmp_path / "lock"
    monkeypatch.setattr(apt_tools, "LOCKS", (str(tmp_path / "none"), str(lock)))
    apt_tools.await_locks(0)
    command = [sys.executable, str(script), str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert apt_tools.lock_holder(str(lock)) == (holder.pid, "unattended")
        with pytest.raises(
            apt_tools.LockError, match=rf"locked by unattended \(pid {holder.pid}\) since more than 0.2 s"
        ):
            apt_tools.await_locks(0.2)
        holder.stdin.close()
    apt_tools.await_locks(0)


def test_a_file_is_written_whole_and_readable_whatever_the_mask(tmp_path):
    old = os.umask(0o077)
    try:
        apt_tools.write_whole(tmp_path / "new/file", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "new/file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_the_record_comes_back_and_what_is_none_is_said(tmp_path):
    path = tmp_path / "packages.json"
    assert Record.load(path) == Record()
    record = Record(added=["a"], holds=["a"], pending={"before": ["b"], "requested": ["a"]})
    record.save(path)
    assert Record.load(path) == record
    for text in ("", "[]", '{"added": "a"}', '{"pending": 1}'):
        path.write_text(text)
        with pytest.raises(apt_tools.AptError, match=r"not a record of packages .*; move it away"):
            Record.load(path)
