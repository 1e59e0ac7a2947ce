"""What library/machine.py says of Docker: whose engine, whether it answers, its settings."""

import json

from tests.provision.fake_root import put_on_path, tree

# isort: split
from ansible.module_utils import machine_docker

INFO = {
    "ServerVersion": "28.2.2",
    "DockerRootDir": "/data/docker",
    "ContainersRunning": 2,
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    "SecurityOptions": ["name=seccomp,profile=builtin"],
}


def test_a_running_engine(tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path, docker=f"[ $1 = info ] && echo '{json.dumps(INFO)}'")
    found = machine_docker.docker(tmp_path, {"docker-ce": ("5:28.2.2", "ii")})
    assert found == {
        "version": "28.2.2",
        "origin": "docker",
        "data_root": "/data/docker",
        "running": 2,
        "store": "containerd",
        "rootless": False,
        "settings": {},
        "settings_error": None,
    }


def test_an_engine_that_is_stopped(tmp_path, monkeypatch):
    down = json.dumps({"ServerVersion": "", "ServerErrors": ["Cannot connect"]})
    put_on_path(
        monkeypatch,
        tmp_path,
        docker=f"if [ $1 = info ]; then echo '{down}'; else echo 20.10.24; echo no daemon >&2; exit 1; fi",
    )
    tree(tmp_path, {"etc/docker/daemon.json": '{"data-root": "/big"}'})
    found = machine_docker.docker(tmp_path, {"docker.io": ("20.10.24", "ii")})
    assert (found["version"], found["origin"], found["running"], found["store"]) == (
        "20.10.24",
        "distribution",
        None,
        None,
    )
    assert found["data_root"] == "/big"


def test_engines_of_others(tmp_path):
    tree(tmp_path, {"snap/bin/docker": ""})
    assert machine_docker.docker(tmp_path, {})["origin"] == "other"
    tree(tmp_path / "rootless", {"proc/17/comm": "rootlesskit\n"})
    assert machine_docker.docker(tmp_path / "rootless", {})["rootless"]


def test_damaged_settings_are_a_line(tmp_path):
    tree(tmp_path, {"etc/docker/daemon.json": '{"a": 1,\n}'})
    settings, error = machine_docker.daemon_settings(tmp_path)
    assert settings == {} and error and error.startswith("/etc/docker/daemon.json, line 2: ")
    tree(tmp_path, {"etc/docker/daemon.json": "[]"})
    assert (
        machine_docker.daemon_settings(tmp_path)[1]
        == "/etc/docker/daemon.json holds a list, expected an object"
    )
