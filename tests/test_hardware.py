"""What the machine has, read from trees and programs that stand in for other machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import hardware
from recipe.hardware import GIB


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of this name first on PATH that runs the given shell lines."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


TWO_3090 = """cat <<END
0, GPU-aaa, NVIDIA GeForce RTX 3090, 24576, 24100, 8.6, 580.95.05
1, GPU-bbb, NVIDIA GeForce RTX 3090, 24576, 23000, 8.6, 580.95.05
END"""


def test_this_machine_runs_as_a_script_without_our_package():
    done = subprocess.run(
        [sys.executable, "-I", hardware.__file__], capture_output=True, text=True, check=True, cwd="/"
    )
    machine = json.loads(done.stdout)
    assert machine["cores"] >= 1 and machine["ram_total_gib"] > 0.5 and machine["disk_free_gib"] > 0


def test_only_the_standard_library_is_imported():
    code = f"import runpy, sys; runpy.run_path({hardware.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert not roots & {"recipe", "yaml", "torch", "psutil", "pynvml"}


def test_cgroup_v2_takes_the_tightest_limit_above(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "sys/fs/cgroup/user.slice/job/memory.max": "max\n",
        },
    )
    # 3 GiB are used, 1 of them only by the page cache.
    assert hardware.cgroup_memory(tmp_path) == (8 * GIB, 6 * GIB)


def test_cgroup_v1_limit_is_read_from_the_mount_where_the_hosts_path_is_not_visible(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert hardware.cgroup_memory(tmp_path) == (4 * GIB, 3 * GIB)
    assert hardware.usable_cores(tmp_path) == 1


def test_cgroup_v1_without_a_limit(tmp_path):
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert hardware.cgroup_memory(tmp_path) == (None, None)
    assert hardware.usable_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1)])
def test_cgroup_v2_cpu_quota(tmp_path, quota, cores):
    tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota}\n"})
    assert hardware.usable_cores(tmp_path) == cores


def test_probe_of_a_container_counts_its_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = hardware.probe(
        tmp_path / "not" / "yet",
        tree(
            tmp_path,
            {
                "proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nSwapTotal: 1048576 kB\n"
                "SwapFree: 524288 kB\n",
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{8 * GIB}",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}",
                "etc/os-release": 'NAME=x\nPRETTY_NAME="Debian 12"\n',
                "proc/cpuinfo": "processor: 0\nmodel name\t: Some CPU\n",
            },
        ),
    )
    assert (machine.ram_total_gib, machine.ram_limit_gib, machine.usable_ram_gib) == (32, 8, 8)
    assert machine.ram_available_gib == 6
    assert (machine.swap_total_gib, machine.swap_free_gib) == (1, 0.5)
    assert (machine.distribution, machine.cpu_model, machine.shm_total_gib) == ("Debian 12", "Some CPU", None)
    assert machine.gpus == [] and machine.gpu_error is None and machine.disk_free_gib > 0
    json.dumps(machine.to_dict())


def test_nvidia_smi_is_read(nvidia_smi):
    nvidia_smi(TWO_3090)
    gpus, error = hardware.nvidia_gpus()
    assert error is None
    assert [(gpu.index, gpu.memory_total_gib, gpu.compute_capability) for gpu in gpus] == [
        (0, 24.0, (8, 6)),
        (1, 24.0, (8, 6)),
    ]
    assert gpus[0].name == "NVIDIA GeForce RTX 3090" and gpus[1].driver_version == "580.95.05"


@pytest.mark.parametrize(
    ("selection", "indices"), [("1", [1]), ("GPU-b", [1]), ("1,0", [1, 0]), ("", []), ("0,7,1", [0])]
)
def test_cuda_visible_devices_counts(nvidia_smi, monkeypatch, selection, indices):
    nvidia_smi(TWO_3090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selection)
    assert [gpu.index for gpu in hardware.nvidia_gpus()[0]] == indices


def test_what_a_gpu_does_not_tell_is_none_and_a_lost_one_is_left_out(nvidia_smi):
    nvidia_smi(
        "echo '0, GPU-a, Old, 8192, [N/A], [N/A], 390.1'; echo '1, GPU-b, Lost, [N/A], [N/A], 8.6, 580'"
    )
    (gpu,), _ = hardware.nvidia_gpus()
    assert gpu.compute_capability is None and gpu.memory_free_gib == 0.0


def test_a_failing_nvidia_smi_is_quoted(nvidia_smi):
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert hardware.nvidia_gpus() == (
        [],
        "nvidia-smi ended with 18: Failed to initialize NVML: Driver/library version mismatch",
    )


def test_a_hanging_nvidia_smi_is_given_up(nvidia_smi, monkeypatch):
    nvidia_smi("exec sleep 30")
    monkeypatch.setattr(hardware, "NVIDIA_SMI_SECONDS", 0.2)
    assert "no answer within" in hardware.nvidia_gpus()[1]


def test_devices_without_driver_are_found_on_the_bus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    root = tree(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
            "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # its sound device
            "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
            "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
            "sys/bus/pci/devices/0000:02:00.0/class": "0x038000\n",
            "sys/bus/pci/drivers/amdgpu/bind": "",
        },
    )
    (root / "sys/bus/pci/devices/0000:02:00.0/driver").symlink_to(root / "sys/bus/pci/drivers/amdgpu")
    machine = hardware.probe(tmp_path, root)
    assert [device.address for device in machine.nvidia_without_driver] == ["0000:01:00.0"]
    assert machine.amd_gpu and machine.display_devices[1].driver == "amdgpu"


@pytest.mark.parametrize(
    ("system", "arch", "part"),
    [
        ("Windows", "AMD64", "install WSL2"),
        ("Darwin", "arm64", "macOS"),
        ("FreeBSD", "amd64", "expected Linux"),
        ("Linux", "riscv64", "unsupported processor: riscv64"),
    ],
)
def test_unsupported_platforms_are_refused_in_one_line(system, arch, part):
    line = hardware.refuse_unsupported(system, arch)
    assert part in line and "\n" not in line and "expected" in line


def test_linux_is_supported():
    assert hardware.refuse_unsupported("Linux", "x86_64") is None
    assert hardware.refuse_unsupported("Linux", "aarch64") is None


# As a driver of 2025 prints it for two GeForce cards: underlined header, tabs, legend.
PEERS = """cat <<'END'
 \t\x1b[4mGPU0\tGPU1\t\x1b[0m
 GPU0\tX\tCNS\t
 GPU1\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
  TNS  = Topology not supported
  NS   = Not supported
  DR   = Disabled by regkey
  U    = Unknown
END"""


def test_peer_access_is_read_in_both_directions(nvidia_smi, monkeypatch):
    nvidia_smi(f'[ "$*" = "topo -p2p r" ] || exit 9\n{PEERS}')
    assert hardware.peer_access() == {(0, 1): "CNS", (1, 0): "OK"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(hardware.peer_access()) == 2, "nvidia-smi knows nothing of CUDA's variable, and so should this"


def test_peer_access_of_three_gpus_with_gaps_in_their_numbers(nvidia_smi):
    nvidia_smi(
        "printf ' \\tGPU0\\tGPU2\\tGPU10\\t\\n GPU0\\tX\\tOK\\tOK\\n GPU2\\tOK\\tX\\tNS\\n GPU10\\tOK\\tNS\\tX\\n'"
    )
    said = hardware.peer_access()
    assert len(said) == 6
    assert {pair for pair, word in said.items() if word != "OK"} == {(2, 10), (10, 2)}


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "echo 'Topology is not supported on this system'",
        "printf ' \\tGPU0\\t\\n GPU0\\tX\\t\\n'",
        "printf 'GPU0 GPU1\\nGPU0 X\\nGPU1\\n'",  # cut short
        "exec sleep 30",
    ],
)
def test_peer_access_that_cannot_be_told_is_none(nvidia_smi, monkeypatch, script):
    nvidia_smi(script)
    monkeypatch.setattr(hardware, "NVIDIA_SMI_SECONDS", 0.5)
    assert hardware.peer_access() is None


def test_peer_access_without_a_driver_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.peer_access() is None
