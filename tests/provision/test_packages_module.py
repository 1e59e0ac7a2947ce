"""The modules `packages` and `apt_source` in a bare Debian: real apt and dpkg, a real signed repository.

Each test begins and ends with the same packages: what the modules added is taken away again, and nothing else.
"""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

import ansible
from tests.provision.lab import ROOT, Host, docker
from tests.provision.standin.packages import Package, Signer, write_flat

RELEASE = os.environ.get("RECIPE_HOST_RELEASE", "bookworm")
STATE = "/var/lib/qlora-70b-recipe/packages.json"
URL = "http://127.0.0.1:8000"
TAKE_STATE = """
dpkg-query -W -f '${Package} ${Version} ${Status}\\n'; apt-mark showmanual; apt-mark showhold
find /etc -type f -exec md5sum {} + | sort -k 2; ls /var/lib/apt/lists | grep 127.0.0.1 || true
"""


# --- the machine ----------------------------------------------------------------------------------------------------


def packages() -> list[Package]:
    conf = "/etc/lab-tool.conf"
    slow = "#!/bin/sh\nuntil [ -e /tmp/fast ]; do touch /tmp/unpacking; sleep 0.1; done\n"
    lasts = "#!/bin/sh\n[ ! -e /tmp/lasts ] || { touch /tmp/removing; sleep 60; }\n"
    fails = "#!/bin/sh\n[ ! -e /tmp/fails ] || { echo building the module; echo 'Error! no headers' >&2; exit 7; }\n"
    return [
        Package("lab-lib", "1.0", {"Provides": "lab-virtual"}),
        Package("lab-tool", "1.0", {"Depends": "lab-lib"}, {conf: "1\n"}, conffiles=(conf,)),
        Package("lab-tool", "2.0", {"Depends": "lab-lib"}, {conf: "2\n"}, conffiles=(conf,)),
        Package("lab-foe", "1.0", {"Conflicts": "lab-lib"}),
        Package("lab-slow", "1.0", {"Depends": "lab-lib"}, scripts={"preinst": slow}),
        Package("lab-lasts-prerm", "1.0", {"Depends": "lab-lib"}, scripts={"prerm": lasts}),
        Package("lab-lasts-postrm", "1.0", {"Depends": "lab-lib"}, scripts={"postrm": lasts}),
        Package("lab-fails", "1.0", {"Depends": "lab-lib"}, scripts={"postinst": fails}),
        Package("lab-broken", "1.0", {"Depends": "lab-missing (>= 2)"}),
        Package("lab-damaged", "1.0"),
        Package("lab-user", "1.0", {"Depends": "lab-virtual | lab-spare"}),
        Package("lab-spare", "1.0"),
    ]


def packed(folder: Path) -> bytes:
    """A tar of what the machine gets: the repository, our modules, and of Ansible what it sends with a module."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(folder, "opt/repo")
        of_ansible = Path(ansible.__file__).parent
        tar.add(
            of_ansible / "release.py", "opt/lab/ansible/__init__.py"
        )  # all that Ansible sends of the package itself
        tar.add(of_ansible / "module_utils", "opt/lab/ansible/module_utils")
        for file in (ROOT / "ansible/module_utils").glob("*.py"):
            tar.add(file, f"opt/lab/ansible/module_utils/{file.name}")
        tar.add(ROOT / "ansible/library", "opt/lab/library")
    return out.getvalue()


@pytest.fixture(scope="module")
def signer():
    with Signer("lab") as made:
        yield made


@pytest.fixture(scope="module")
def machine(tmp_path_factory, signer, debian_mirror, host_images, ssh_key):
    """A Debian with a repository of its own on port 8000, and our modules."""
    folder = tmp_path_factory.mktemp("packages") / "repo"
    write_flat(folder, packages(), signer, {"Origin": "lab"})
    damaged = next(folder.glob("lab-damaged_*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (folder / "key.asc").write_text(signer.public)
    with Host(RELEASE, debian_mirror, ssh_key) as target:
        docker("cp", "-", f"{target.container}:/", data=packed(folder))
        target.run(
            "chown -R root: /opt; cd /opt/repo; (python3 -m http.server 8000 >/dev/null 2>&1 &); touch /opt/began"
        )
        target.run(
            "for i in $(seq 50); do python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8000))'"
            " 2>/dev/null && exit; sleep 0.1; done; exit 1"
        )
        # Debian's 60,000 packages make each call of apt half a second slower; `debian` brings them back.
        target.run(
            "mv /etc/apt/sources.list.d/debian.sources /opt/; rm -f /var/lib/apt/lists/*_*; "
            "echo 'Acquire::Languages \"none\";' >/etc/apt/apt.conf.d/lab"
        )
        yield target


@pytest.fixture
def debian(machine):
    machine.run("cp /opt/debian.sources /etc/apt/sources.list.d/")
    yield
    machine.run("rm -f /etc/apt/sources.list.d/debian.sources /var/lib/apt/lists/*_*")


@pytest.fixture
def call(machine):
    """call("packages", name=[…], check=True): the module's result; `failed` and `msg` in it where it fails."""

    def run(module: str, check: bool = False, before: str = "", **arguments) -> dict:
        arguments |= {"_ansible_check_mode": check, "_ansible_diff": True}
        done = machine.run(
            f"{before} PYTHONPATH=/opt/lab python3 /opt/lab/library/{module}.py",
            check=False,
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        )
        assert done.stdout.lstrip().startswith("{"), done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def source(machine, call, signer):
    """The repository as a source, and a machine that is at the end as it was."""
    before = machine.run(TAKE_STATE).stdout
    assert call("apt_source", **lab_source(signer)).get("changed")
    machine.run("touch /tmp/fast")
    yield
    machine.run("rm -f /tmp/fast /tmp/fails /tmp/unpacking")
    done = call("packages", state="purge_added")
    assert not done.get("failed"), done
    call("apt_source", name="lab", state="absent")
    assert machine.run(TAKE_STATE).stdout == before


def lab_source(signer, **changes) -> dict:
    grouped = " ".join(signer.fingerprint[i : i + 4] for i in range(0, 40, 4)).lower()
    return {
        "name": "lab",
        "uris": [URL],
        "suites": ["/"],
        "key_url": f"{URL}/key.asc",
        "fingerprint": grouped,
    } | changes


def record(machine) -> dict:
    return json.loads(machine.read(STATE))


# --- packages -------------------------------------------------------------------------------------------------------


def test_debian_packages_come_once_and_go_without_a_trace(machine, call, debian):
    before = machine.run(TAKE_STATE).stdout
    wanted = {"name": ["earlyoom", "no-such-package|dosfstools"]}
    unknown = call("packages", check=True, **wanted)
    assert unknown["changed"] and "+ earlyoom (not known to apt yet)\n" in unknown["diff"]["after"]
    machine.run("apt-get -qq update")
    planned = call("packages", check=True, **wanted)
    assert planned["changed"] and "+ earlyoom 1." in planned["diff"]["after"]
    assert machine.run(TAKE_STATE).stdout == before
    done = call("packages", **wanted)
    assert {"earlyoom", "dosfstools"} <= set(done["added"]), done
    assert done["diff"] == planned["diff"]
    assert set(record(machine)["added"]) == set(done["added"])
    # The second time apt is not called: it could not be.
    machine.run(
        "mkdir -p /opt/none; for p in get cache mark; do printf '#!/bin/sh\\nexit 9\\n' >/opt/none/apt-$p; done; "
        "chmod 755 /opt/none/*"
    )
    began = time.monotonic()
    again = call("packages", before="PATH=/opt/none:$PATH", **wanted)
    assert (
        time.monotonic() - began < 1.5
    )  # 0.2 s of it are ours, the rest is docker's and the slowest machine's
    assert again["changed"] is False and again["added"] == []
    assert machine.read("/etc/default/earlyoom")
    gone = call("packages", state="purge_added")
    assert set(gone["removed"]) == set(done["added"]) and gone["kept"] == []
    assert machine.run(TAKE_STATE).stdout == before
    assert call("packages", state="purge_added")["changed"] is False


def test_held_upgraded_and_absent(machine, call, source):
    assert "lab-tool 1.0" in call("packages", name=["lab-tool=1.*"], hold=True)["diff"]["after"]
    assert machine.run("apt-mark showhold").stdout == "lab-tool\n"
    again = call("packages", name=["lab-tool"], hold=True)
    assert again["changed"] is False
    assert call("packages", name=["lab-tool"], state="latest")["diff"]["after"] == "~ lab-tool 1.0 -> 2.0\n"
    assert machine.run("apt-mark showhold").stdout == "lab-tool\n"
    assert call("packages", name=["lab-tool"], state="latest")["changed"] is False
    assert call("packages", name=["lab-tool=1.0"])["diff"]["after"] == "~ lab-tool 2.0 -> 1.0\n"
    done = call("packages", name=["lab-tool", "bash"], state="absent")
    assert done["removed"] == ["lab-tool"] and done["kept"] == ["bash stays: this recipe did not bring it"]
    assert record(machine)["added"] == ["lab-lib"] and record(machine)["holds"] == []
    # What the user holds is the user's.
    machine.run("apt-get -qq install lab-tool=1.0 && apt-mark hold lab-tool")
    done = call("packages", name=["lab-tool"], state="latest")
    assert done["msg"].startswith("lab-tool would change lab-tool, which somebody has put on hold"), done
    machine.run("apt-mark unhold lab-tool; apt-get -qq purge lab-tool lab-lib")


def test_what_a_package_of_the_user_needs_stays(machine, call, source):
    call("packages", name=["lab-tool"])
    machine.run("apt-get -qq install lab-user")
    done = call("packages", state="purge_added")
    assert done["removed"] == ["lab-tool"] and done["kept"] == ["lab-lib stays: lab-user needs it"], done
    assert "lab-lib" in machine.run("apt-mark showauto").stdout  # it goes with lab-user
    machine.run("apt-get -qq purge --autoremove lab-user")
    assert "lab-" not in machine.run("dpkg-query -W").stdout


def test_what_the_user_asked_for_since_stays(machine, call, source):
    call("packages", name=["lab-tool"])
    machine.run("apt-get -qq install lab-lib")
    done = call("packages", state="purge_added")
    assert done["removed"] == ["lab-tool"] and done["kept"][0].startswith(
        "lab-lib stays: somebody has asked for it"
    )
    machine.run("apt-get -qq purge lab-lib")


def test_settings_and_marks_of_before_come_back(machine, call, source):
    machine.run(
        "apt-get -qq install lab-tool=1.0 && apt-mark auto lab-lib lab-tool && echo mine >/etc/lab-tool.conf"
    )
    assert call("packages", name=["lab-tool"], state="latest")["added"] == []
    assert "lab-tool" in machine.run("apt-mark showmanual").stdout
    call("packages", state="purge_added")
    assert "lab-tool" in machine.run("apt-mark showauto").stdout
    machine.run("apt-get -qq remove lab-tool lab-lib")
    call("packages", name=["lab-tool"])
    done = call("packages", state="purge_added")
    assert set(done["removed"]) == {"lab-tool", "lab-lib"}
    assert machine.read("/etc/lab-tool.conf") == "mine\n"
    machine.run("apt-get -qq purge lab-tool")


def test_nothing_is_removed_that_was_not_named(machine, call, source):
    machine.run("apt-get -qq install lab-tool")
    for check in (True, False):
        done = call("packages", name=["lab-foe"], replaces=["lab-lib"], check=check)
        assert done["msg"].startswith(
            "lab-foe would remove lab-tool; expected to remove nothing but lab-lib;"
        ), done
    assert (
        machine.run("dpkg-query -W -f '${Status}\\n' lab-tool lab-lib").stdout == "install ok installed\n" * 2
    )
    done = call("packages", name=["lab-foe"], replaces=["lab-*"])
    assert done["added"] == ["lab-foe"] and done["replaced"] == ["lab-lib", "lab-tool"], done
    machine.run("apt-get -qq purge lab-tool")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab-nothing", "lab-nothing: no package of this name in apt's sources"),
        ("lab-tool=3.*", "lab-tool: no version 3.* in apt's sources; they have 2.0, 1.0"),
        (
            "lab-broken",
            "lab-broken cannot be installed beside what is installed here: lab-broken: Depends: lab-missing (>= 2) but "
            "it is not installable; nothing was changed",
        ),
        (
            "lab-damaged",
            f"{URL}/./lab-damaged_1.0_amd64.deb is not what its repository promised (Hash Sum mismatch)",
        ),
        ("--purge", "name: '--purge'; expected NAME, NAME=VERSION or A|B"),
    ],
)
def test_failures_are_one_line_and_change_nothing(machine, call, source, name, message):
    before = machine.run("dpkg-query -W").stdout
    done = call("packages", name=["mawk", name])
    assert done["failed"] and done["msg"].startswith(message) and "\n" not in done["msg"], done
    assert machine.run("dpkg-query -W").stdout == before


def test_a_script_that_fails_is_named_and_run_again(machine, call, source):
    machine.run("touch /tmp/fails")
    done = call("packages", name=["lab-fails"])
    assert done["msg"].startswith(
        "lab-fails: its post-installation script failed (exit status 7): building the module / Error! no headers; "
    ), done
    assert "Error! no headers" in done["stderr"] and "Error! no headers" in done["log"]
    assert set(record(machine)["added"]) == {"lab-lib", "lab-fails"} and record(machine)["pending"] is None
    machine.run("rm /tmp/fails")
    assert call("packages", name=["lab-fails"])["diff"]["after"] == "! lab-fails completed\n"


def test_no_network_is_said_for_whom(machine, call, source):
    machine.run("echo 'deb http://127.0.0.2:9 x main' >/etc/apt/sources.list")
    try:
        done = call("packages", name=["lab-other"])
        assert done["msg"].startswith("apt cannot reach 127.0.0.2:9 ("), done
        assert "refused" in done["msg"] and "needed for lab-other; check the network" in done["msg"]
        # Another broken source is none of our business when all is known.
        machine.run(f"echo 'deb {URL}/none x main' >/etc/apt/sources.list")
        done = call("packages", name=["lab-tool"], cache_valid_seconds=0)
        assert done["changed"] and f"apt-get update: no repository at {URL}/none x" in str(done["warnings"])
    finally:
        machine.run("rm /etc/apt/sources.list")


def test_a_full_disk_is_said(machine, call, source):
    machine.run("apt-get clean; mount -t tmpfs -o size=8k x /var/cache/apt/archives")
    try:
        done = call("packages", name=["lab-tool"])
        assert "free space" in done["msg"] or "no space left" in done["msg"], done
        assert "/var/cache/apt/archives" in done["msg"] and "make room there" in done["msg"]
    finally:
        machine.run("umount /var/cache/apt/archives")


def test_a_lock_is_waited_for_and_then_named(machine, call, source):
    hold = "import fcntl, sys, time; file = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    machine.put("/opt/holder", hold + "print(flush=True); time.sleep(float(sys.argv[1]))")
    machine.run("(python3 /opt/holder 60 & echo $! >/tmp/holder) | head -1")
    process = machine.read("/tmp/holder").strip()
    done = call("packages", name=["lab-tool"], lock_seconds=1)
    assert done["msg"] == (
        f"apt is locked by holder (pid {process}) since more than 1 s; expected it to be free; wait until it ends, then "
        "run the play again"
    )
    assert not machine.run(f"grep pending.*before {STATE}", check=False).stdout
    machine.run(f"(sleep 1; kill {process}) >/dev/null 2>&1 &")
    assert call("packages", name=["lab-tool"], lock_seconds=30)["changed"]


def kill_while(machine, programs: str, sign: str, **arguments) -> None:
    """Start `packages`, and kill it and these programs once a package's script has made the file `sign`."""
    machine.put("/tmp/arguments", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}))
    start = "PYTHONPATH=/opt/lab setsid python3 /opt/lab/library/packages.py >/dev/null 2>&1 </tmp/arguments & echo $!"
    module = machine.run(start).stdout.strip()
    machine.run(f"for i in $(seq 300); do [ ! -e {sign} ] || exit 0; sleep 0.1; done; exit 1")
    machine.run(
        f"kill -9 {module}; for name in {programs}; do for p in /proc/[0-9]*; do "
        '[ "$(cat $p/comm 2>/dev/null)" != $name ] || kill -9 ${p#/proc/}; done; done'
    )


@pytest.mark.parametrize("killed", ["apt-get", "dpkg apt-get"])
def test_killed_while_dpkg_unpacks_and_completed_by_the_next(machine, call, source, killed):
    machine.run("rm /tmp/fast")
    kill_while(machine, killed, "/tmp/unpacking", name=["lab-slow"])
    assert record(machine)["pending"]["requested"] == ["lab-slow"] and record(machine)["added"] == []
    assert "lab-slow" in machine.run("dpkg --audit").stdout
    assert call("packages", name=["lab-slow"], check=True)["changed"]
    machine.run("touch /tmp/fast")
    done = call("packages", name=["lab-slow"])
    assert done.get("changed"), done
    assert machine.run("apt-get check; dpkg --audit").stdout.count("lab-") == 0
    assert set(record(machine)["added"]) == {"lab-slow", "lab-lib"} and record(machine)["pending"] is None
    assert call("packages", name=["lab-slow"])["changed"] is False


@pytest.mark.parametrize("script", ["prerm", "postrm"])  # half configured, and half installed
def test_killed_while_dpkg_removes_and_completed_by_the_next(machine, call, source, script):
    name = f"lab-lasts-{script}"
    call("packages", name=[name])
    for state in ("present", "purge_added"):
        machine.run("touch /tmp/lasts")
        kill_while(machine, "apt-get dpkg sleep", "/tmp/removing", state="purge_added")
        machine.run("rm /tmp/lasts /tmp/removing")
        assert name in machine.run("dpkg --audit").stdout
        if state == "purge_added":  # as in unprovision.yml, it can be had no more
            machine.run("rm /etc/apt/sources.list.d/recipe-lab.sources; apt-get -qq update")
        done = call("packages", name=[name] if state == "present" else [], state=state)
        assert done.get("kept") == [] and not machine.run("dpkg --audit").stdout, done
        there = machine.run("dpkg-query -W 'lab-*'", check=False).stdout
        assert there.count("1.0") == (2 if state == "present" else 0)


# --- apt_source -----------------------------------------------------------------------------------------------------


def sources(machine) -> str:
    return machine.run(
        "cd /etc/apt; ls -l sources.list.d keyrings preferences.d; cat sources.list.d/* preferences.d/*; "
        "md5sum keyrings/*; ls /var/lib/apt/lists",
        check=False,
    ).stdout


def test_a_source_comes_once_and_goes_with_its_lists(machine, call, signer):
    before = sources(machine)
    wanted = lab_source(signer, pin={"packages": ["lab-*"], "priority": 700, "origin": "127.0.0.1"})
    planned = call("apt_source", check=True, **wanted)
    assert sources(machine) == before
    done = call("apt_source", **wanted)
    assert (
        done["changed"] and done["diff"] == planned["diff"] and f"URIs: {URL}\n" in done["diff"][0]["after"]
    )
    assert " 700\n" in machine.run("apt-cache policy lab-tool").stdout
    # Nothing of the network: the key could not be loaded again.
    machine.run("mv /opt/repo /opt/away")
    assert call("apt_source", **wanted)["changed"] is False
    machine.run("mv /opt/away /opt/repo")
    assert call("apt_source", name="lab", state="absent")["changed"]
    assert sources(machine) == before
    assert " 700\n" not in machine.run("apt-cache policy lab-tool").stdout
    assert call("apt_source", name="lab", state="absent")["changed"] is False


def test_another_key_changes_nothing(machine, call, signer):
    before = sources(machine)
    other = "0123 4567 89AB CDEF 0123 4567 89AB CDEF 0123 4567"
    done = call("apt_source", **lab_source(signer, fingerprint=other))
    assert done["msg"] == (
        f"key of lab ({URL}/key.asc): fingerprint {signer.fingerprint}, expected {other.replace(' ', '')}: not the "
        "vendor's key, a mirror or proxy serves another file; nothing was changed"
    )
    done = call("apt_source", **lab_source(signer, key_url=f"{URL}/Packages"))
    assert "not an OpenPGP key" in done["msg"] and "nothing was changed" in done["msg"], done
    done = call("apt_source", **lab_source(signer, key_url=f"{URL}/none.asc"))
    assert "404" in done["msg"] and "check the network" in done["msg"], done
    assert sources(machine) == before


def test_what_the_key_did_not_sign_is_refused_and_the_old_source_stays(machine, call, signer):
    machine.run(
        "cd /opt; rm -rf changed unsigned; mkdir changed unsigned; cp repo/* changed; cp repo/* unsigned; "
        "sed -i s/lab/bad/ changed/InRelease; rm unsigned/InRelease unsigned/Release.gpg; "
        "mv changed unsigned repo/"
    )
    assert call("apt_source", **lab_source(signer))["changed"]
    before = sources(machine)
    for folder, message in (
        ("changed", "the signature of the repository"),
        ("unsigned", "is not signed"),
        ("nothing", "it has no Release file"),
    ):
        done = call("apt_source", **lab_source(signer, uris=[f"{URL}/{folder}"]))
        assert message in done["msg"] and done["msg"].endswith("nothing was changed"), done
        assert f"{URL}/{folder}" in done["msg"]
        assert sources(machine) == before
    call("apt_source", name="lab", state="absent")
    machine.run("rm -r /opt/repo/changed /opt/repo/unsigned")


def test_ours_agrees_with_a_source_of_the_user(machine, call, signer):
    before = sources(machine)
    # The user's, by a key at another place.
    machine.run(
        f"install -D /opt/repo/key.asc /etc/apt/keyrings/user.asc; echo 'deb [signed-by=/etc/apt/keyrings/user.asc] "
        f"{URL} /' >/etc/apt/sources.list.d/user.list"
    )
    done = call("apt_source", **lab_source(signer))
    assert "Signed-By: /etc/apt/keyrings/user.asc\n" in done["diff"][0]["after"], done
    assert call("apt_source", **lab_source(signer))["changed"] is False
    machine.run("apt-get -qq update && apt-get -s install lab-tool")
    call("apt_source", name="lab", state="absent")
    assert "2.0" in machine.run("apt-cache policy lab-tool").stdout  # the user's still has it
    # With another key it is not for us to decide which is right.
    with Signer("other") as other:
        machine.put("/etc/apt/keyrings/user.asc", other.public)
    done = call("apt_source", **lab_source(signer))
    assert done["msg"].startswith(
        "/etc/apt/sources.list.d/user.list has http://127.0.0.1:8000/ / with another key"
    ), done
    machine.run(
        "rm /etc/apt/keyrings/user.asc /etc/apt/sources.list.d/user.list; rm -f /var/lib/apt/lists/127*"
    )
    assert sources(machine) == before


def test_more_components_of_the_distribution(machine, call, debian):
    before = sources(machine)
    codename = machine.run(". /etc/os-release; echo $VERSION_CODENAME").stdout.strip()
    wanted = {
        "name": "more",
        "uris": ["http://deb.debian.org/debian"],
        "suites": [codename],
        "components": ["contrib"],
        "key_file": "/usr/share/keyrings/debian-archive-keyring.gpg",
    }
    done = call("apt_source", **wanted)
    assert done.get("changed"), done
    assert call("apt_source", **wanted)["changed"] is False
    assert "contrib" in machine.run("apt-cache policy").stdout
    call("apt_source", name="more", state="absent")
    assert sources(machine) == before
