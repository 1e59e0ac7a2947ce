"""What library/machine.py says of packages: a real dpkg's and apt's answers, sources, locks, kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import lacks
from tests.provision.fake_root import dpkg_root, link, needs_apt, needs_dpkg, put_on_path, tree

# isort: split
from ansible.module_utils import machine_packages
from ansible.module_utils.machine_reading import ProgramError, answered, run


@needs_dpkg
def test_installed_and_held_as_dpkg_says(tmp_path):
    dpkg_root(
        tmp_path, {"nvidia-driver": "=535.183.01-1", "docker.io": "26.1.5", "zlib": "1", "mokutil": "0.6"}
    )
    found = machine_packages.database(tmp_path)
    assert machine_packages.installed(found, ["mok*"]) == {
        "docker.io": "26.1.5",
        "mokutil": "0.6",
        "nvidia-driver": "535.183.01-1",
    }
    assert machine_packages.held(found) == ["nvidia-driver"]


@needs_dpkg
def test_a_damaged_database_is_said_in_a_line(tmp_path):
    tree(tmp_path, {"var/lib/dpkg/status": "Package: broken\nnonsense\n"})
    with pytest.raises(ProgramError, match=r"`dpkg-query .*` ended with 2, expected 0"):
        machine_packages.database(tmp_path)


def test_a_program_that_hangs_or_is_missing(tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path, sleeper="exec sleep 60")
    assert run("sleeper", seconds=0.2) == (None, "")
    with pytest.raises(ProgramError, match=r"gave no answer within 0\.2 s"):
        answered("sleeper", seconds=0.2)
    assert answered("no-such-program-here") == ""


@needs_apt
def test_candidates_of_a_real_list(tmp_path):
    root = tree(
        tmp_path,
        {
            "etc/apt/sources.list": "deb [trusted=yes] http://deb.example.org/debian trixie main\n",
            "var/lib/apt/lists/deb.example.org_debian_dists_trixie_main_binary-amd64_Packages": (
                "Package: docker.io\nArchitecture: amd64\nVersion: 26.1.5+dfsg1-9\nMaintainer: nobody\n"
                "Filename: pool/d.deb\nSize: 1\nSHA256: 00\nDescription: none\n\n"
            ),
        },
    )
    (root / "etc/apt/preferences.d").mkdir()
    dpkg_root(root, {"bash": "5.2"})
    found = machine_packages.candidates(root, ["docker.io", "nvidia-driver", "bash", "nvidia-*"])
    assert found["bash"] == "5.2" and "nvidia-driver" not in found and "nvidia-*" not in found
    assert found["docker.io"] == "26.1.5+dfsg1-9"
    assert machine_packages.candidates(root, ["nvidia-*"]) == {}


@needs_dpkg
def test_the_runfile_driver_against_debians_links(tmp_path):
    library = "/usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.580.95.05"
    dpkg_root(tmp_path, {"libcuda1": "580"}, {"libcuda1": [library]})
    tree(tmp_path, {library.lstrip("/"): ""})
    link(tmp_path / "etc/alternatives/cuda", library)
    link(tmp_path / "usr/lib/x86_64-linux-gnu/libcuda.so.1", "/etc/alternatives/cuda")
    assert not machine_packages.runfile_driver(tmp_path)
    tree(
        tmp_path,
        {
            "usr/bin/nvidia-smi": "",
            "proc/self/mountinfo": "9 1 0:4 / /usr/bin/nvidia-smi ro - ext4 /dev/sda1 ro\n",
        },
    )
    assert not machine_packages.runfile_driver(tmp_path)  # a container's: bound from the host
    (tmp_path / "proc/self/mountinfo").unlink()
    assert machine_packages.runfile_driver(tmp_path)


@needs_dpkg
def test_files_of_a_merged_usr_have_owners(tmp_path):
    dpkg_root(
        tmp_path,
        {"linux-image-6.1.0-21-amd64": "6.1.90"},
        {"linux-image-6.1.0-21-amd64": ["/lib/modules/6.1.0-21-amd64/kernel"]},
    )
    owner = machine_packages.owner(tmp_path, "/usr/lib/modules/6.1.0-21-amd64/kernel")
    assert owner == "linux-image-6.1.0-21-amd64"
    assert machine_packages.owner(tmp_path, "/usr/bin/true") is None


def test_foreign_sources_of_drivers(tmp_path):
    tree(
        tmp_path,
        {
            "etc/apt/sources.list": "deb http://deb.debian.org/debian trixie main\n# deb http://ppa.launchpad.net/graphics-drivers/ppa x main\n",
            "etc/apt/sources.list.d/cuda-debian12.list": "deb [signed-by=/k.gpg] https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/ /\n",
            "etc/apt/sources.list.d/recipe-nvidia.sources": "URIs: https://developer.download.nvidia.com/compute/cuda/repos/x\n",
            "etc/apt/sources.list.d/off.sources": "Enabled: no\nURIs: https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu\n",
            "etc/apt/sources.list.d/ppa.sources": "Types: deb\nURIs: https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu\nSuites: noble\n",
            "etc/apt/sources.list.d/ppa.list.save": "deb http://ppa.launchpad.net/graphics-drivers/ppa x main\n",
        },
    )
    assert machine_packages.foreign_sources(tmp_path) == [
        "/etc/apt/sources.list.d/cuda-debian12.list",
        "/etc/apt/sources.list.d/ppa.sources",
    ]


def test_mirrors_the_distributions_first_and_without_our_own(tmp_path):
    tree(
        tmp_path / "etc/apt",
        {
            "sources.list": "deb http://deb.debian.org/debian trixie main\n",
            "sources.list.d/recipe-docker.sources": "URIs: https://download.docker.com/linux/debian\n",
            "sources.list.d/zz.sources": "URIs: http://deb.example.org/ubuntu/\nSuites: noble noble-updates\n",
        },
    )
    assert machine_packages.mirrors(tmp_path) == [
        "http://deb.example.org/ubuntu/",
        "http://deb.debian.org/debian",
    ]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, []),
        (
            {"sources.list": "deb [arch=amd64] http://deb.debian.org/debian trixie main contrib # non-free\n"},
            ["contrib", "main"],
        ),
        ({"sources.list": "# deb http://deb.debian.org/debian trixie main contrib\n"}, []),
        ({"sources.list.d/one.list": "deb https://example.org/apt stable nightly universe\n"}, ["universe"]),
        (
            {
                "sources.list.d/debian.sources": "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: trixie\n"
                "components: main\n non-free-firmware\nSigned-By: /k.gpg\n\n"
                "Enabled: no\nURIs: http://deb.debian.org/debian\nComponents: non-free\n\n"
                "URIs: http://security.debian.org/\nSuites: main-like\nComponents: main contrib\n"
            },
            ["contrib", "main", "non-free-firmware"],
        ),
        ({"sources.list.d/debian.sources": "Suites: multiverse\n#Components: main\n"}, []),
        ({"sources.list.d/recipe-components.sources": "Components: contrib non-free\n"}, []),
        ({"sources.list.d/debian.sources.save": "Components: contrib\n", "sources.list~": "deb x y main\n"}, []),
    ],
    ids=[
        "nothing", "list", "commented out", "another's list", "deb822", "deb822 without", "our own", "not apt's",
    ],
)  # fmt: skip
def test_components(tmp_path, files, expected):
    assert machine_packages.components(tree(tmp_path / "etc/apt", files).parents[1]) == expected


STATE = "/var/lib/recipe/packages.json"


def test_what_is_ours(tmp_path):
    assert machine_packages.ours(tmp_path, STATE) == {"sources": [], "packages": []}
    tree(
        tmp_path,
        {
            "etc/apt/sources.list.d/recipe-nvidia.sources": "Types: deb\n",
            "etc/apt/sources.list.d/recipe-docker.sources": "Types: deb\n",
            "etc/apt/sources.list.d/recipe-old.sources.bak": "Types: deb\n",
            "etc/apt/sources.list.d/debian.sources": "Types: deb\n",
            STATE.lstrip("/"): json.dumps({"added": ["earlyoom", "docker.io"], "holds": ["docker.io"]}),
        },
    )
    expected = {"sources": ["docker", "nvidia"], "packages": ["docker.io", "earlyoom"]}
    assert machine_packages.ours(tmp_path, STATE) == expected


@pytest.mark.parametrize(
    "text", ["", "{", '{"added": ["earlyoom"', "[]", "null", '{"added": null}', '{"added": 3}']
)
def test_a_broken_record_reads_as_nothing(tmp_path, text):
    """The module `packages`, which writes it, refuses it with a line of its own."""
    tree(tmp_path, {STATE.lstrip("/"): text, "etc/apt/sources.list.d/recipe-nvidia.sources": "Types: deb\n"})
    assert machine_packages.ours(tmp_path, STATE) == {"sources": ["nvidia"], "packages": []}


def test_who_holds_apts_lock(tmp_path):
    assert machine_packages.lock_holder(tmp_path) is None
    tree(tmp_path, {"var/lib/dpkg/lock-frontend": "", "proc/4242/comm": "unattended-upgr\n"})
    status = (tmp_path / "var/lib/dpkg/lock-frontend").stat()
    number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    other = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino + 1}"
    tree(
        tmp_path,
        {
            "proc/locks": f"1: POSIX  ADVISORY  WRITE 7 {other} 0 EOF\n2: -> POSIX  ADVISORY  WRITE 8 {number} 0 EOF\n"
        },
    )
    assert machine_packages.lock_holder(tmp_path) is None
    tree(tmp_path, {"proc/locks": f"1: POSIX  ADVISORY  WRITE 4242 {number} 0 EOF\n"})
    assert machine_packages.lock_holder(tmp_path) == {"pid": 4242, "name": "unattended-upgr"}


def test_a_real_lock_is_found_by_its_inode(tmp_path):
    """The kernel's own /proc/locks, of a process that holds a lock as apt does."""
    lock = tmp_path / "var/lib/dpkg/lock-frontend"
    tree(tmp_path, {"var/lib/dpkg/lock-frontend": ""})
    code = f"import fcntl,sys; f=open({str(lock)!r},'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()
        locks = Path("/proc/locks").read_text()
        holder.stdin.close()
    if str(holder.pid) not in locks.split():
        lacks("this /proc/locks shows no process ids (a sandbox)")
    tree(tmp_path, {"proc/locks": locks})
    found = machine_packages.lock_holder(tmp_path)
    assert found and found["pid"] == holder.pid


@needs_dpkg
def test_an_interrupted_installation(tmp_path):
    dpkg_root(tmp_path, {"bash": "5.2"})
    assert not machine_packages.dpkg_interrupted(tmp_path)
    tree(tmp_path, {"var/lib/dpkg/updates/0001": ""})
    assert machine_packages.dpkg_interrupted(tmp_path)
    (tmp_path / "var/lib/dpkg/updates/0001").unlink()
    status = tmp_path / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("install ok installed", "install ok half-configured"))
    assert machine_packages.dpkg_interrupted(tmp_path)


def test_a_newer_kernel_of_the_same_flavour():
    packages = dict.fromkeys(
        [
            "linux-image-6.8.0-9-generic",
            "linux-image-6.8.0-10-generic",
            "linux-image-6.8.0-90-lowlatency",
            "linux-image-generic",
        ],
        ("1", "ii"),
    )
    assert machine_packages.newer_kernel("6.8.0-9-generic", packages) == "6.8.0-10-generic"
    assert machine_packages.newer_kernel("6.8.0-10-generic", packages) is None
    assert machine_packages.newer_kernel("6.18.44-self-made", packages) is None
    debian = dict.fromkeys(
        ["linux-image-6.12.41+deb13-amd64", "linux-image-6.12.48+deb13-cloud-amd64"], ("1", "ii")
    )
    assert machine_packages.newer_kernel("6.12.41+deb13-amd64", debian) is None
