"""The real container: what it may see, reach and use, and a run in it from the first command to verified adapters."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.files import read_json
from tests.docker.calls import CALLER, ROOT, TOKEN, environment, make
from tests.machine import lacks

sys.path.insert(0, str(ROOT / "scripts"))
import engine as engine_script

pytestmark = [pytest.mark.docker, pytest.mark.slow]
CONFIG = "CONFIG=recipe/configs/smollm2-135m.yaml"
TRAIN = [sys.executable, "scripts/run.py", "train", "--config", "recipe/configs/smollm2-135m.yaml", "--run"]
STEPS = "--set train.steps=2 --set train.save_every=1"

LOOK = """
import json, os, socket, sys
def tried(act):
    try:
        act()
        return "done"
    except OSError as error:
        return type(error).__name__ + " " + os.strerror(error.errno)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "ids": [os.getuid(), os.getgid()],
    "groups": os.getgroups(),
    "capabilities": [status[n].strip() for n in ("CapEff", "CapPrm", "CapBnd")],
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "connect": tried(lambda: socket.create_connection(("192.0.2.1", 80), 2)),
    "writes": {p: tried(lambda: open(p + "/probe", "w").close()) for p in sys.argv[1:]},
    "shm_gib": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize / 2**30,
    "environment": dict(os.environ),
    "recipe": __import__("recipe").__file__,
}))
"""


@pytest.fixture(scope="module")
def prepared(checkout):
    """The demo model, fetched by the one service that has a network."""
    done = make(checkout, "prepare", CONFIG)
    assert done.returncode == 0, done.stderr
    assert "quantised" in done.stdout
    return checkout


@pytest.fixture(scope="module")
def trained(prepared):
    done = make(prepared, "train", CONFIG, "RUN=first", f"ARGS={STEPS}")
    assert done.returncode == 0, done.stderr
    return prepared, done


def look(folder, service, *paths):
    """What a program in this service's container finds out, as `scripts/run.py` would start it."""
    changes = {
        "RECIPE_FOLDER": str(folder),
        "RECIPE_USER": f"{CALLER[0]}:{CALLER[1]}",
        "RECIPE_IMAGE_DIGEST": "sha256:0",
    }
    changes |= {f"RECIPE_{name.upper()}": str(folder / name) for name in ("models", "runs", "data")}
    command = [
        "docker",
        "compose",
        "--project-directory",
        str(folder),
        "run",
        "--rm",
        "-T",
        "--entrypoint",
        "python",
    ]
    done = subprocess.run(
        [*command, service, "-c", LOOK, *map(str, paths)],
        cwd=folder,
        env=environment(**changes, RECIPE_CACHE=str(folder / ".cache")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- what a container may -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(prepared):
    folder = prepared
    paths = [
        "/",
        "/opt/recipe",
        "/opt/venv",
        "/tmp",
        "/cache",
        folder,
        folder / "recipe",
        folder / "models",
        folder / "runs",
        folder / "data",
    ]
    return {
        service: look(folder, service, *paths)
        for service in ("train-cpu", "preflight-cpu", "prepare-cpu", "chat-cpu")
    }


def test_it_is_the_caller_without_any_privilege(seen):
    for service, found in seen.items():
        assert found["ids"] == list(CALLER), service
        assert set(found["capabilities"]) == {"0000000000000000"}, service
        assert found["no_new_privileges"] == "1", service


def test_it_writes_only_where_runs_and_models_lie(seen, prepared):
    read_only = "OSError Read-only file system"
    writes = seen["train-cpu"]["writes"]
    for path in ("/", "/opt/recipe", "/opt/venv", str(prepared), str(prepared / "recipe")):
        assert writes[path] in (read_only, "PermissionError Permission denied"), path
    assert writes[str(prepared)] == read_only
    for path in ("/tmp", "/cache", str(prepared / "models"), str(prepared / "runs"), str(prepared / "data")):
        assert writes[path] == "done", path


def test_only_preflight_may_write_host_env(seen, prepared):
    assert {service for service, found in seen.items() if found["writes"][str(prepared)] == "done"} == {
        "preflight-cpu"
    }


def test_only_prepare_has_a_network_and_the_token(seen):
    for service, found in seen.items():
        has_network = service == "prepare-cpu"
        assert (found["interfaces"] != ["lo"]) == has_network, service
        assert (found["connect"] != "OSError Network is unreachable") == has_network, service
        assert (found["environment"].get("HF_TOKEN") == TOKEN) == has_network, service
        assert TOKEN not in json.dumps({k: v for k, v in found["environment"].items() if k != "HF_TOKEN"})
        assert found["environment"]["RECIPE_NETWORK"] == ("bridge" if has_network else "none")


def test_its_code_is_the_images_and_not_what_lies_in_the_working_directory(seen):
    assert {found["recipe"] for found in seen.values()} == {"/opt/recipe/recipe/__init__.py"}


def test_shared_memory_is_enough_for_nccl(seen):
    assert all(found["shm_gib"] >= 1 for found in seen.values())


def test_no_service_is_open_to_the_network():
    config = json.loads(
        subprocess.check_output(
            ["docker", "compose", "--profile", "*", "config", "--format", "json"], cwd=ROOT
        )
    )
    assert len(config["services"]) == 11
    assert (
        config["networks"]["serve"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"]
        == "false"
    )
    for name, service in config["services"].items():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        if name == "vllm":  # which is reached, and itself reaches nothing
            assert "network_mode" not in service and list(service["networks"]) == ["serve"]
        else:
            assert service["network_mode"] == ("bridge" if name.startswith("prepare") else "none"), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service, name
        gpus = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        assert (gpus is None) == name.endswith("-cpu"), name
        assert ("memlock" in service.get("ulimits", {})) == (not name.endswith("-cpu")), name


# --- a run --------------------------------------------------------------------------------------------------


def test_preflight(prepared):
    done = make(prepared, "preflight", CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready:" in done.stdout and "FAIL" not in done.stdout
    assert done.stderr.startswith("runtime: container qlora-70b-recipe:cpu (sha256:")


def test_two_ranks_train_and_the_files_are_the_callers(trained):
    folder, done = trained
    assert "starting 2 ranks" in done.stderr and "finished 2 steps" in done.stderr
    assert "run first: 2 steps" in done.stdout
    for path in [folder / "runs", *folder.glob("runs/**/*"), *folder.glob("models/**/*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == CALLER, path


def test_the_manifest_names_the_image(trained, image):
    manifest = read_json(trained[0] / "runs/first/manifest.json")
    assert manifest["image_digest"] == image.record["digest"]
    assert manifest["git_commit"] == image.record["revision"]
    assert set(manifest["lock_sha256"]) == {"requirements-cpu.lock", "requirements-gpu.lock"}


def test_export_and_chat(trained):
    folder, _ = trained
    done = make(folder, "export-adapters", "RUN=first")
    assert done.returncode == 0, done.stderr
    assert "verified with plain PEFT" in done.stdout
    assert (folder / "runs/first/adapters/adapter_model.safetensors").exists()
    done = make(folder, "chat", "RUN=first", "ARGS=--once hello")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_host_reads_what_the_container_wrote(trained, tmp_path):
    """Same files either way: the host exports the container's run once more, to the same bytes."""
    folder, _ = trained
    adapters = (folder / "runs/first/adapters/adapter_model.safetensors").read_bytes()
    command = [sys.executable, "-m", "recipe", "export", "--run", "first", "--replace"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/first/adapters/adapter_model.safetensors").read_bytes() == adapters


def test_exit_codes_and_refusals_come_through(trained):
    folder, _ = trained

    def code(*arguments):
        command = [sys.executable, "scripts/run.py", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return done.returncode, done.stderr.splitlines()[-1]

    config = ("--config", "recipe/configs/smollm2-135m.yaml")
    assert code("plan", *config)[0] == 0
    assert code("plan", *config, "--ram-gib", "0.1")[0] == 1
    number, line = code("train", *config, "--run", "first")
    assert number == 2 and "finished" in line
    number, line = code("plan", "--config", "nowhere.yaml")
    assert number == 2 and "nowhere.yaml" in line


def test_the_doctor_looks_at_a_run_a_log_and_the_hosts_kernel(trained, tmp_path):
    folder, _ = trained
    done = make(folder, "doctor", "RUN=first", "ARGS=--json")
    assert (done.returncode, json.loads(done.stdout)["diagnoses"]) == (0, [])
    log, bundle = folder / "runs/other.log", folder / "runs/report.tar.gz"
    log.write_text("Traceback (most recent call last):\nModuleNotFoundError: No module named 'trl'\n")
    done = make(folder, "doctor", "ARGS=--json --log runs/other.log --bundle runs/report.tar.gz")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["diagnoses"][0]["rule"] == "missing_package" and bundle.stat().st_size > 0
    # The image has no dmesg: these lines, or why there are none, come from the host's probe.
    assert read_json(folder / ".cache/host-probe.json")["parts"]["kernel_log"].keys() == {"found", "why"}
    assert any("dmesg" in line and "not installed" not in line for line in found["looked_at"])


def test_a_model_that_is_not_there_is_refused_at_once(prepared, tmp_path):
    done = make(prepared, "train", CONFIG, "RUN=none", "ARGS=--set paths.models=runs/no-models")
    assert done.returncode == 2
    assert "no network, by design" in done.stderr and "make prepare" in done.stderr
    assert not (prepared / "runs/none").exists()


def test_data_outside_the_checkout(prepared, tmp_path):
    """A folder that only an argument names is there in the container, to be read."""
    rows = (ROOT / "recipe/demo/train.jsonl").read_text()
    (tmp_path / "my rows.jsonl").write_text(rows)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    done = make(
        prepared,
        "train",
        CONFIG,
        "RUN=outside",
        f"DATA={tmp_path / 'my rows.jsonl'}",
        f"ARGS={STEPS} --set train.steps=1",
    )
    assert done.returncode == 0, done.stderr
    assert read_json(prepared / "runs/outside/manifest.json")["data"]["path"] == str(
        tmp_path / "my rows.jsonl"
    )


def test_the_token_is_in_no_file_of_a_run(trained):
    folder, done = trained
    assert TOKEN not in done.stdout + done.stderr
    for path in [p for p in folder.rglob("*") if p.is_file() and "models" not in p.parts]:
        assert TOKEN.encode() not in path.read_bytes(), path


# --- stopping -----------------------------------------------------------------------------------------------


def wait_for_a_step(run):
    """Before the first one is done there is nothing to save."""
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_bytes():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "to_all", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_a_signal_saves_and_ends_the_container(prepared, number, to_all, code):
    """Ctrl-C of a terminal goes to every process of the job, a service manager's SIGTERM to the first one."""
    name = f"stopped-{code}"
    command = [*TRAIN, name]
    process = subprocess.Popen(
        command,
        cwd=prepared,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("training to step"):
            wait_for_a_step(prepared / "runs" / name)
            (os.killpg if to_all else os.kill)(process.pid, number)
    assert process.wait(timeout=120) == code, "".join(said)
    assert f"go on with RUN={name}" in said[-1]
    assert list((prepared / "runs" / name / "checkpoints").glob("step-*"))
    assert containers() == []


def test_ctrl_c_at_a_terminal(prepared):
    """There the key goes through docker into the container's own terminal, once."""
    main, side = pty.openpty()
    command = [*TRAIN, "terminal"]
    process = subprocess.Popen(
        command,
        cwd=prepared,
        env=environment(TERM="xterm"),
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)
    said, pressed = b"", False
    while True:
        try:
            said += os.read(main, 65536)
        except OSError:
            break
        if b"training to step" in said and not pressed:
            wait_for_a_step(prepared / "runs" / "terminal")
            pressed = True
            time.sleep(1)
            os.write(main, b"\x03")
    assert process.wait(timeout=120) == 130, said.decode(errors="replace")
    assert b"stopping, with a checkpoint of the last step" in said
    assert b"go on with RUN=terminal" in said
    assert containers() == []


def containers():
    """Of ours that still exist."""
    command = ["docker", "ps", "--all", "--quiet", "--filter", "name=qlora-70b-recipe-train"]
    return subprocess.check_output(command, text=True).split()


# --- GPUs, as far as an engine without one can show -----------------------------------------------------------


@pytest.fixture
def described(prepared, tmp_path):
    """run(ulimits) -> (compose's result, how the runtime was told to make the container): a GPU service on the CPU image,
    whose GPU is /dev/zero under another name."""
    folders = (
        json.loads(subprocess.check_output(["docker", "info", "--format", "{{json .CDISpecDirs}}"])) or []
    )
    folder = next((f for f in folders if os.access(f, os.W_OK)), None)
    if folder is None:
        lacks("needs a Docker engine with CDI and a folder of its descriptions that can be written")
    node = {"path": "/dev/nvidia-test", "hostPath": "/dev/zero"}
    device = {"name": "recipe-test", "containerEdits": {"deviceNodes": [node]}}
    description = Path(folder) / "recipe-test.json"
    description.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [device]}))
    name = f"qlora-70b-recipe-test-{os.getpid()}"

    def run(ulimits):
        service = {"image": "qlora-70b-recipe:cpu"} | ulimits
        (tmp_path / "override.json").write_text(json.dumps({"services": {"train": service}}))
        files = ["--file", str(ROOT / "compose.yaml"), "--file", str(tmp_path / "override.json")]
        command = [
            "docker",
            "compose",
            "--project-directory",
            str(prepared),
            *files,
            "run",
            "--detach",
            "--name",
            name,
        ]
        command += ["--entrypoint", "sleep 60", "train"]
        done = subprocess.run(
            command, cwd=prepared, env=environment(RECIPE_GPUS="recipe-test"), capture_output=True, text=True
        )
        return done, name

    yield run
    description.unlink()
    subprocess.run(["docker", "rm", "--force", name], capture_output=True)


def test_gpus_are_part_of_the_containers_own_description(described):
    """What the runtime knows of stays at `systemctl daemon-reload`; what a hook adds later does not."""
    done, name = described({"ulimits": {"memlock": 65536}})
    assert done.returncode == 0, done.stderr
    found = json.loads(subprocess.check_output(["docker", "inspect", name]))[0]
    requests = found["HostConfig"]["DeviceRequests"]
    assert [(r["Driver"], r["DeviceIDs"]) for r in requests] == [("cdi", ["nvidia.com/gpu=recipe-test"])]
    read = ["docker", "exec", name, "python", "-c", "print(open('/dev/nvidia-test', 'rb').read(4))"]
    assert subprocess.check_output(read, text=True) == f"{bytes(4)}\n"
    if os.getuid() == 0:
        state = Path(os.environ.get("DOCKER_HOST", "unix:///run/docker/x").removeprefix("unix://")).parent
        told = next(state.glob(f"**/io.containerd.runtime.v2.task/moby/{found['Id']}/config.json"))
        linux = json.loads(told.read_text())["linux"]
        assert "/dev/nvidia-test" in [device["path"] for device in linux["devices"]]
        rules = [
            r
            for r in linux["resources"]["devices"]
            if (r.get("major"), r.get("minor")) == (1, 5) and r["allow"]
        ]
        assert rules


def test_memory_can_be_locked_or_a_line_says_that_the_host_forbids_it(described):
    done, name = described({})
    if done.returncode:
        assert engine_script.explain(done.stderr).startswith("this host forbids locking memory"), done.stderr
    else:
        limit = "import resource; print(resource.getrlimit(resource.RLIMIT_MEMLOCK) == (resource.RLIM_INFINITY,) * 2)"
        assert subprocess.check_output(["docker", "exec", name, "python", "-c", limit], text=True) == "True\n"
