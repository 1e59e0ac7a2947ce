"""`recipe report --watch`: the page follows the run's files by itself, is served to this machine alone, and ends well."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from recipe.cli import main
from tests.train.tiny_run import ROOT

PAGE = "document.getElementById('{}').innerText"


@pytest.fixture
def watched(runs):
    command = [
        sys.executable,
        "-m",
        "recipe",
        "report",
        "--run",
        "tracked",
        "--set",
        f"paths.runs={runs}",
        "--watch",
    ]
    process = subprocess.Popen([*command, "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    assert "shows run tracked (Ctrl-C ends)" in line
    yield process, line.split()[0]
    process.kill()
    process.wait()


def test_the_page_follows_the_run_without_being_loaded_again(watched, runs, browser):
    process, address = watched
    run = runs / "tracked"
    browser.open(address, 1400, 900)
    browser.js("window.mark = 'the same page'; document.querySelector('#settings details').open = true")
    browser.wait_for("document.documentElement.dataset.server == 'there'")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    newest = {**json.loads(lines[-1]), "step": 13, "loss": 0.125}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(newest) + "\n")
    with open(run / "events.jsonl", "a") as file:
        file.write(
            json.dumps(
                {"time": time.time(), "kind": "evaluation", "step": 13, "loss": 0.25, "message": "<b>new</b>"}
            )
            + "\n"
        )
    browser.wait_for("Bokeh.documents[0].get_model_by_name('steps').data.loss.at(-1) == 0.125")
    assert browser.js("Bokeh.documents[0].get_model_by_name('evaluations').data.loss.at(-1)") == 0.25
    assert "0.2500" in browser.js(PAGE.format("tiles")) and "<b>new</b>" in browser.js(PAGE.format("events"))
    assert browser.js("window.mark") == "the same page" and browser.js(
        "document.querySelector('#settings details').open"
    )
    assert browser.js("Bokeh.documents[0].get_model_by_name('span').end") >= 13
    assert browser.complaints == [] and all(url.startswith(address) for url in browser.requests)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    browser.wait_for("document.documentElement.dataset.server == 'gone'")


def test_it_is_served_to_this_machine_alone(watched):
    process, address = watched
    listening = [
        found for found in psutil.Process(process.pid).net_connections() if found.status == psutil.CONN_LISTEN
    ]
    assert [found.laddr.ip for found in listening] == ["127.0.0.1"]
    port = listening[0].laddr.port
    assert address == f"http://127.0.0.1:{port}/"
    for path, host, status in (
        ("/", None, 200),
        ("/", "evil.example", 403),
        ("/../metrics.jsonl", None, 404),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", path, headers={"Host": host} if host else {})
        assert connection.getresponse().status == status, (path, host)
        connection.close()


def test_where_it_cannot_be_served_one_line_says_so(runs, capsys, monkeypatch):
    request = ["report", "--run", "tracked", "--set", f"paths.runs={runs}", "--watch", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([*request, port]) == 2
    assert f"--port {port}: cannot be used" in capsys.readouterr().err
    monkeypatch.setenv("RECIPE_NETWORK", "none")  # as in a container
    assert main([*request, "0"]) == 2 and "expected RUNTIME=host" in capsys.readouterr().err
