"""Both locks agree, hold what the inputs ask and nothing else, by hash, and say what they were made from."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.clones import ROOT, environment, lock, setup


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
