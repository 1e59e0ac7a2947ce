"""The host's probe: on this machine as it is, on trees and programs that stand in for others, and in the container's hands."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run
import yaml

from recipe import pci, probe

ROOT = Path(__file__).parents[2]


def programs(folder: Path, monkeypatch, **scripts: str) -> None:
    """Programs of these names, and no others but the shell's own."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def part(name: str, root: Path = Path("/")) -> dict:
    return probe.gather(root)["parts"][name]


def test_this_machine_as_a_host_runs_it():
    started = time.monotonic()
    # As on a host without our packages: no site-packages.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "recipe.probe"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and time.monotonic() - started < 6, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["cores"] >= 1 and abs(found["time"] - time.time()) < 60
    for name, answer in found["parts"].items():
        assert (answer["found"] is None) != (answer["why"] is None), name
    assert found["parts"]["limits"]["found"] and found["parts"]["user"]["found"]["uid"] == os.getuid()


def test_only_the_standard_library_is_imported():
    code = "import recipe.probe, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert not roots & {"yaml", "torch", "psutil", "pynvml", "numpy"}


KERNEL = """[    0.000000] Linux version 6.1.0
[   12.100000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.95.05
[  100.500000] NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[  101.000000] NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.
[  102.000000] pcieport 0000:00:01.0: AER: Corrected error received: 0000:01:00.0
[  103.000000] mce: [Hardware Error]: Machine check events logged
[  104.000000] Out of memory: Killed process 4242 (python) total-vm:1kB
[  105.000000] usb 1-1: new device
"""


def test_what_matters_of_the_kernel_log(tmp_path, monkeypatch):
    (tmp_path / "log").write_text(KERNEL)
    programs(tmp_path / "bin", monkeypatch, dmesg=f"cat {tmp_path}/log")
    found = part("kernel_log")["found"]
    assert [(line["kind"], line["seconds"]) for line in found] == [
        ("xid", 100.5), ("nvrm", 101.0), ("aer", 102.0), ("mce", 103.0), ("oom", 104.0),
    ]  # fmt: skip
    assert found[0]["text"].startswith("NVRM: Xid (PCI:0000:01:00): 79")


def test_a_kernel_log_that_may_not_be_read_comes_from_the_journal_or_says_why(tmp_path, monkeypatch):
    refuses = "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1"
    programs(tmp_path / "bin", monkeypatch, dmesg=refuses, journalctl=f"cat {tmp_path}/log")
    (tmp_path / "log").write_text(KERNEL)
    assert len(part("kernel_log")["found"]) == 5
    programs(tmp_path / "bin", monkeypatch, journalctl="exit 1")
    answer = part("kernel_log")
    assert (
        answer["found"] is None
        and "Operation not permitted" in answer["why"]
        and "dmesg_restrict" in answer["why"]
    )


def test_programs_that_hang_are_left_behind(tmp_path, monkeypatch):
    hang = "exec sleep 60"
    programs(
        tmp_path / "bin",
        monkeypatch,
        nvidia_smi=hang,
        systemctl=hang,
        docker=hang,
        dmesg=hang,
        timedatectl=hang,
    )
    started = time.monotonic()
    found = probe.gather()
    assert time.monotonic() - started < probe.SECONDS
    for name in ("gpu_processes", "units", "clock"):
        assert "no answer within" in found["parts"][name]["why"], name
    assert found["parts"]["swap"]["found"] is not None, "the others answer"


def test_services_docker_clock_and_processes(tmp_path, monkeypatch):
    show = "Id=nvidia-persistenced.service\nLoadState=loaded\nActiveState=active\n\nId=earlyoom.service\nLoadState=not-found\nActiveState=inactive"
    programs(
        tmp_path / "bin", monkeypatch,
        systemctl=f'case "$1" in show) printf "{show}\\n" ;; *) echo "foo.service loaded failed failed Foo" ;; esac',
        docker="echo 26.1.5", nvidia_ctk="echo 'NVIDIA Container Toolkit CLI version 1.17.8'", timedatectl="echo no",
        nvidia_smi=f'case "$*" in *compute-apps*) echo "{os.getpid()}, GPU-a, 2048"; echo "9999999, GPU-b, [N/A]" ;; esac',
    )  # fmt: skip
    parts = {name: answer["found"] for name, answer in probe.gather()["parts"].items()}
    assert parts["units"] == {"states": {"nvidia-persistenced": "active"}, "failed": ["foo.service"]}
    assert (
        parts["docker"] == {"engine": "26.1.5", "why": None, "toolkit": "1.17.8"} and parts["clock"] is False
    )
    mine, other = parts["gpu_processes"]
    assert mine["name"] in ("python", "python3", "pytest", Path("/proc/self/comm").read_text().strip())
    assert (mine["gib"], mine["gpu"], other["name"], other["gib"]) == (2.0, "GPU-a", "unknown", None)


def test_swap_limits_and_iommu_of_another_root(tmp_path):
    files = {
        "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 8388608 0 100\n/swapfile file 4194304 0 -2\n",
        "proc/sys/vm/overcommit_memory": "2\n",
        "sys/kernel/iommu_groups/0/type": "identity\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    parts = {name: answer["found"] for name, answer in probe.gather(tmp_path)["parts"].items()}
    assert [(device["kind"], device["gib"]) for device in parts["swap"]] == [("zram", 8.0), ("file", 4.0)]
    assert parts["limits"]["overcommit"] == 2 and parts["iommu"] == "passthrough"
    (tmp_path / "sys/kernel/iommu_groups/1").mkdir()
    (tmp_path / "sys/kernel/iommu_groups/1/type").write_text("DMA-FQ\n")
    assert probe.iommu(tmp_path) == "translated"
    assert part("iommu", tmp_path / "nowhere")["why"] == "sysfs shows no iommu_groups"


def test_a_token_is_seen_and_not_read(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert part("hub_token")["found"] is False
    (tmp_path / "token").write_text("hf_secret")
    found = probe.gather()
    assert found["parts"]["hub_token"]["found"] is True and "secret" not in json.dumps(found)


# --- the PCI tree -----------------------------------------------------------------------------------------


def config(control: int | None, length: int = 4096) -> bytes:
    """A bridge's config space: an AER capability, then ACS with this control word, or none."""
    space = bytearray(length)
    if length > 0x100:
        following = 0x140 if control is not None else 0
        space[0x100:0x104] = (0x0001 | 1 << 16 | following << 20).to_bytes(4, "little")
        if control is not None:
            space[0x140:0x144] = (0x000D | 1 << 16).to_bytes(4, "little")
            space[0x146:0x148] = control.to_bytes(2, "little")
    return bytes(space)


@pytest.mark.parametrize(
    ("space", "redirects"),
    [
        (config(0b11101), True),
        (config(0b00001), False),
        (config(None), False),
        (config(0b11101, 64), None),
        (b"", None),
        (b"\xff" * 4096, False),
    ],
)
def test_whether_a_bridge_redirects(space, redirects):
    assert pci.redirects_peers(space) is redirects


def test_the_way_of_a_gpu(tmp_path):
    place = tmp_path / "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
    place.mkdir(parents=True)
    files = {
        "vendor": "0x10de", "class": "0x030000", "numa_node": "1", "current_link_speed": "2.5 GT/s PCIe",
        "max_link_speed": "16.0 GT/s PCIe", "current_link_width": "8", "max_link_width": "16",
        "resource": "0x00000000a0000000 0x00000000a0ffffff 0x0\n0x0000006000000000 0x000000600fffffff 0x14220c\n",
    }  # fmt: skip
    for name, text in files.items():
        (place / name).write_text(text)
    (place.parent / "config").write_bytes(config(0b1100))
    group = tmp_path / "sys/kernel/iommu_groups/15/devices"
    for name in ("0000:01:00.0", "0000:01:00.1", "0000:02:00.0"):
        (group / name).mkdir(parents=True)
    (place / "iommu_group").symlink_to(group.parent)
    devices = tmp_path / "sys/bus/pci/devices"
    devices.mkdir(parents=True)
    (devices / "0000:01:00.0").symlink_to(place)
    (path,) = pci.gpu_paths(tmp_path)
    assert path.link == pci.Link("0000:01:00.0", 1, 4, 8, 16)
    assert [bridge.address for bridge in path.bridges] == ["0000:00:01.0"] and path.acs_redirect is True
    assert (path.numa_node, path.iommu_group, path.iommu_companions) == (1, 15, ["0000:02:00.0"])
    assert path.bar1_gib == 0.25
    (place / "numa_node").write_text("-1")
    (place / "resource").unlink()
    (path,) = pci.gpu_paths(tmp_path)
    assert path.numa_node is None and path.bar1_gib is None


# --- handed into the container ----------------------------------------------------------------------------


def test_the_host_hands_its_probe_in(tmp_path):
    given = run.host_probe(tmp_path, os.getuid(), os.getgid())
    assert given == {"RECIPE_HOST_PROBE": "/cache/host-probe.json"}
    file = tmp_path / "host-probe.json"
    assert file.stat().st_mode & 0o777 == 0o600, "a kernel log may be in it"
    assert json.loads(file.read_text())["parts"]
    before = file.stat().st_ino
    run.host_probe(tmp_path, os.getuid(), os.getgid())
    assert file.stat().st_ino != before or json.loads(file.read_text())["parts"]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    ours = {name: service for name, service in compose["services"].items() if name != "vllm"}
    assert len(ours) == len(compose["services"]) - 1 == 10
    for name, service in ours.items():
        assert "RECIPE_HOST_PROBE" in service["environment"], name
        assert any(volume["target"] == "/cache" for volume in service["volumes"]), name


def test_a_probe_that_fails_is_said_and_stops_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "__init__.py").touch()
    (tmp_path / "recipe" / "probe.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.host_probe(tmp_path, os.getuid(), os.getgid()) == {}
    assert "the host could not be probed" in capsys.readouterr().err
