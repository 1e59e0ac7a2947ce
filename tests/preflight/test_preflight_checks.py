"""Every check is seen passing on a machine that is right, and failing once for each thing it is there for."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from recipe import preflight
from recipe.hardware import AMD, NVIDIA, DisplayDevice, Gpu, Machine
from recipe.plan import make_plan
from recipe.preflight import gpu, host, inputs, link, software
from recipe.preflight.check import Check, Context
from recipe.settings import from_dict

CARD = Gpu(0, "NVIDIA GeForce RTX 3090", 24.0, 23.7, (8, 6), "580.95.05", "GPU-a")
GOOD = Machine(
    system="Linux", kernel="6.1.0", arch="x86_64", distribution="Debian 12", wsl2=False, python="3.11.7",
    cpu_model="CPU", cores=16, ram_total_gib=64.0, ram_limit_gib=None, ram_available_gib=60.0,
    swap_total_gib=8.0, swap_free_gib=8.0, shm_total_gib=8.0, disk_folder="/", disk_free_gib=900.0,
    gpus=[CARD, dataclasses.replace(CARD, index=1)],
)  # fmt: skip
NO_GPU = {"gpus": []}
STACK = {"torch": "2.13.0", "cuda": "13.0", "gpus": 2, "nf4_error": 0.09}


def context(machine=None, model="meta-llama/Llama-3.1-8B", stack=None, prepared=None, **sections) -> Context:
    """The judged situation: a good GPU machine, but for what is given."""
    found = dataclasses.replace(GOOD, **(machine or {}))
    settings = from_dict({"model": model, **sections})
    made = Context(settings, found, make_plan(settings, found), prepared)
    made.__dict__["stack"] = STACK | (stack or {})  # instead of a process that imports torch
    return made


# check, what is broken, the status it must give, parts of what it found and of its remedy
BROKEN = {
    "platform": (host.platform, {"machine": {"system": "Darwin"}}, "fail", "x86_64", "Linux machine"),
    "old python": (host.python, {"machine": {"python": "3.10.2"}}, "fail", "3.10.2", "make setup"),
    "new python": (host.python, {"machine": {"python": "3.15.0"}}, "fail", "3.15.0", "make setup"),
    "cores": (host.cores, {"machine": {"cores": 1}}, "warn", "1 (CPU)", "compute.processes"),
    "ram": (host.ram, {"machine": {"ram_total_gib": 4.0}}, "fail", "of 4.0", "add RAM"),
    "container limit": (
        host.ram,
        {"machine": {"ram_limit_gib": 3.0}},
        "fail",
        "container limit",
        "container's memory",
    ),
    "ram taken": (
        host.ram,
        {"machine": {"ram_available_gib": 3.0}},
        "warn",
        "3.0 GiB available",
        "close other",
    ),
    "no swap": (
        host.swap,
        {"machine": {"swap_total_gib": 0.0, "swap_free_gib": 0.0, "ram_available_gib": 5.5}},
        "warn",
        "0.0 GiB",
        "add swap",
    ),
    "swapping": (host.swap, {"machine": {"swap_free_gib": 1.0}}, "warn", "7.0 used", "RAM is short already"),
    "shm": (host.shm, {"machine": {"shm_total_gib": 0.0625}}, "fail", "0.06 GiB", "--shm-size"),
    "no shm": (host.shm, {"machine": {"shm_total_gib": None}}, "fail", "missing", "--shm-size"),
    "no gpu": (
        gpu.present,
        {"machine": NO_GPU, "model": "meta-llama/Llama-3.1-70B"},
        "fail",
        "no GPU",
        "make plan",
    ),
    "amd": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", AMD, "amdgpu")]},
            "model": "meta-llama/Llama-3.1-70B",
        },
        "fail",
        "AMD GPU found, only NVIDIA works",
        "NVIDIA",
    ),
    "no driver": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", NVIDIA, "nouveau")]},
            "model": "meta-llama/Llama-3.1-70B",
        },
        "fail",
        "0000:01:00.0 with driver nouveau",
        "make provision",
    ),
    "idle gpu beside the demo": (
        gpu.present,
        {
            "machine": NO_GPU | {"display_devices": [DisplayDevice("0000:01:00.0", NVIDIA, None)]},
            "model": "demo",
        },
        "warn",
        "no driver",
        "make provision",
    ),
    "nvidia-smi": (
        gpu.present,
        {"machine": NO_GPU | {"gpu_error": "nvidia-smi ended with 18"}, "model": "meta-llama/Llama-3.1-70B"},
        "fail",
        "ended with 18",
        "reboot",
    ),
    "too few gpus": (gpu.count, {"compute": {"processes": 4}}, "fail", "2", "CUDA_VISIBLE_DEVICES"),
    "small gpu": (
        gpu.memory_size,
        {"machine": {"gpus": [dataclasses.replace(CARD, memory_total_gib=3.0)]}},
        "fail",
        "3.0 GiB",
        "biggest: ",
    ),
    "gpu taken": (
        gpu.memory_free,
        {"machine": {"gpus": [CARD, dataclasses.replace(CARD, index=1, memory_free_gib=2.0)]}},
        "fail",
        "2.0 GiB free on GPU 1",
        "nvidia-smi",
    ),
    "old gpu": (
        gpu.capability,
        {
            "machine": {
                "gpus": [CARD, dataclasses.replace(CARD, name="Tesla V100", compute_capability=(7, 0))]
            }
        },
        "fail",
        "7.0",
        "Tesla V100 is too old",
    ),
    "no bf16": (
        gpu.bf16,
        {"machine": {"gpus": [dataclasses.replace(CARD, name="RTX 2080", compute_capability=(7, 5))]}},
        "warn",
        "RTX 2080 has none",
        "fp16 is taken",
    ),
    "no bf16 but asked": (
        gpu.bf16,
        {
            "machine": {"gpus": [dataclasses.replace(CARD, compute_capability=(7, 5))]},
            "compute": {"dtype": "bf16"},
        },
        "fail",
        "has none",
        "compute.dtype",
    ),
    "old driver": (
        gpu.driver,
        {"machine": {"gpus": [dataclasses.replace(CARD, driver_version="550.54")]}},
        "fail",
        "550.54",
        "580",
    ),
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
    "template": (
        inputs.chat_template,
        {"data": {"chat_template": "nowhere.jinja"}},
        "fail",
        "nowhere.jinja",
        "data.chat_template",
    ),
    "no data": (inputs.data, {"data": {"path": "nowhere.jsonl"}}, "fail", "no such file", "JSONL"),
}


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy):
    if not {"data", "compute"} & set(broken):  # those ask something that the good config does not
        assert check(context()).status in ("ok", "skip")
    result = check(context(**broken))
    assert result.status == status
    assert found in result.found and remedy in result.remedy
    assert result.expected


def test_a_good_machine_passes_everything():
    result = [check(context()) for check in [*host.CHECKS, *gpu.ALWAYS, *gpu.WITH_GPUS, *software.CHECKS[1:]]]
    wrong = [check for check in result if check.status not in ("ok", "skip") and check.name != "disk"]
    assert not wrong
    assert {check.name for check in result if check.status == "skip"} == set()


def test_no_gpu_is_fine_for_the_demo():
    result = gpu.present(context(NO_GPU, model="demo"))
    assert result.status == "ok" and "runs on the CPU" in result.found


def test_a_full_disk_is_found_for_each_disk(tmp_path, monkeypatch):
    paths = {"models": str(tmp_path / "models"), "runs": str(tmp_path / "runs")}
    monkeypatch.setattr(host, "disk_free_gib", lambda folder: 1.0)
    one = host.disk(context(paths=paths))
    assert one.status == "fail" and one.found.count("GiB free") == 1 and "paths.models" in one.remedy
    monkeypatch.setattr(host, "_device_of", lambda folder: hash(folder.name))
    assert host.disk(context(paths=paths)).found.count("GiB free") == 2
    monkeypatch.setattr(host, "disk_free_gib", lambda folder: 900.0)
    assert host.disk(context(paths=paths)).status == "ok"


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


HEAD = "# GPU flavour.\n# NVIDIA driver: branch {} or newer (CUDA {}, NCCL 2.29.7)\ntorch==2.13.0\n"


@pytest.mark.parametrize(
    ("lock", "driver", "cuda", "status", "part"),
    [
        (HEAD.format(580, "13.0"), "580.95.05", "13.0", "ok", "580.95.05"),
        (HEAD.format(580, "13.0"), "595.10", "13.2", "ok", "595.10"),
        (HEAD.format(580, "13.0"), "570.86", "13.0", "fail", "driver branch 580 or newer"),
        (HEAD.format(600, "13.0"), "580.95.05", "13.0", "fail", "driver branch 600 or newer"),
        (HEAD.format(580, "13.0"), "570.86", None, "fail", "driver branch 580 or newer"),  # torch's CPU build
        (HEAD.format(580, "13.0"), "unknown", "13.0", "fail", "driver branch 580 or newer"),
        (HEAD.format(580, "13.0"), "550.54", "12.8", "skip", "torch here is built for CUDA 12.8"),
        ("torch==2.13.0\n", "550.54", "13.0", "skip", "requirements-gpu.lock names no driver"),
        (None, "550.54", "13.0", "skip", "requirements-gpu.lock is not here"),
    ],
)
def test_the_driver_against_the_lock(tmp_path, lock, driver, cuda, status, part):
    if lock:
        (tmp_path / "requirements-gpu.lock").write_text(lock)
    machine = {"gpus": [dataclasses.replace(CARD, driver_version=driver)]}
    asked = dataclasses.replace(context(machine), lock_folder=tmp_path)
    asked.__dict__["stack"] = STACK | {"cuda": cuda}
    result = gpu.driver(asked)
    assert result.status == status
    assert part in f"{result.found} {result.remedy}"


def test_a_missing_package_fails(tmp_path, monkeypatch):
    (tmp_path / "requirements-gpu.lock").write_text("torch==2.13.0\n")
    monkeypatch.setattr(software, "_installed", lambda name: None if name == "trl" else "2.13.0")
    result = software.versions(dataclasses.replace(context(), lock_folder=tmp_path))
    assert result.status == "fail" and result.found == "missing: trl"


def test_the_repositorys_locks_are_read():
    for lock in Path(preflight.REPOSITORY).glob("requirements-*.lock"):
        assert set(software.STACK) <= set(software.locked_versions(lock))


@pytest.mark.parametrize(
    ("content", "status", "part"),
    [
        (b'{"text": "a"}\n', "ok", "JSON object"),
        (b'\n\n{"text": "a"}\nnot looked at', "ok", "JSON object"),
        (b"", "fail", "is empty"),
        (b"{text: a}\n", "fail", ":1: not valid JSON"),
        (b"[1]\n", "fail", "is no JSON object"),
        (b"\xff\xfe", "fail", "not UTF-8"),
    ],
)
def test_data_files(tmp_path, content, status, part):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    result = inputs.data(context(data={"path": str(path)}))
    assert result.status == status and part in result.found


def test_data_elsewhere():
    assert inputs.data(context()).status == "skip"
    assert inputs.data(context(data={"path": "demo"})).status == "ok"
    assert inputs.data(context(data={"path": "someone/rows"})).status == "skip"
    assert inputs.data(context(data={"path": "/"})).status == "fail"


def test_prepared_model(tmp_path):
    assert inputs.model(context(prepared=tmp_path / "x-nf4")).status == "skip"
    (tmp_path / "model.safetensors").touch()
    assert inputs.model(context(prepared=tmp_path)).status == "fail"
    made = context()
    (tmp_path / "config.json").write_text("{}")
    assert inputs.model(dataclasses.replace(made, prepared=tmp_path)).status == "ok"


def test_the_stack_really_works_here():
    """The one test with the real torch and bitsandbytes, in their own process."""
    settings = from_dict({"model": "demo"})
    real = Context(settings, dataclasses.replace(GOOD, gpus=[]), make_plan(settings, gpus=0))
    assert "torch" in real.stack and real.stack["nf4_error"] < software.NF4_ERROR


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


def test_run_checks_asks_about_gpus_only_where_there_are_some(monkeypatch):
    monkeypatch.setattr(Context, "stack", STACK)
    monkeypatch.setattr(link, "WITH_NCCL", [])  # test_all_reduce.py
    settings = from_dict({"model": "meta-llama/Llama-3.1-8B"})
    with_gpus = preflight.run_checks(settings, GOOD, make_plan(settings, GOOD))
    bare = dataclasses.replace(GOOD, gpus=[])
    without = preflight.run_checks(settings, bare, make_plan(settings, bare))
    extra = {check.name for check in with_gpus} - {check.name for check in without}
    assert extra == {"gpu count", "gpu memory", "gpu memory free", "compute capability", "bf16", "driver"}


def test_text_and_json():
    checks = [
        Check("ram", "ok", "64 GiB"),
        Check("swap", "warn", "none", "some", "add swap"),
        Check("disk", "fail", "1 GiB free " * 12, "100 GiB", "free some"),
        Check("model", "skip", "not there yet"),
    ]
    text = preflight.render(checks)
    assert max(map(len, text.splitlines())) <= 100
    assert "what to do          free some" in text
    assert text.endswith("not ready: 1 ok, 1 warnings, 1 failed, 1 skipped\n")
    assert preflight.failed(checks) and not preflight.failed(checks[:2])
    found = json.loads(json.dumps(preflight.to_dict(checks)))
    assert found["ok"] is False and found["checks"][1]["remedy"] == "add swap"
