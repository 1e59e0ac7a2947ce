"""Checks of the software: each is fine on the locked stack, and fails once for each thing it is there for."""

import dataclasses
import os
from importlib import metadata
from pathlib import Path

import pytest

from recipe.plan import make_plan
from recipe.preflight import program, software, stack
from recipe.preflight.check import Context
from recipe.settings import from_dict
from tests.preflight.situation import GOOD, context, found_broken


def another_lock(folder, monkeypatch):
    """Real packages against a lock that names them, and then one that names another torch."""
    versions = {name: metadata.version(name).partition("+")[0] for name in software.STACK}
    for torch in (versions["torch"], "9.9.9"):
        lines = [f"{name}=={version}" for name, version in (versions | {"torch": torch}).items()]
        (folder / "requirements-gpu.lock").write_text("\n".join(lines))
        yield dataclasses.replace(context(), lock_folder=folder)


BROKEN = {
    "another torch": (software.versions, another_lock, "warn", "(lock: 9.9.9)", "make setup"),
    "torch broken": (
        software.torch_imports,
        {"stack": {"torch_error": "ImportError: libcudart.so.13"}},
        "fail",
        "libcudart",
        "make setup",
    ),
    "torch too old": (software.torch_imports, {"stack": {"torch": "2.10.1"}}, "fail", "2.10.1", "make setup"),
    "cpu build": (
        software.torch_sees_gpus,
        {"stack": {"cuda": None, "gpus": 0}},
        "fail",
        "0 GPUs, built for no CUDA",
        "CPU build of torch",
    ),
    "torch sees one": (software.torch_sees_gpus, {"stack": {"gpus": 1}}, "fail", "1 GPUs", "--gpus all"),
    "bitsandbytes": (
        software.nf4,
        {"stack": {"bitsandbytes_error": "RuntimeError: no kernel"}},
        "fail",
        "no kernel",
        "make setup",
    ),
    "wrong kernel": (software.nf4, {"stack": {"nf4_error": 1.4}}, "fail", "140.0%", "computes wrongly"),
    "other codes": (software.nf4, {"stack": {"nf4_codes_differ": 0.2}}, "fail", "20.0% of the codes", "computes wrongly"),
    "other values": (software.nf4, {"stack": {"nf4_values_differ": 0.5}}, "fail", "values by 5e-01", "computes wrongly"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy, tmp_path, monkeypatch):
    found_broken(check, broken, status, found, remedy, tmp_path, monkeypatch)


@pytest.mark.parametrize("check", software.CHECKS[1:], ids=lambda check: check.__name__)
def test_what_was_not_measured_is_skipped(check):
    result = check(context(stack={"skipped": "not measured with --quick"}))
    assert (result.status, result.found) == ("skip", "not measured with --quick")


@pytest.mark.parametrize(
    ("lock", "status", "found"),
    [
        ("torch=={torch} ; sys_platform == 'linux' \\\n    --hash=sha256:0\n", "ok", "as locked"),
        ("torch==9.9.9 \\\n    --hash=sha256:0\n", "warn", "(lock: 9.9.9)"),
        (None, "skip", "is not here"),
    ],
)
def test_versions_against_the_lock(tmp_path, monkeypatch, lock, status, found):
    monkeypatch.setattr(software.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    if lock:
        (tmp_path / "requirements-gpu.lock").write_text(lock.format(torch="2.13.0"))
    result = software.versions(dataclasses.replace(context(), lock_folder=tmp_path))
    assert result.status == status and found in result.found


def test_a_missing_package_fails(tmp_path, monkeypatch):
    (tmp_path / "requirements-gpu.lock").write_text("torch==2.13.0\n")
    monkeypatch.setattr(software, "_installed", lambda name: None if name == "trl" else "2.13.0")
    result = software.versions(dataclasses.replace(context(), lock_folder=tmp_path))
    assert result.status == "fail" and result.found == "missing: trl"


def test_the_repositorys_locks_are_read():
    for lock in Path(program.REPOSITORY).glob("requirements-*.lock"):
        assert set(software.STACK) <= set(software.locked_versions(lock))


def test_the_stack_really_works_here():
    """The one test with the real torch and bitsandbytes, in their own process."""
    settings = from_dict({"model": "demo"})
    real = Context(settings, dataclasses.replace(GOOD, gpus=[]), make_plan(settings, gpus=0))
    assert "torch" in real.stack and software.nf4(real).status == "ok"


def test_the_reference_is_another_where_the_codebook_is(monkeypatch):
    """What bitsandbytes computes is compared, not only repeated: against FP4's values everything differs."""
    monkeypatch.setattr(stack, "CODEBOOK", tuple(i / 8 - 1 for i in range(16)))
    found = stack.look("cpu")
    assert found["nf4_codes_differ"] > 0.1 and found["nf4_values_differ"] > 0.05


@pytest.mark.parametrize(
    ("package", "body", "key", "part"),
    [
        ("torch", "raise OSError('libcudart.so.13: cannot open')", "torch_error", "OSError: libcudart"),
        ("torch", "import os; os.abort()", "torch_error", "ended with -6"),
    ],
)
def test_a_broken_library_does_not_break_preflight(tmp_path, monkeypatch, package, body, key, part):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    broken = context()
    del broken.__dict__["stack"]
    assert part in broken.stack[key]
    assert software.torch_imports(broken).status == "fail"
    assert software.nf4(broken).status == software.torch_sees_gpus(broken).status == "skip"
