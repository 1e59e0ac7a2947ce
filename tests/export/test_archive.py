"""An archive that the tools everybody has unpack and check, the same bytes each time, or nothing at all."""

import os
import resource
import shutil
import subprocess
import tarfile
from types import SimpleNamespace

import pytest

from recipe.errors import UserError
from recipe.export.archive import archive, render
from tests.export.finished import finished_run, tree
from tests.train.tiny_run import flip_a_byte


@pytest.fixture
def folder(tmp_path):
    """A copy of the export, in a run's folder of its own."""
    return shutil.copytree(finished_run() / "adapters", tmp_path / "runs" / "poet" / "adapters")


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_tar_and_sha256sum_find_it_whole(folder, tmp_path):
    (folder / "notes.txt").write_text("not of the export")
    target = tmp_path / "poet.tar"
    result = archive(folder, target)
    checked = run("sha256sum", "-c", "poet.tar.sha256", cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "poet.tar: OK\n")
    place = tmp_path / "elsewhere"
    place.mkdir()
    unpacked = run("tar", "-xf", str(target), cwd=place)
    assert (unpacked.returncode, unpacked.stderr) == (0, "")
    assert [path.name for path in place.iterdir()] == ["poet-adapters"]
    inside = place / "poet-adapters"
    checked = run("sha256sum", "-c", "SHA256SUMS", cwd=inside)
    assert checked.returncode == 0 and checked.stderr == ""
    expected = tree(folder)
    del expected["notes.txt"]
    found = tree(inside)
    assert len(found.pop("SHA256SUMS").splitlines()) == len(expected) == result["files"] - 1
    assert found == expected
    (inside / "README.md").write_text("other")
    assert run("sha256sum", "-c", "SHA256SUMS", cwd=inside).returncode == 1
    assert result["bytes"] == target.stat().st_size
    assert "unpacks to poet-adapters/" in render(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere",
        "poet.tar",
        "poet.tar.sha256",
        "runs",
    ]


def test_the_same_bytes_whenever_it_is_made(folder, tmp_path):
    archive(folder, tmp_path / "one.tar")
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        path.chmod(0o600 if number % 2 else 0o640)
        os.utime(path, (number, number))
    archive(folder, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, "", "", 0o644)}


def test_an_export_of_a_kind_is_named_by_run_and_kind(folder, tmp_path):
    kind = tmp_path / "runs" / "poet" / "exports" / "gguf-q8_0"
    kind.parent.mkdir()
    folder.rename(kind)
    assert archive(kind, tmp_path / "a.tar")["unpacks_to"] == "poet-gguf-q8_0"


def damaged(folder, target):
    flip_a_byte(folder / "adapter_model.safetensors")


def gone(folder, target):
    (folder / "README.md").unlink()


def no_proof(folder, target):
    (folder / "export.json").unlink()


def outside(folder, target):
    proof = folder / "export.json"
    proof.write_text(proof.read_text().replace('"README.md"', '"../README.md"'))


def linked(folder, target):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(folder / "export.json")


def there(folder, target):
    target.write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (damaged, "a.tar", "adapter_model.safetensors: is not as it was verified"),
        (gone, "a.tar", "README.md: is missing"),
        (no_proof, "a.tar", "export.json: no such file"),
        (outside, "a.tar", "lists `../README.md`"),
        (linked, "a.tar", "README.md: is missing or no plain file"),
        (there, "a.tar", "a.tar: exists already"),
        (None, "a.tar.gz", "expected a name that ends in .tar"),
        (None, "none/a.tar", "no such folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_refusal_is_one_line_and_leaves_nothing(spoil, name, said, folder, tmp_path):
    target = tmp_path / name
    if spoil:
        spoil(folder, target)
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        archive(folder, target)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_no_space_is_said_before(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(
        UserError, match=r"0.0 GiB free, expected 0.0 GiB for the archive; .* file on another disk"
    ):
        archive(folder, tmp_path / "a.tar")


def test_a_write_that_fails_in_the_middle_leaves_nothing(folder, tmp_path):
    """A limit on a file's size stops it as a full disk does."""
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"a\.tar: cannot be written \(File too large\); nothing was left there"
        ):
            archive(folder, tmp_path / "a.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == before
