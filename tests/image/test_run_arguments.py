"""What a container is given: the caller's user, the paths that are named, the rights of its service; no secret in words."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import run
from setup import SetupError

from tests.image.test_engine import DIGEST, describe_gpus, good
from tests.machine import needs

ME = os.getuid(), os.getgid()

# --- who the files belong to ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "environ", "expected"),
    [
        (1000, {}, (1000, 100)),
        (0, {}, (0, 100)),
        (0, {"SUDO_UID": "1001", "SUDO_GID": "1002"}, (1001, 1002)),
        (0, {"SUDO_UID": "1001"}, (1001, 100)),
        (0, {"SUDO_UID": "1001; rm"}, (0, 100)),
        (
            1000,
            {"SUDO_UID": "1001", "SUDO_GID": "1002"},
            (1000, 100),
        ),  # a variable alone makes nobody another
    ],
)
def test_files_belong_to_who_called(uid, environ, expected):
    assert run.caller(environ, uid, 100) == expected


def test_without_sudo_the_caller_is_this_process():
    assert run.caller({}) == (os.getuid(), os.getgid())


# --- the checkout's own folders ---------------------------------------------------------------------------


def test_the_folders_that_a_run_writes_are_made(tmp_path):
    for _ in range(2):
        assert run.own_folder(tmp_path / "new/models", *ME) == (tmp_path / "new/models").resolve()
    assert (tmp_path / "new/models").is_dir()


@needs(os.getuid() == 0, "root, who alone can give a folder away")
def test_a_folder_made_by_sudo_is_the_callers(tmp_path):
    run.own_folder(tmp_path / "new/runs", 1234, 1235)
    for path in (tmp_path / "new", tmp_path / "new/runs"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)
    assert tmp_path.stat().st_uid == 0


def test_a_folder_that_is_a_link_is_where_it_leads(tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "models").symlink_to("big disk")
    assert run.own_folder(tmp_path / "models", *ME) == (tmp_path / "big disk").resolve()


def test_a_link_that_leads_nowhere_is_one_line(tmp_path):
    (tmp_path / "models").symlink_to("unplugged disk")
    with pytest.raises(SetupError, match=r"/models: cannot be made \("):
        run.own_folder(tmp_path / "models", *ME)


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "may"),
    [
        (0o755, ME[0], 9999, True),
        (0o755, 9998, 9999, False),
        (0o775, 9998, ME[1], True),
        (0o777, 9998, 9999, True),
        (0o555, ME[0], ME[1], False),
        (0o755, 9998, ME[1], False),
    ],
)
def test_a_folder_of_somebody_else_is_one_line(tmp_path, mode, uid, gid, may):
    """Without privileges, as in the container, where even root has none."""
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(mode)
    if may:
        assert run.own_folder(folder, uid, gid) == folder.resolve()
        return
    with pytest.raises(SetupError) as refused:
        run.own_folder(folder, uid, gid)
    said = str(refused.value)
    assert f"{folder} belongs to " in said and f"`sudo chown -R {uid}:{gid} {folder}`" in said
    assert "\n" not in said


# --- the service and its rights ---------------------------------------------------------------------------


@pytest.fixture
def start(checkout, docker, environment):
    """start(*arguments, NAME=value): run.py where all is there; (exit code, stderr, the containers' calls)."""

    def started(*arguments, flavour="cpu", runs=(), terminal=False, vllm=False, **changes):
        images = good(checkout, flavour)
        if vllm:
            images["qlora-70b-recipe:vllm"] = next(iter(images.values()))
        docker.set(images=images, info={"CDISpecDirs": ["/etc/cdi"]}, runs=[list(r) for r in runs])
        if flavour == "gpu" and not (checkout.parent / "cdi").exists():
            describe_gpus(checkout)
        command = [sys.executable, str(checkout / "scripts/run.py"), *arguments]
        environ = environment(RUNTIME="docker", FLAVOUR=flavour, **changes)
        if terminal:
            status, told = in_terminal(command, environ, checkout)
            return status, told, docker.runs()
        done = subprocess.run(
            command, cwd=checkout, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        return done.returncode, done.stderr, docker.runs()

    return started


def in_terminal(command, environ, folder):
    child, terminal = pty.fork()
    if not child:
        os.chdir(folder)
        os.execve(command[0], command, environ)
    told = b""
    while True:
        try:
            block = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        told += block
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.decode()


def options_and_service(call):
    """(docker's own words, service, what it runs) of a `docker compose … run … SERVICE COMMAND …`."""
    words = call["argv"]
    place = next(i for i, word in enumerate(words) if word.removesuffix("-cpu") in run.SERVICES)
    return words[:place], words[place], words[place + 1 :]


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("command", "service"),
    [
        ("preflight", "preflight"),
        ("prepare", "prepare"),
        ("train", "train"),
        ("export", "export"),
        ("chat", "chat"),
        ("eval", "export"),
        ("reproduce", "train"),
        ("doctor", "export"),
        ("plan", "export"),
        ("report", "export"),
        ("compare", "export"),
        ("bench", "export"),
    ],
)
def test_each_command_runs_in_the_service_that_has_no_more_rights_than_it_needs(
    start, command, service, flavour
):
    code, _, (call,) = start(command, "--json", flavour=flavour)
    before, name, words = options_and_service(call)
    assert code == 0
    assert name == service + ("-cpu" if flavour == "cpu" else "")
    assert words == [command, "--json"]
    assert {"run", "--rm", "--no-deps"} <= set(before)


def test_a_page_that_is_served_is_not_served_in_a_container(start):
    assert start("report", "--run", "x", "--watch") == (
        2,
        "runtime: --watch serves a page, and the container has no network: use RUNTIME=host\n",
        [],
    )


@pytest.mark.parametrize("reason", ["no GPU", "no image", "no run"])
def test_where_vllm_cannot_serve_one_line_says_why(start, reason):
    flavour = "cpu" if reason == "no GPU" else "gpu"
    code, err, calls = start("serve", "--run", "x", flavour=flavour, vllm=reason == "no run")
    said = {
        "no GPU": "runtime: vLLM needs an NVIDIA GPU, found none\n",
        "no image": "runtime: there is no image qlora-70b-recipe:vllm: `docker pull vllm/vllm-openai:v0.33.0`, then "
        "`docker compose --profile vllm build vllm`\n",
        "no run": "runtime: RUN=x: no such run in runs\n",
    }
    assert (code, err, calls) == (2, said[reason], [])


def test_vllm_is_given_the_words_the_port_and_the_key(start, checkout):
    """The key in the environment, where no other user reads it; all files to be read alone."""
    (checkout / "recipe/serve/vllm.py").write_text(
        "import json, sys\n"
        'print(json.dumps({"words": ["/m/model", "--enable-lora", *sys.argv[1:]], "port": 8123, "key": "the-secret-key"}))\n'
    )
    code, err, (call,) = start("serve", "--run", "x", flavour="gpu", vllm=True)
    assert code == 0
    place = call["argv"].index("vllm")
    assert call["argv"][place + 1 :] == ["/m/model", "--enable-lora", "--run", "x"]
    assert {"run", "--rm", "--service-ports"} <= set(call["argv"][:place])
    assert call["env"]["VLLM_API_KEY"] == "the-secret-key" and call["env"]["RECIPE_SERVE_PORT"] == "8123"
    assert "the-secret-key" not in " ".join(call["argv"]) and err.count("the-secret-key") == 1
    assert "http://127.0.0.1:8123/v1" in err


def test_only_prepare_and_preflight_are_more_than_export(checkout):
    """Of compose.yaml's services only prepare has a network."""
    text = (checkout / "compose.yaml").read_text()
    networked = [line.split(":")[0].strip() for line in text.splitlines() if "*network," in line]
    assert networked == ["prepare", "prepare-cpu"]


def test_the_checkout_and_its_folders_are_told_to_compose(checkout, start):
    (checkout.parent / "big").mkdir()
    (checkout / "models").symlink_to(checkout.parent / "big")
    _, _, (call,) = start("train")
    told = {name: value for name, value in call["env"].items() if name.startswith("RECIPE_")}
    assert told == {
        "RECIPE_FOLDER": str(checkout),
        "RECIPE_MODELS": str(checkout.parent / "big"),
        "RECIPE_RUNS": str(checkout / "runs"),
        "RECIPE_DATA": str(checkout / "data"),
        "RECIPE_CACHE": str(checkout / ".cache"),
        "RECIPE_USER": f"{os.getuid()}:{os.getgid()}",
        "RECIPE_IMAGE_DIGEST": DIGEST,
    }
    argv = call["argv"]
    assert argv[argv.index("--file") + 1] == str(checkout / "compose.yaml")
    assert argv[argv.index("--project-directory") + 1] == str(checkout)


def test_a_path_outside_is_mounted_at_its_own_place(checkout, start):
    rows = checkout.parent / "my rows.jsonl"
    rows.touch()
    arguments = ["train", "--data", str(rows), "--set", f"paths.runs={checkout.parent}/runs"]
    _, _, (call,) = start(*arguments)
    before, _, words = options_and_service(call)
    mounted = [value for option, value in pairwise(before) if option == "--volume"]
    assert mounted == [f"{rows}:{rows}:ro", f"{checkout.parent}/runs:{checkout.parent}/runs"]
    assert words == arguments


def test_without_a_terminal_compose_makes_none(start):
    assert "-T" in options_and_service(start("chat")[2][0])[0]
    assert "-T" not in options_and_service(start("chat", terminal=True)[2][-1])[0]


def test_the_demo_prepares_first_and_only_that_with_a_network(start):
    code, _, calls = start("demo", "--run", "x")
    assert code == 0
    assert [options_and_service(call)[1:] for call in calls] == [
        ("prepare-cpu", ["prepare", "--config", run.DEMO_CONFIG]),
        ("export-cpu", ["demo", "--run", "x"]),
    ]


def test_where_the_demo_cannot_be_prepared_it_ends(start):
    code, told, calls = start("demo", runs=[(2, "prepare: no network\n")])
    assert (code, len(calls)) == (2, 1)
    assert told.splitlines()[1:] == ["prepare: no network"]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137, 143])
def test_the_containers_exit_code_is_the_commands(start, code):
    ended, told, _ = start("train", runs=[(code, "")])
    assert ended == code
    assert len(told.splitlines()) == 1  # which image it was


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            'could not select device driver "cdi" with capabilities: [[gpu]]',
            "Docker has no NVIDIA GPU to give",
        ),
        ("failed to create: no space left on device", "`docker builder prune` frees"),
    ],
)
def test_a_container_that_does_not_start_is_explained(start, text, line):
    failure = (125, f"Error response from daemon: {text}\n")
    code, told, _ = start("train", runs=[failure, failure])
    assert code == 2
    assert told.splitlines()[-1].startswith("runtime: ") and line in told.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_to_the_container_which_ends_in_its_own_way(
    checkout, docker, environment, number, code
):
    docker.set(images=good(checkout), until_killed=True, runs=[[code, "saved\n"]])
    command = [sys.executable, str(checkout / "scripts/run.py"), "train"]
    environ = environment(RUNTIME="docker")
    process = subprocess.Popen(
        command, env=environ, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    while not docker.runs():
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert (process.returncode, told.splitlines()[1:]) == (code, ["saved"])
    (run_call,) = docker.runs()
    name = run_call["argv"][run_call["argv"].index("--name") + 1]
    kills = [call["argv"] for call in docker.calls() if call["argv"][0] == "kill"]
    assert kills == [["kill", f"--signal={number:d}", name]]


# --- what only the network's stage needs ------------------------------------------------------------------


def test_own_certificates_reach_prepare_only(checkout, start):
    bundle = checkout.parent / "company.pem"
    bundle.touch()
    (checkout.parent / "link.pem").symlink_to(bundle)
    variables = {"REQUESTS_CA_BUNDLE": str(checkout.parent / "link.pem"), "SSL_CERT_FILE": "/absent.pem"}
    before, _, _ = options_and_service(start("prepare", **variables)[2][-1])
    assert f"{bundle}:/etc/ssl/host.pem:ro" in before
    given = {value for option, value in pairwise(before) if option == "--env"}
    assert given == {f"{name}=/etc/ssl/host.pem" for name in run.CERTIFICATES}
    before, _, _ = options_and_service(start("train", **variables)[2][-1])
    assert "host.pem" not in str(before)


def test_a_token_is_in_no_command_line(start):
    secret = "hf_secret"
    for command in ("prepare", "demo", "train"):
        _, told, calls = start(command, HF_TOKEN=secret)
        assert secret not in told
        assert all(secret not in json.dumps(call["argv"]) for call in calls)
        assert calls[-1]["env"]["HF_TOKEN"] == secret  # compose.yaml hands it to prepare alone
