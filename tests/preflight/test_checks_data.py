"""Checks of what a run reads: model files, hashes, tokenizer, data, lengths, token, hub. Files are real."""

import contextlib
import dataclasses
import http.server
import json
import os
import threading
from pathlib import Path

import pytest

from recipe.preflight import inputs
from recipe.prepare import RECORD
from tests.preflight.situation import context, found_broken

LONG = {"sample": 200, "over": 30, "mean": 900.0, "longest": 4000.0}


def prepared_in(folder):
    """A checkpoint's folder as `prepare` leaves it: weights with a header, config, record."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    sizes = {p.name: {"bytes": p.stat().st_size, "sha256": ""} for p in folder.iterdir()}
    (folder / RECORD).write_text(json.dumps({"files": sizes}))
    return folder


@contextlib.contextmanager
def answering():
    """A hub that answers every question, with 404."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def nobody(folder, monkeypatch):
    """No token, no hub of one's own, and no proxy on the way to this machine."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_OFFLINE", "RECIPE_NETWORK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(folder))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")


def half_a_copy(folder, monkeypatch):
    yield context(prepared=prepared_in(folder))
    os.truncate(folder / "model.safetensors", 9)
    yield context(prepared=folder)


def token_gone(folder, monkeypatch):
    nobody(folder, monkeypatch)
    (folder / "token").write_text("hf_secret")
    yield context()
    (folder / "token").unlink()
    yield context()


def hub_gone(folder, monkeypatch):
    nobody(folder, monkeypatch)
    with answering() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield context()
    yield context()


BROKEN = {
    "half a copy": (inputs.model, half_a_copy, "fail", "has 9 bytes, expected", "make prepare"),
    "no token": (inputs.token, token_gone, "warn", "none", "hf auth login"),
    "hub gone": (inputs.hub, hub_gone, "fail", "refused", "HTTPS_PROXY"),
    "template": (
        inputs.chat_template,
        {"data": {"chat_template": "nowhere.jinja"}},
        "fail",
        "nowhere.jinja",
        "data.chat_template",
    ),
    "no data": (inputs.data, {"data": {"path": "nowhere.jsonl"}}, "fail", "no such file", "JSONL"),
    "other content": (inputs.hashes, {"prepared": Path("models/NAME-nf4"),
                                       "reading": {"hashes": {"files": 4, "verified": 4, "wrong": ["model.safetensors"]}}},
                      "fail", "model.safetensors: another content", "make prepare"),
    "no template": (inputs.tokenizer, {"reading": {"tokenizer": {"problem": "row 1: has no chat template"}}}, "fail",
                    "no chat template", "data.chat_template"),
    "reading dies": (inputs.tokenizer, {"reading": {"error": "the test process ended with -9"}}, "fail", "-9", "dmesg"),
    "too long": (inputs.lengths, {"reading": {"lengths": LONG | {"by": "the tokenizer"}}}, "fail", "15% over",
                 "data.max_length"),
    "too long by estimate": (inputs.lengths, {"reading": {"lengths": LONG | {"by": "characters / 4"}}}, "warn",
                             "15% over", "data.max_length"),
    "bad row": (inputs.data, {"data": {"path": "demo"}, "reading": {"rows": {"problem": "x.jsonl:7: not valid JSON"}}},
                "fail", "x.jsonl:7", "JSONL"),
    "endless data": (inputs.data, {"data": {"path": "demo"}, "reading": {"error": "no answer within 30 s"}}, "warn",
                     "no answer within 30 s", "large file"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "broken", "status", "found", "remedy"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_found(check, broken, status, found, remedy, tmp_path, monkeypatch):
    found_broken(check, broken, status, found, remedy, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("content", "status", "part"),
    [
        (b'{"text": "a"}\n', "ok", "begins with a good row"),
        (b'\n\n{"text": "a"}\nnot looked at', "ok", "begins with a good row"),
        (b"", "fail", "has no rows"),
        (b"{text: a}\n", "fail", ":1: not valid JSON"),
        (b"[1]\n", "fail", ":1: is list, expected a JSON object"),
        (b"\xff\xfe", "fail", "not UTF-8"),
    ],
)
def test_data_files(tmp_path, content, status, part):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    result = inputs.data(context(data={"path": str(path)}, reading={"skipped": "quick"}))
    assert result.status == status and part in result.found


def test_data_elsewhere():
    assert inputs.data(context()).status == "skip"
    assert inputs.data(context(data={"path": "demo"})).status == "ok"
    assert inputs.data(context(data={"path": "someone/rows"})).status == "skip"
    assert inputs.data(context(data={"path": "/"})).status == "fail"


@pytest.fixture
def prepared(tmp_path):
    return prepared_in(tmp_path)


def test_a_prepared_model_is_fine(prepared):
    result = inputs.model(context(prepared=prepared))
    assert result.status == "ok" and "1 weight file," in result.found and result.measured > 0
    assert inputs.model(context(prepared=prepared / "x-nf4")).status == "skip"


def cut_short(folder):
    (folder / RECORD).unlink()
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def no_header(folder):
    (folder / RECORD).unlink()
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")


DAMAGE = {
    "cut short, no record": (cut_short, "its header says"),
    "no safetensors at all": (no_header, "is no safetensors file"),
    "another size": (lambda folder: os.truncate(folder / "model.safetensors", 9), "has 9 bytes, expected"),
    "a file is gone": (lambda folder: (folder / "config.json").unlink(), "config.json are missing"),
    "the record is damaged": (lambda folder: (folder / RECORD).write_text("{"), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_found_without_reading_it(prepared, name):
    damage, part = DAMAGE[name]
    damage(prepared)
    result = inputs.model(context(prepared=prepared))
    assert result.status == "fail" and part in result.found and "make prepare" in result.remedy


def test_hashes_that_the_time_did_not_allow_are_said():
    result = inputs.hashes(context(reading={"hashes": {"files": 9, "verified": 3, "wrong": []}}))
    assert (result.status, result.found) == ("ok", "3 of 9 files verified in the time allowed")
    assert (
        inputs.hashes(context(reading={"hashes": {"files": 0, "verified": 0, "wrong": []}})).status == "skip"
    )


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    nobody(tmp_path, monkeypatch)
    return tmp_path


def test_a_token_is_asked_for_where_a_model_must_be_fetched_and_never_shown(no_token, monkeypatch, prepared):
    without = inputs.token(context())
    assert (without.status, without.found) == ("warn", "none") and "hf auth login" in without.remedy
    assert inputs.token(context(host={"hub_token": True})).status == "ok", "a container's host may have it"
    (no_token / "token").write_text("hf_secret")
    found = [inputs.token(context())]
    (no_token / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found.append(inputs.token(context()))
    assert [check.status for check in found] == ["ok", "ok"] and "secret" not in str(found)
    assert inputs.token(context(model="demo")).status == "skip"
    assert inputs.token(context(prepared=prepared)).status == "skip"


def test_the_hub_is_tried_only_where_it_is_needed(no_token, monkeypatch):
    with answering() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert inputs.hub(context()).status == "ok"  # any answer shows that the way is open
    monkeypatch.setenv("HF_ENDPOINT", "http://name:secret@127.0.0.1:9")
    gone = inputs.hub(context())
    assert gone.status == "fail" and "HTTPS_PROXY" in gone.remedy and "secret" not in gone.found
    assert inputs.hub(context(model="demo", data={"path": "someone/rows"})).status == "fail"
    assert inputs.hub(context(model="demo", data={"path": "demo"})).status == "skip"
    assert inputs.hub(dataclasses.replace(context(), quick=True)).status == "skip"
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    assert "no network, by design" in inputs.hub(context()).found
    monkeypatch.delenv("RECIPE_NETWORK")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert inputs.hub(context()).status == "fail"
