"""host.env: written for what the driver says, never emptied by a process that sees less than the host has, read strictly."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import hostenv, showcase
from recipe.cli import main
from recipe.errors import UserError
from recipe.hardware import NVIDIA, DisplayDevice, probe
from recipe.train.launch import _environment

ROOT = Path(__file__).parent.parent.parent
P2P, IB = "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"


@pytest.fixture
def box(tmp_path, monkeypatch):
    """box(2, "CNS") makes this machine one of two 3090s whose driver says so of each peer; the working directory is empty."""

    def make(count: int, word: str = "OK", topology: str | None = None) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        cards = "".join(
            f"{i}, GPU-{i}, NVIDIA GeForce RTX 3090, 24576, 24100, 8.6, 580.95.05\n" for i in range(count)
        )
        names = "".join(f"GPU{i}\t" for i in range(count))
        rows = "".join(
            f" GPU{i}\t" + "".join(("X" if i == j else word) + "\t" for j in range(count)) + "\n"
            for i in range(count)
        )
        matrix = f" \t\x1b[4m{names}\x1b[0m\n{rows}\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in\n"topo -p2p r") cat <<END\n{matrix if topology is None else topology}\nEND\n;;\n'
            f"--query-gpu=*) cat <<END\n{cards}END\n;;\n*) exit 9 ;;\nesac\n"
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    return make


def found():
    return {setting.name: setting.value for setting in hostenv.find(probe())}


def machine(**changes):
    """This machine as `box` makes it, with nothing on the bus that is not said."""
    return dataclasses.replace(probe(), **({"display_devices": []} | changes))


@pytest.mark.parametrize("word", ["CNS", "GNS", "TNS", "NS", "DR", "U"])
def test_peers_that_cannot_read_each_other_do_without_p2p(box, word):
    box(2, word)
    assert found() == {P2P: "1", IB: "1"}
    assert word in hostenv.find(probe())[0].reason


def test_peers_that_can_keep_it(box):
    box(2, "OK")
    assert found() == {IB: "1"}


def test_what_the_driver_does_not_tell_is_left_to_nccl(box):
    box(2, topology="Not supported on this platform")
    assert found() == {IB: "1"}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_gpus_need_nothing(box, count):
    box(count)
    assert found() == {}
    assert hostenv.write(".", machine()) == "host.env: no NCCL settings"
    assert all(line.startswith("#") for line in Path("host.env").read_text().splitlines())
    assert "Fewer than two GPUs" in Path("host.env").read_text() and hostenv.read() == {}


def test_only_the_visible_gpus_count(box, monkeypatch):
    # GPU 2 drives the screen: a small card that nobody can read.
    rows = "\tGPU0\tGPU1\tGPU2\n GPU0\tX\tOK\tGNS\n GPU1\tOK\tX\tGNS\n GPU2\tGNS\tGNS\tX"
    box(3, topology=rows)
    assert found() == {P2P: "1", IB: "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert found() == {IB: "1"}
    hostenv.write(".", machine())
    assert hostenv.read() == {IB: "1"}


def test_the_file_is_what_compose_reads_and_says_why(box):
    box(2, "GNS")
    assert hostenv.write(".", machine()) == "host.env: 2 NCCL settings"
    first, *lines = Path("host.env").read_text().splitlines()
    assert first.startswith("#") and "`recipe preflight` wrote it: do not edit it" in first
    assert [line.split("=")[0] if "=" in line else line[0] for line in lines] == ["#", P2P, "#", IB]
    assert hostenv.read("host.env") == {P2P: "1", IB: "1"}


def test_a_file_that_is_right_is_not_touched(box):
    box(2, "GNS")
    hostenv.write(".", machine())
    before = os.stat("host.env")
    assert hostenv.write(".", machine()) == "host.env: 2 NCCL settings"
    assert (os.stat("host.env").st_ino, os.stat("host.env").st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )
    box(2, "OK")
    assert hostenv.write(".", machine()) == "host.env: 1 NCCL setting"
    assert hostenv.read() == {IB: "1"}


BLIND = {
    "CUDA_VISIBLE_DEVICES hides all": ("", {}, "CUDA_VISIBLE_DEVICES is set"),
    "CUDA_VISIBLE_DEVICES leaves one": ("1", {}, "CUDA_VISIBLE_DEVICES is set"),
    "nvidia-smi fails": (None, {"gpus": [], "gpu_error": "nvidia-smi ended with 18"}, "ended with 18"),
    "a container without GPUs": (
        None,
        {"gpus": [], "display_devices": [DisplayDevice(f"0000:0{i}:00.0", NVIDIA, "nvidia") for i in (1, 2)]},
        "0 of 2 NVIDIA GPUs",
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_who_sees_less_than_the_host_has_leaves_the_file(box, monkeypatch, name):
    selection, changes, why = BLIND[name]
    box(2, "CNS")
    hostenv.write(".", machine())
    before = Path("host.env").read_bytes()
    if selection is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    said = hostenv.write(".", machine(**changes))
    assert "left as it was" in said and why in said and "\n" not in said
    assert Path("host.env").read_bytes() == before
    Path("host.env").unlink()
    assert hostenv.write(".", machine(**changes)) is None and not Path("host.env").exists()


def test_a_container_that_was_given_no_gpu_does_not_speak_for_its_host(box, monkeypatch):
    """Nor does it where the bus cannot be seen, as in WSL2: a play's last task undid so what the play had found."""
    box(2, "CNS")
    hostenv.write(".", machine())
    before = Path("host.env").read_bytes()
    monkeypatch.setenv("RECIPE_IMAGE_DIGEST", "sha256:0")
    assert (
        hostenv.write(".", machine(gpus=[]))
        == "host.env: left as it was, since no GPU was given to this container"
    )
    assert Path("host.env").read_bytes() == before
    assert hostenv.write(".", machine()) == "host.env: 2 NCCL settings"


def test_preflight_writes_it_and_the_demos_preflight_leaves_it(box, monkeypatch, capsys):
    box(2, "CNS")
    config = ["--config", str(showcase.CONFIG), "--json", "--quick"]
    main(["preflight", *config])  # its verdict on GPUs that do not exist is no matter here
    out, err = capsys.readouterr()
    assert err.splitlines() == ["host.env: 2 NCCL settings"] and "host.env" not in out
    before = Path("host.env").read_bytes()
    for name, value in showcase.ON_THE_CPU.items():
        monkeypatch.setenv(name, value)
    main(["preflight", *config])
    assert "host.env: left as it was" in capsys.readouterr().err
    assert Path("host.env").read_bytes() == before
    assert hostenv.read() == {P2P: "1", IB: "1"}


def test_a_folder_that_cannot_be_written_gives_one_line(box):
    box(2, "CNS")
    said = hostenv.write("/proc", machine())  # where not even root may
    assert said.startswith("host.env: could not be written (") and "\n" not in said
    assert f"{P2P}=1 {IB}=1" in said and "`python3 -m recipe.hostenv` on the host" in said


def test_a_folder_that_cannot_be_written_is_no_matter_where_nothing_is_needed(box):
    box(1)
    assert hostenv.write("/proc", machine()) == "host.env: no NCCL settings"


def test_a_bare_host_writes_it_without_packages(box):
    box(2, "CNS")
    shutil.copytree(ROOT / "recipe", "recipe", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module('recipe.hostenv', run_name='__main__'); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "host.env: 2 NCCL settings\n")
    ours = {name for name in done.stdout.split() if name.startswith("recipe")}
    assert ours == {"recipe", "recipe.container", "recipe.errors", "recipe.files", "recipe.hardware"}
    assert hostenv.read() == {P2P: "1", IB: "1"}


def test_the_launcher_reads_it_and_variables_that_are_set_win(box, monkeypatch):
    for name in (P2P, IB):
        monkeypatch.delenv(name, raising=False)
    assert P2P not in _environment(2), "without a file nothing is set"
    Path("host.env").write_text(f"# why\n{P2P}=1\n\n{IB}=1\n")
    environment = _environment(2)
    assert (environment[P2P], environment[IB]) == ("1", "1")
    monkeypatch.setenv(P2P, "0")
    environment = _environment(2)
    assert (environment[P2P], environment[IB]) == ("0", "1")


def test_values_that_nccl_knows_are_read(tmp_path):
    file = tmp_path / "host.env"
    file.write_text("NCCL_SOCKET_IFNAME=^docker0,lo\nNCCL_DEBUG_FILE=/tmp/nccl.%h.%p\nGLOO_SOCKET_IFNAME=eth0\nCUDA_DEVICE_ORDER=PCI_BUS_ID\n")  # fmt: skip
    assert list(hostenv.read(file).values()) == ["^docker0,lo", "/tmp/nccl.%h.%p", "eth0", "PCI_BUS_ID"]


@pytest.mark.parametrize(
    "line",
    [
        "NCCL_P2P_DISABLE",
        "NCCL_P2P_DISABLE=",
        "NCCL_P2P_DISABLE = 1",
        " NCCL_P2P_DISABLE=1",
        "export NCCL_P2P_DISABLE=1",
        "NCCL_P2P_DISABLE='1'",  # compose would take the quotes off
        "NCCL_P2P_DISABLE=$HOME",  # and put in the folder
        "NCCL_P2P_DISABLE=1 # why",
        "LD_PRELOAD=/tmp/evil.so",
        "PATH=/tmp",
        "XNCCL_DEBUG=INFO",
        "nccl_debug=INFO",
        "<<<<<<< HEAD",
    ],
)
def test_any_other_line_is_refused_with_its_place(tmp_path, line):
    file = tmp_path / "host.env"
    file.write_text(f"# fine\nNCCL_IB_DISABLE=1\n{line}\n")
    with pytest.raises(UserError) as refused:
        hostenv.read(file)
    said = str(refused.value)
    assert said.startswith(f"{file}:3: found `{line}`, expected ") and "make preflight" in said
    assert "\n" not in said


@pytest.mark.parametrize(("content", "part"), [(None, "is a folder"), (b"NCCL_DEBUG=\xff\n", "not UTF-8")])
def test_what_is_no_text_file_is_refused(tmp_path, content, part):
    """Docker makes a folder of a file that is mounted and not there."""
    file = tmp_path / "host.env"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=part) as refused:
        hostenv.read(file)
    assert "make preflight" in str(refused.value)


def test_training_refuses_a_broken_file_before_it_fetches_or_makes_anything(tmp_path, monkeypatch, capsys):
    from recipe.cli import main

    monkeypatch.chdir(tmp_path)
    Path("host.env").write_text("NCCL_P2P_DISABLE\n")
    config = Path(showcase.__file__).parent / "configs/smollm2-135m.yaml"
    assert main(["train", "--config", str(config), "--run", "never"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: host.env:1: ")
    assert [path.name for path in tmp_path.iterdir()] == ["host.env"]
