"""Set-up says in one line what is missing, costs nothing when done, and both locks agree."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makefile_words(head):
    """What a line of the Makefile lists, over its continuations."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    return re.search(rf"^{head} (.*)", text, re.MULTILINE).group(1).split()


setup, lock = script("setup"), script("lock")
MAKE_SETTINGS = makefile_words("export")


@pytest.fixture
def clone(tmp_path):
    """What set-up needs of a fresh clone, without a .venv."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in setup.LOCKS.values():
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "Makefile", folder)
    return folder


def environment(**changes):
    """This process's environment, without anything that steers make, set-up or pip, and then the changes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS"))}
    for name in MAKE_SETTINGS:  # `make test` hands its own on
        kept.pop(name, None)
    return kept | {"PIP_CONFIG_FILE": os.devnull, "FLAVOUR": "cpu"} | changes


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


# --- the locks --------------------------------------------------------------------------------------------


def versions(flavour):
    """(package, marker) -> version, as a lock says."""
    found = {}
    for entries in setup.lock_entries(setup.LOCKS[flavour], ROOT).values():
        for entry in entries:
            requirement, _, marker = entry.split(" \\\n")[0].partition(" ; ")
            name, version = requirement.split("==")
            found[name, marker] = version
    return found


def test_the_locks_agree_and_differ_by_cuda_only():
    cpu, gpu = versions("cpu"), versions("gpu")
    assert cpu.items() <= gpu.items()
    extra = {name for name, _ in gpu.keys() - cpu.keys()}
    assert "nvidia-nccl-cu13" in extra
    assert [name for name in extra if not name.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_every_locked_file_has_a_hash_and_no_place(flavour):
    text = (ROOT / setup.LOCKS[flavour]).read_text()
    for entries in setup.lock_entries(setup.LOCKS[flavour], ROOT).values():
        for entry in entries:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE), entry
    assert not re.search(r"://|--index-url|--find-links|--extra-index", text)


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_the_locks_hold_what_the_inputs_ask(flavour):
    locked_versions = {(name, version) for (name, _), version in versions(flavour).items()}
    names = {name for name, _ in locked_versions}
    lines = [line for file in lock.INPUTS for line in (ROOT / file).read_text().splitlines()]
    assert {"torch==2.13.0", "pytest"} <= set(lines)
    for line in lines:
        if line and not line.startswith("#"):
            name, _, version = line.lower().replace("_", "-").partition("==")
            assert (name, version) in locked_versions if version else name in names, line


def locked_entries(flavour):
    return lock.entries((ROOT / setup.LOCKS[flavour]).read_text())


def packages(entries):
    return {lock.package(entry) for entry in entries}


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_every_locked_package_is_needed_by_an_input(flavour):
    """An orphan is one that only the CUDA libraries needed, say, or one added by hand."""
    every = locked_entries(flavour)
    assert packages(every) - packages(lock.needed_by(every, *lock.INPUTS)) == set()


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_the_run_time_part_is_without_development_tools(flavour):
    at_run_time = packages(lock.needed_by(locked_entries(flavour), "requirements.in"))
    assert {"torch", "pip", "setuptools", "numpy", "trl", "jinja2", "urllib3"} <= at_run_time
    tools = {"pytest", "mypy", "ruff", "uv", "cyclonedx-bom", "pip-audit", "pluggy", "types-pyyaml"}
    assert tools <= packages(locked_entries(flavour))
    assert tools & at_run_time == set()
    assert ("triton" in at_run_time) == ("nvidia-nccl-cu13" in at_run_time) == (flavour == "gpu")


SMALL_LOCK = """\
# A head.
Big.Name[fast]==1 ; sys_platform == 'linux' \\
    --hash=sha256:0
    # via -r requirements.in
tool==1 \\
    --hash=sha256:0
    # via
    #   -r requirements-dev.in
    #   helper
two==1 ; python_full_version < '3.12' \\
    --hash=sha256:0
    # via
    #   big-name[fast]
    #   tool
two==2 ; python_full_version >= '3.12' \\
    --hash=sha256:0
    # via Big.Name[fast]
deep==1 \\
    --hash=sha256:0
    # via two
helper==1 \\
    --hash=sha256:0
    # via tool
"""


@pytest.mark.parametrize(
    ("roots", "expected"),
    [
        (["requirements.in"], "Big.Name[fast]==1 two==1 two==2 deep==1"),
        (["requirements-dev.in"], "tool==1 two==1 two==2 deep==1 helper==1"),  # a ring: tool and helper
        (["big_name"], "Big.Name[fast]==1 two==1 two==2 deep==1"),
        (["deep"], "deep==1"),
        (["deep", "helper"], "tool==1 two==1 two==2 deep==1 helper==1"),
    ],
)
def test_the_part_of_a_lock_that_something_needs(roots, expected):
    entries = lock.entries(SMALL_LOCK)
    assert len(entries) == 6
    part = lock.needed_by(entries, *roots)
    assert [entry.split()[0] for entry in part] == expected.split()
    assert all("--hash=" in entry for entry in part)


def test_a_root_that_is_not_in_the_lock_is_refused():
    with pytest.raises(ValueError, match=r"other\.in: neither an input nor a package of this lock"):
        lock.needed_by(lock.entries(SMALL_LOCK), "requirements.in", "other.in")


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_a_lock_made_from_other_inputs_is_noticed(tmp_path, flavour):
    for name in (*lock.INPUTS, "pyproject.toml", setup.LOCKS[flavour]):
        shutil.copy(ROOT / name, tmp_path)
    locked_file = tmp_path / setup.LOCKS[flavour]
    assert lock.stale(locked_file) is None

    def after(name, old, new):
        kept = (tmp_path / name).read_text()
        assert old in kept
        (tmp_path / name).write_text(kept.replace(old, new, 1))
        said = lock.stale(locked_file)
        (tmp_path / name).write_text(kept)
        return said

    # Words for people do not count.
    assert after("requirements.in", "torch==2.13.0\n", "\n# why\n  torch==2.13.0  # because\n") is None
    assert after("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"') is None
    said = after("requirements.in", "torch==2.13.0", "torch==2.12.0")
    assert re.fullmatch(rf"{locked_file.name} was made from other inputs \(.*\): run `make lock`", said)
    assert after("requirements-dev.in", "pytest\n", "") is not None
    assert after("requirements-dev.in", "pytest\n", "pytest<9\n") is not None
    assert after("pyproject.toml", 'requires-python = ">=3.11"', 'requires-python = ">=3.12"') is not None
    assert "(SHA-256 none)" in after(locked_file.name, "# Inputs:", "# Of:")
    # From one file to the other: the same words, but another image.
    (tmp_path / "requirements-dev.in").write_text((tmp_path / "requirements-dev.in").read_text() + "rich\n")
    assert after("requirements.in", "rich\n", "") is not None


def test_the_gpu_lock_names_the_driver_that_its_cuda_needs():
    (line,) = re.findall(r"^# NVIDIA driver:.*\n", (ROOT / "requirements-gpu.lock").read_text(), re.MULTILINE)
    assert line == lock.driver_line(locked_entries("gpu"))
    found = {name: version for (name, _), version in versions("gpu").items()}
    cuda, nccl = found["nvidia-cuda-runtime"].split("."), found["nvidia-nccl-cu13"]
    branch = {"12": 525, "13": 580}[cuda[0]]
    assert line == f"# NVIDIA driver: branch {branch} or newer (CUDA {cuda[0]}.{cuda[1]}, NCCL {nccl})\n"
    assert "NVIDIA driver" not in (ROOT / "requirements-cpu.lock").read_text()


@pytest.mark.parametrize(
    ("cuda", "nccl", "expected"),
    [
        ("cuda-toolkit==12.8.1", "nvidia-nccl-cu12==2.27.5", "525 or newer (CUDA 12.8, NCCL 2.27.5)"),
        ("nvidia-cuda-runtime==13.0.96", "nvidia-nccl-cu13==2.29.7", "580 or newer (CUDA 13.0, NCCL 2.29.7)"),
        ("cuda-toolkit==12.8.1", "nvidia-nccl-cu13==2.29.7", "580 or newer (CUDA 12.8, NCCL 2.29.7)"),
        ("cuda-toolkit==14.1.0", "nvidia-nccl-cu14==3.0.0", None),
        ("cuda-toolkit==13.0.3", "nvidia-nccl-cu14==3.0.0", None),
        ("numpy==2.4.6", "nvidia-nccl-cu13==2.29.7", None),
        ("cuda-toolkit==13.0.3", "numpy==2.4.6", None),
    ],
)
def test_a_cuda_whose_driver_is_not_known_ends_the_locking(capsys, cuda, nccl, expected):
    if expected:
        assert lock.driver_line([f"{cuda} \\\n", f"{nccl} \\\n"]) == f"# NVIDIA driver: branch {expected}\n"
        return
    with pytest.raises(SystemExit) as ended:
        lock.driver_line([f"{cuda} \\\n", f"{nccl} \\\n"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "add it to DRIVER_BRANCHES in scripts/lock.py" in said


def test_locking_writes_both_locks_or_neither(clone):
    """With a uv that resolves to what the GPU lock holds already."""
    for name in (*lock.INPUTS, "pyproject.toml", lock.CPU_TORCH):
        shutil.copy(ROOT / name, clone)
    (clone / "uv.py").touch()

    def lock_now():
        command = [sys.executable, str(clone / "scripts/lock.py")]
        env = environment(PYTHONPATH=str(clone))
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done, {name: (clone / name).read_text() for name in setup.LOCKS.values()}

    original = {name: (ROOT / name).read_text() for name in setup.LOCKS.values()}
    (clone / "requirements-cpu.lock").write_text("")
    done, made = lock_now()
    assert done.returncode == 0 and made == original

    shutil.copy(clone / lock.CPU_TORCH, clone / "kept")
    (clone / lock.CPU_TORCH).write_text("# none\n")
    done, made = lock_now()
    assert done.returncode == 2 and made == original
    assert re.fullmatch(r"lock: requirements-torch-cpu\.sha256 has no hash of torch .*\n", done.stderr)

    shutil.copy(clone / "kept", clone / lock.CPU_TORCH)
    newer = original["requirements-gpu.lock"].replace("\ncuda-toolkit==13.", "\ncuda-toolkit==14.")
    (clone / "requirements-gpu.lock").write_text(newer)
    done, made = lock_now()
    assert done.returncode == 2 and made == original | {"requirements-gpu.lock": newer}
    assert re.fullmatch(r"lock: the driver branch for cuda-toolkit 14\..* is not on record.*\n", done.stderr)


def test_the_cpu_lock_takes_the_recorded_cpu_builds_of_torch():
    lines = (ROOT / "requirements-torch-cpu.sha256").read_text().splitlines()
    recorded = dict(line.split() for line in lines if not line.startswith("#"))
    (entry,) = setup.lock_entries("requirements-cpu.lock", ROOT)["torch"]
    assert set(re.findall(r"sha256:(\w+)", entry)) == set(recorded)
    for python in ("cp311", "cp312", "cp313", "cp314"):
        for machine in ("x86_64", "aarch64"):
            assert any(f"-{python}-{python}-" in file and machine in file for file in recorded.values())


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
