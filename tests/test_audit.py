"""`make audit` asks about every locked version, says what is known, and never takes silence for an answer.

With the real pip-audit, and a small service on this machine that speaks OSV.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOLE = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "aliases": ["CVE-2030-1234"],
    "summary": "Reading an array runs code",
    "published": "2030-01-01T00:00:00Z",
    "modified": "2030-01-01T00:00:00Z",
}


def advisory(package: str, fixed: str | None) -> dict:
    events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
    ranges = [{"type": "ECOSYSTEM", "events": events}]
    return HOLE | {"affected": [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": ranges}]}


@pytest.fixture
def osv():
    """A service on 127.0.0.1: `holes` by package name, the (name, version) pairs `asked`, and its `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            server.asked.append((name, query["version"]))
            found = server.holes.get(name)
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(json.dumps({"vulns": [found]} if found else {}).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.holes, server.asked, server.status = {}, [], 200
    server.url = f"http://127.0.0.1:{server.server_port}/v1/query"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def audit(url: str, *options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OSV_URL": url, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "scripts/audit.py"), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def locked() -> set[tuple[str, str]]:
    text = "".join((ROOT / f"requirements-{flavour}.lock").read_text() for flavour in ("cpu", "gpu"))
    return set(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_every_locked_version_is_asked_about(osv):
    """Also the numpy that this Python does not take, and the CUDA libraries that this machine has not."""
    done = audit(osv.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"audit: no known vulnerabilities in {len(locked())} locked packages\n"
    assert set(osv.asked) == locked()
    assert len([name for name, _ in osv.asked if name == "numpy"]) == 2
    assert "nvidia-nccl-cu13" in dict(osv.asked)


def test_what_is_known_is_said_with_the_version_that_fixes_it(osv):
    osv.holes = {"torch": advisory("torch", "99.1"), "pytest": advisory("pytest", None)}
    done = audit(osv.url)
    assert done.returncode == 1
    told = done.stdout.splitlines()
    versions = dict(locked())
    names = "CVE-2030-1234 GHSA-aaaa-bbbb-cccc"
    assert f"torch=={versions['torch']} (run time): {names}, fixed in 99.1" in told
    assert f"pytest=={versions['pytest']} (development): {names}, fixed in no version yet" in told
    assert told.count("    Reading an array runs code") == 2
    assert told[-1].startswith("audit: 2 known vulnerabilities in ")


def test_both_locked_versions_of_one_package_are_named(osv):
    osv.holes = {"numpy": advisory("numpy", "99.1")}
    done = audit(osv.url)
    found = re.findall(r"^numpy==(\S+)", done.stdout, re.MULTILINE)
    assert sorted(found) == sorted(version for name, version in locked() if name == "numpy")


def test_an_ignored_vulnerability_does_not_fail_the_audit(osv):
    osv.holes = {"torch": advisory("torch", "99.1")}
    assert audit(osv.url, "--ignore-vuln", "CVE-2030-1234").returncode == 0


def test_no_service_is_one_line_and_exit_code_2():
    with socket.socket() as held:  # its port is nobody else's meanwhile, and nobody listens there
        held.bind(("127.0.0.1", 0))
        done = audit(f"http://127.0.0.1:{held.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1 cannot be reached, NewConnectionError" in done.stderr


def test_an_error_of_the_service_is_no_clean_answer(osv):
    osv.status = 503
    done = audit(osv.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "503 Server Error" in done.stderr


def test_a_wrong_option_is_said(osv):
    done = audit(osv.url, "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "audit: pip-audit: error: unrecognized arguments: --nonsense\n"


def test_packages_that_a_service_does_not_know_are_no_clean_answer(tmp_path):
    """Behind a proxy that answers 404 to everything, pip-audit itself says: no known vulnerabilities found."""
    fake = tmp_path / "pip_audit.py"
    fake.write_text('print(\'{"dependencies": [{"name": "torch", "skip_reason": "not found"}]}\')\n')
    command = [sys.executable, str(ROOT / "scripts/audit.py")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    env.pop("OSV_URL", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "PyPI: knows nothing of 1 packages, torch" in done.stderr
    assert "OSV: " in done.stderr
