"""RUNTIME=docker says in one line what is missing, and makes nothing; RUNTIME=auto goes on on the host, and says why."""

import platform
import re
import shutil
import subprocess

import engine
import pytest

import image
from tests.image.fake_docker import OVERLAY2_STORE, UNREACHABLE
from tests.test_setup import finish, setup

DIGEST = "sha256:" + "5e" * 32


def labels(checkout, flavour="cpu", **changes):
    """Of an image that holds this checkout's sources and locks."""
    right = {
        "recipe.lock": image.lock_sha256(flavour, checkout),
        "recipe.sources": image.sources_sha256(checkout),
    }
    return {"Id": DIGEST, "Config": {"Labels": right | changes}}


def good(checkout, flavour="cpu", **changes):
    return {f"qlora-70b-recipe:{flavour}": labels(checkout, flavour, **changes)}


def make(checkout, environ, *arguments):
    """(exit code, stdout, lines of stderr without make's own)."""
    command = [shutil.which("make"), *arguments]
    done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, timeout=60)
    return (
        done.returncode,
        done.stdout,
        [x for x in done.stderr.splitlines() if not x.startswith("make: ***")],
    )


NOT_RUNNING = r"the Docker daemon does not answer \(/var/run/docker\.sock\): `sudo systemctl start docker`"
NOT_ALLOWED = (
    r"you may not use Docker \(/var/run/docker\.sock\): `sudo usermod -aG docker \$USER`, then log in again"
)
NO_COMPOSE = r"the compose plugin of Docker is missing: `sudo apt install docker-compose-plugin`"
NO_BUILDX = r"the buildx plugin of Docker is missing: `sudo apt install docker-buildx-plugin`"
ANY = object()  # an image of this checkout

# name: (state of docker, or None without docker; FLAVOUR; a description of GPUs; the line)
SITUATIONS = {
    "no docker": (
        None,
        "cpu",
        False,
        r"Docker is not installed: `make provision` installs it .*; RUNTIME=host runs without it",
    ),
    "not running": ({"engine": "down"}, "cpu", False, NOT_RUNNING),
    "not running, Docker 29": ({"engine": "down 29"}, "cpu", False, NOT_RUNNING),
    "not allowed": ({"engine": "denied"}, "cpu", False, NOT_ALLOWED),
    "not allowed, Docker 29": ({"engine": "denied 29"}, "cpu", False, NOT_ALLOWED),
    "a context that is not there": (
        {"engine": "no such context"},
        "cpu",
        False,
        r"docker image inspect: Failed to initialize: .*context not found",
    ),
    "no image": ({}, "cpu", False, r"no image qlora-70b-recipe:cpu: `make build FLAVOUR=cpu` makes it"),
    "other packages": (
        {"images": ANY, "labels": {"recipe.lock": "0" * 64}},
        "cpu",
        False,
        r"holds other packages than the locks: `make build FLAVOUR=cpu` renews it",
    ),
    "other sources": (
        {"images": ANY, "labels": {"recipe.sources": "0" * 64}},
        "cpu",
        False,
        r"holds other sources than this checkout: `make build FLAVOUR=cpu` renews it",
    ),
    "no compose": ({"images": ANY, "compose": "missing 26"}, "cpu", False, NO_COMPOSE),
    "no compose, Docker 28": ({"images": ANY, "compose": "missing 28"}, "cpu", False, NO_COMPOSE),
    "no compose, bare": ({"images": ANY, "compose": "missing no flag"}, "cpu", False, NO_COMPOSE),
    "old compose": (
        {"images": ANY, "compose": "v2.23.3"},
        "cpu",
        False,
        r"docker compose is v2\.23\.3, expected 2\.24 or newer: update Docker's packages",
    ),
    "no GPU": (
        {"images": ANY},
        "gpu",
        False,
        r"Docker has no NVIDIA GPU to give: .*`sudo nvidia-ctk cdi generate",
    ),
    "CDI is off": (
        {"images": ANY},
        "gpu",
        True,
        r'put \{"features": \{"cdi": true\}\} into /etc/docker/daemon\.json, then `sudo systemctl restart docker`',
    ),
}


@pytest.fixture(params=SITUATIONS)
def situation(request, checkout, docker):
    """(FLAVOUR, the line that is expected) of a machine on which the container cannot be used."""
    state, flavour, described, line = SITUATIONS[request.param]
    if state is None:
        docker.remove()
    else:
        state = dict(state)
        if state.get("images") is ANY:
            state["images"] = good(checkout, flavour, **state.pop("labels", {}))
        docker.set(**state)
    if described:
        describe_gpus(checkout)
    return flavour, line


def describe_gpus(checkout, kind="nvidia.com/gpu"):
    folder = checkout.parent / "cdi"
    folder.mkdir()
    (folder / "nvidia.yaml").write_text(f"cdiVersion: 0.5.0\nkind: {kind}\ndevices: [{{name: all}}]\n")


def said_first(line):
    """What a build refuses, or that the image is for another processor than this machine's."""
    return (
        line
        if platform.machine() == "x86_64"
        else r"this machine is \w+, the image is for x86_64; RUNTIME=host runs on aarch64 too"
    )


def contents(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


def test_what_is_missing_is_one_line_and_nothing_is_made(checkout, environment, situation):
    flavour, line = situation
    before = contents(checkout)
    code, out, told = make(checkout, environment(FLAVOUR=flavour), "train", "RUNTIME=docker", "RUN=x")
    assert (code, out, len(told)) == (2, "", 1), told
    assert told[0].startswith("runtime: ") and re.search(line, told[0])
    assert contents(checkout) == before


def test_by_itself_it_goes_on_on_the_host_and_says_why(checkout, environment, situation):
    flavour, line = situation
    finish(checkout, flavour)
    answer = checkout / ".venv/bin/python"
    answer.unlink()
    answer.write_text('#!/bin/sh\nprintf "[%s]" "$@"\nexit 3\n')
    answer.chmod(0o755)
    setup.write_stamp(flavour, checkout)
    before = contents(checkout)
    code, out, told = make(checkout, environment(FLAVOUR=flavour), "plan", "CONFIG=a b.yaml")
    assert (code, out) == (2, "[-m][recipe][plan][--config][a b.yaml]")
    assert len(told) == 1 and re.fullmatch(r"runtime: host, in \.venv \(.*\)", told[0]), told
    assert re.search(line, told[0])
    assert contents(checkout) == before


@pytest.mark.parametrize("engine_state", UNREACHABLE)
def test_an_engine_that_cannot_be_asked_has_no_facts(docker, monkeypatch, engine_state):
    """Also where docker itself ends with 0."""
    monkeypatch.setenv("PATH", str(docker.folder))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    docker.set(engine=engine_state)
    with pytest.raises(engine.EngineError) as refused:
        engine.info()
    expected = {"down": NOT_RUNNING, "denied": NOT_ALLOWED, "no": "context not found"}
    assert re.search(expected[engine_state.split()[0]], str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ("down", "the Docker daemon does not answer (unix:///run/other.sock)"),
        ("down 29", "the Docker daemon does not answer (unix:///run/other.sock)"),
        ("denied", "you may not use Docker (unix:///run/other.sock)"),
        ("denied 29", "you may not use Docker (unix:///run/other.sock)"),
    ],
)
def test_the_address_of_another_engine_is_named(docker, monkeypatch, state, line):
    monkeypatch.setenv("PATH", str(docker.folder))
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/other.sock")
    docker.set(engine=state)
    with pytest.raises(engine.EngineError) as refused:
        engine.image("qlora-70b-recipe:cpu")
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (None, r"Docker is not installed"),
        ({"engine": "down"}, NOT_RUNNING),
        ({"engine": "down 28"}, NOT_RUNNING),
        ({"engine": "denied"}, NOT_ALLOWED),
        ({"buildx": "missing 26"}, NO_BUILDX),
        ({"buildx": "missing 28"}, NO_BUILDX),
        (
            {"info": {"DriverStatus": OVERLAY2_STORE}},
            r'old store.*put \{"features": \{"containerd-snapshotter": true\}\} into /etc/docker/daemon\.json',
        ),
    ],
)
def test_what_a_build_misses_is_one_line_and_nothing_is_made(checkout, docker, environment, state, line):
    docker.remove() if state is None else docker.set(**state)
    before = contents(checkout)
    code, out, told = make(checkout, environment(), "build")
    assert (code, out, len(told)) == (2, "", 1), told
    assert told[0].startswith("build: ") and re.search(said_first(line), told[0])
    assert contents(checkout) == before


@pytest.mark.parametrize("target", ["plan", "train"])
def test_a_runtime_that_is_none_is_refused(checkout, docker, environment, target):
    told = make(checkout, environment(), target, "RUNTIME=podman")
    assert told == (2, "", ["runtime: RUNTIME=podman: expected auto, docker or host"])
    assert docker.calls() == []


def test_on_the_host_docker_is_not_asked(checkout, docker, environment):
    finish(checkout)
    make(checkout, environment(), "plan", "RUNTIME=host")
    make(checkout, environment(), "report", "RUN=x", "ARGS=--watch")  # a page that is served
    assert docker.calls() == []


def test_compare_gets_each_run_as_a_word_of_its_own(checkout, docker, environment):
    docker.set(images=good(checkout, "cpu"), runs=[[0, ""]])
    make(checkout, environment(), "compare", "RUN=one two `touch injected` *", "ARGS=--json")
    (run,) = docker.runs()
    given = run["argv"][run["argv"].index("export-cpu") + 1 :]
    assert given == ["compare", "one", "two", "`touch", "injected`", "*", "--json"]
    assert not (checkout / "injected").exists()


@pytest.mark.parametrize("runtime", ["auto", "docker"])
@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_where_all_is_there_the_container_runs(checkout, docker, environment, flavour, runtime):
    """Values reach it as they are; its exit code comes back."""
    docker.set(images=good(checkout, flavour), info={"CDISpecDirs": ["/etc/cdi"]}, runs=[[2, "no\n"]])
    describe_gpus(checkout)
    name = """a b'c"; touch injected; `touch injected`"""
    values = [f"RUN={name}", "CONFIG=my config.yaml", "DATA=x;y", "ARGS=--set a='b c'"]
    code, _, told = make(checkout, environment(FLAVOUR=flavour, RUNTIME=runtime), "train", *values)
    assert (code, told) == (2, [f"runtime: container qlora-70b-recipe:{flavour} ({DIGEST[:19]})", "no"])
    (run,) = docker.runs()
    service = "train" if flavour == "gpu" else "train-cpu"
    given = run["argv"][run["argv"].index(service) + 1 :]
    assert given == ["train", "--config", "my config.yaml", "--data", "x;y", "--run", name, "--set", "a=b c"]
    assert not (checkout / "injected").exists()


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("nvidia.yaml", "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n", True),
        ("nvidia.json", '{"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu"}', True),
        ("nvidia.yaml", "kind: nvidia.com/pva\n", False),
        ("other.yaml", "kind: amd.com/gpu\n", False),
        ("nvidia.yaml.bak", "kind: nvidia.com/gpu\n", False),
    ],
)
def test_gpus_are_those_that_cdi_describes(tmp_path, file, text, found):
    (tmp_path / file).write_text(text)
    assert bool(engine.gpu_devices([tmp_path / "absent", tmp_path])) == found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("write /x: no space left on device", "`docker builder prune` frees the build cache"),
        (
            'could not select device driver "cdi" with capabilities: [[gpu]]',
            "Docker has no NVIDIA GPU to give",
        ),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all", "no NVIDIA GPU to give"),
        ("error setting rlimit type 8: operation not permitted", "LimitMEMLOCK=infinity"),
    ],
)
def test_complaints_of_a_container_that_does_not_start(text, line):
    told = engine.explain(f"Error response from daemon: {text}")
    assert line in told and "\n" not in told


def test_a_complaint_that_is_not_known_is_passed_on():
    assert engine.explain("Error response from daemon: a new one") is None
