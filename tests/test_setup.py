"""Set-up says in one line what is missing, and costs nothing when done; make passes on what it is told."""

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from tests.clones import environment, makefile_words, setup


def run_setup(clone, *args, **changes):
    command = [sys.executable, str(clone / "scripts/setup.py"), *args]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=120)


def finish(clone, wanted="cpu"):
    """A .venv as a finished set-up leaves it, as far as set-up looks at it."""
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to(sys.executable)
    (clone / ".venv/bin/recipe").touch()
    setup.write_stamp(wanted, clone)


@contextlib.contextmanager
def locked(clone):
    """As while another set-up is at work."""
    folder = os.open(clone, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    yield
    os.close(folder)


def fake_python(folder, answer):
    """A program that answers set-up's question as a Python of that kind would."""
    program = folder / "python-fake"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return str(program)


# --- one line and exit code 2 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3 9 2 - /usr/bin/python3", r"found Python 3\.9\.2 \(/usr/bin/python3\), needed is 3\.11 to 3\.14"),
        ("3 15 0 - /usr/bin/python3", r"found Python 3\.15\.0 .*needed is 3\.11 to 3\.14"),
        ("3 11 2 ensurepip /usr/bin/python3", r"lacks ensurepip: .*`sudo apt install python3-venv`"),
        ("hello", r"PYTHON=.*python-fake: this does not run as a Python"),
    ],
)
def test_unfit_python(clone, answer, expected):
    done = run_setup(clone, PYTHON=fake_python(clone, answer))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(expected, done.stderr)
    assert not (clone / ".venv").exists()


def test_a_real_python_without_ensurepip_is_recognised(tmp_path):
    """Debian's python3 without python3-venv is a Python whose ensurepip cannot be found."""
    blocked = tmp_path / "python3"
    hide = "import sys; sys.modules.update(dict.fromkeys(['ensurepip'])); exec(sys.argv.pop(1))"
    blocked.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{hide}" "$1"\n')
    blocked.chmod(0o755)
    with pytest.raises(setup.SetupError, match="lacks ensurepip"):
        setup.find_python(str(blocked))


def test_an_old_python3_gives_way_to_a_newer_one_on_path():
    answers = {
        "old": ((3, 9, 2), "", "/old"),
        "bare": ((3, 12, 1), "ensurepip", "/bare"),
        "ok": ((3, 11, 4), "", "/ok"),
    }
    assert setup.find_python(None, ["old", "bare", "none", "ok"], answers.get) == ((3, 11, 4), "/ok")


@pytest.mark.parametrize(
    ("system", "machine", "libc", "expected"),
    [
        ("Darwin", "arm64", "", "macOS is not supported"),
        ("Windows", "AMD64", "", "Windows is not supported.*WSL2"),
        ("Linux", "ppc64le", "glibc", "ppc64le is not supported"),
        ("Linux", "x86_64", "", "no glibc"),
    ],
)
def test_unsupported_platform(system, machine, libc, expected):
    with pytest.raises(setup.SetupError, match=expected):
        setup.check_platform(system, machine, libc)


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_no_disk_space(tmp_path, flavour):
    with pytest.raises(setup.SetupError, match=r"1\.0 GiB free, .* need \d+\.\d GiB"):
        setup.check_disk(tmp_path, flavour, free_bytes=2**30)


def test_unknown_flavour(clone):
    done = run_setup(clone, FLAVOUR="rocm")
    assert (done.returncode, done.stderr) == (2, "setup: FLAVOUR=rocm: expected cpu or gpu\n")


def test_no_network_names_the_host(clone):
    done = run_setup(clone, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert done.returncode == 2
    assert "no network: 127.0.0.1 cannot be reached" in done.stderr.splitlines()[-1]
    assert not setup.finished("cpu", clone)


def test_hash_mismatch_names_file_and_lock(clone, tmp_path):
    """An index that serves another file under a locked name and version."""
    version = setup.lock_entries("requirements-cpu.lock")["pip"][0].split()[0].partition("==")[2]
    wheel = tmp_path / f"pip-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"pip-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: pip\nVersion: {version}\n"
        )
    done = run_setup(clone, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert f"hash mismatch: pip=={version}" in last
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in last
    assert "requirements-cpu.lock" in last


def test_an_index_without_the_package(clone, tmp_path):
    done = run_setup(clone, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 2
    assert "pip finds no file of pip==" in done.stderr.splitlines()[-1]


def test_full_disk_while_installing():
    assert "disk became full" in setup.explain(["ERROR: [Errno 28] No space left on device"], "the lock")


# --- which build of torch ---------------------------------------------------------------------------------


class FakePip:
    """Answers as pip does, for an index that has this file."""

    def __init__(self, url):
        self.url = url

    def locate_torch(self, version, extra=()):
        return self.url


@pytest.mark.parametrize(
    ("file", "flavour"),
    [
        ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", "cpu"),
        ("torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl", "cpu"),
        ("torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", "gpu"),
    ],
)
def test_unreachable_torch_index_falls_back_and_says_what_it_takes(tmp_path, capfd, file, flavour):
    wheel = tmp_path / file.replace("%2B", "+")
    wheel.write_bytes(bytes(3_000_000))
    pip = FakePip(f"file://{tmp_path}/{file}")
    assert setup.choose_torch(pip, "cpu", "2.13.0", "http://127.0.0.1:9/whl/cpu") == (flavour, [])
    told = capfd.readouterr().err
    assert "TORCH_INDEX 127.0.0.1 does not answer" in told
    assert f"{wheel.name}, 3 MB" in told


def test_nvidia_gpu_is_seen_on_the_pci_bus(tmp_path):
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x040300\n")  # the sound part of a graphics card
    assert not setup.has_nvidia_gpu(tmp_path)
    (device / "class").write_text("0x030000\n")
    assert setup.has_nvidia_gpu(tmp_path)


# --- done, interrupted, at the same time ------------------------------------------------------------------


def test_second_setup_does_nothing_at_once(clone):
    finish(clone)
    begin = time.monotonic()
    done = run_setup(clone, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert (done.returncode, done.stderr) == (0, "setup: ready (nothing to do)\n")
    assert time.monotonic() - begin < 2
    assert run_setup(clone, "--quiet").stderr == ""


@pytest.mark.parametrize(
    "change", ["lock", "flavour", "moved", "python", "other python asked", "interrupted"]
)
def test_any_change_repeats_the_setup(clone, change):
    finish(clone)
    assert setup.finished("cpu", clone)
    if change == "lock":
        with open(clone / "requirements-cpu.lock", "a") as changed:
            changed.write("# changed\n")
    elif change == "moved":
        clone = clone.rename(clone.with_name("elsewhere"))
    elif change == "python":
        (clone / ".venv/bin/python").unlink()
        (clone / ".venv/bin/python").symlink_to("/bin/sh")
    elif change == "interrupted":
        (clone / ".venv/setup.json").unlink()
    asked = "/usr/bin/python3" if change == "other python asked" else None
    assert not setup.finished("gpu" if change == "flavour" else "cpu", clone, asked)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_setup_and_leave_it_unfinished(clone, number, code):
    with locked(clone):
        command = [sys.executable, str(clone / "scripts/setup.py")]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert "another set-up is at work here" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=10) == code
        assert "Traceback" not in process.stderr.read()


def test_concurrent_setup_waits_and_finds_the_work_done(clone):
    with locked(clone):
        command = [sys.executable, str(clone / "scripts/setup.py")]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert "another set-up is at work here" in process.stderr.readline()
        finish(clone)
    assert process.wait(timeout=10) == 0
    assert process.stderr.read() == ""


# --- make -------------------------------------------------------------------------------------------------


def make(clone, *args, **changes):
    env = environment(**changes)
    return subprocess.run(["make", *args], cwd=clone, env=env, capture_output=True, text=True)


def test_make_passes_values_as_they_are(clone):
    """A value is data: neither a space nor a quote nor a command in it reaches the shell.

    Here on the host; into the container: tests/image/test_engine.py.
    """
    finish(clone)
    (clone / ".venv/bin/python").unlink()
    echo = clone / ".venv/bin/python"
    echo.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    echo.chmod(0o755)
    setup.write_stamp("cpu", clone)
    name = """a b'c"; touch injected; `touch injected`"""
    values = [f"RUN={name}", "CONFIG=my config.yaml", "DATA=x;y", "ARGS=--set a='b c'"]
    done = make(clone, "train", *values, RUNTIME="host")
    assert done.stdout == (
        f"[-m][recipe][train][--config][my config.yaml][--data][x;y][--run][{name}][--set][a=b c]"
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert not (clone / "injected").exists()


@pytest.mark.parametrize(("words", "changes"), [(["ARGS=-x"], {}), ([], {"ARGS": "-x"})])
def test_args_are_for_the_command_typed_and_not_for_make_below_it(clone, words, changes):
    """`make test ARGS=...` calls make again in its tests; there ARGS once reached `recipe`, which refused it."""
    finish(clone)
    environ = clone / ".venv/bin/python"
    environ.unlink()
    environ.write_text('#!/bin/sh\necho "$@"\nenv\n')
    environ.chmod(0o755)
    setup.write_stamp("cpu", clone)
    called, *environment = make(clone, "test", *words, **changes).stdout.splitlines()
    assert called == "-m pytest -x"
    assert "RUNTIME=auto" in environment
    assert not [line for line in environment if line.startswith("ARGS=")]


def test_make_refuses_a_runtime_it_has_not(clone):
    done = make(clone, "train", "RUNTIME=podman")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "runtime: RUNTIME=podman: expected auto, docker or host"
    assert not (clone / ".venv").exists()


def test_on_the_host_an_unfinished_setup_is_finished_first(clone):
    """Its refusal is the run's: nothing is run by half."""
    done = make(clone, "plan", "RUNTIME=host", FLAVOUR="rocm")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "runtime: FLAVOUR=rocm: expected cpu or gpu"
    done = make(clone, "plan", RUNTIME="host", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "setup: no network: 127.0.0.1 cannot be reached" in done.stderr


def test_make_help_lists_every_target(clone):
    told = make(clone).stdout
    for target in set(makefile_words(r"\.PHONY:")) - {"help", "ready", "python"}:
        assert re.search(rf"^  make {target} ", told, re.MULTILINE), target


def test_make_clean_removes_caches_and_nothing_else(clone):
    kept = ["runs/a/__pycache__/x", "models/m/x", "data/.ruff_cache/x", ".venv/__pycache__/x", "recipe/x.py"]
    gone = ["recipe/__pycache__/x", ".pytest_cache/x", ".mypy_cache/x", "build/x", "x.egg-info/x"]
    for name in kept + gone:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    assert make(clone, "clean").returncode == 0
    assert all((clone / name).exists() for name in kept)
    assert not any((clone / name).parent.exists() for name in gone)


def test_a_linked_venv_is_never_emptied(clone, tmp_path):
    """Making it anew would clear what the link leads to, which may be another checkout's."""
    theirs = tmp_path / "theirs"
    (theirs / "bin").mkdir(parents=True)
    (theirs / "bin/python").touch()
    (clone / ".venv").symlink_to(theirs)
    done = run_setup(clone)
    assert done.returncode == 2 and "is a link" in done.stderr and "remove the link" in done.stderr
    assert (theirs / "bin/python").exists()
