"""The server, driven by the official client of OpenAI: two models, a key, streams, limits, and its end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest
import xllamacpp

from recipe.cli import main
from recipe.errors import UserError
from recipe.serve import app, server
from recipe.serve.check import self_check
from recipe.serve.llama import Files
from tests.export.finished import finished_run
from tests.serve.conftest import CONTEXT_TOKENS, KEY, NAME

QUESTION = [{"role": "user", "content": "Tell me a long story about a fox."}]
LONG = {"messages": [{"role": "user", "content": "Count from 1 to 1000."}], "seed": 1, "temperature": 1.5}


def text_of(answer) -> str:
    return answer.choices[0].message.content


def greedy(client, model: str, tokens: int = 16, **more):
    return client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=tokens, temperature=0, **more
    )


@pytest.fixture(scope="module")
def alone(served):
    """Greedy answers of llama.cpp itself, without a line of ours before it: {model: text}."""
    found = {}
    for name, lora in (("base", None), (NAME, served.files.lora)):
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.fit_params, asked.verbosity = (
            str(served.files.base),
            512,
            False,
            0,
        )
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)] if lora else []
        answer = xllamacpp.Server(asked).handle_chat_completions(
            {"messages": QUESTION, "max_tokens": 16, "temperature": 0}
        )
        found[name] = answer["choices"][0]["message"]["content"]
    assert found["base"] != found[NAME]
    return found


@pytest.mark.parametrize("model", ["base", NAME])
def test_each_model_gives_its_own_greedy_answer_streamed_or_not(model, served, alone):
    whole = greedy(served.client, model)
    assert text_of(whole) == alone[model] and whole.model == model
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 16
    stream = list(greedy(served.client, model, stream=True, stream_options={"include_usage": True}))
    assert len(stream) > 10 and {part.model for part in stream} == {model}
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == alone[model]
    assert stream[-1].usage.completion_tokens == 16


def test_a_client_cannot_make_the_base_another_model(served, alone):
    asked = {"extra_body": {"lora": [{"id": 0, "scale": 0}]}}
    assert text_of(greedy(served.client, NAME, **asked)) == alone[NAME]


def test_the_models_and_the_form_of_questions_are_listed(served):
    found = served.client.models.list()
    assert [model.id for model in found.data] == ["base", NAME]
    assert found.form == {"messages": True, "system": None}


def test_sampling_stops_and_logprobs_are_passed_on(served):
    client = served.client
    answers = [
        text_of(
            client.chat.completions.create(model="base", max_tokens=12, top_p=0.9, **(LONG | {"seed": seed}))
        )
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    continued = client.completions.create(
        model="base", prompt="1, 2, 3, 4,", max_tokens=20, temperature=0, stop="7"
    )
    assert continued.choices[0].text.endswith("6, ") and continued.choices[0].finish_reason == "stop"
    scored = greedy(client, "base", tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(scored) == 3
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in scored)


def test_without_the_key_nothing_is_told(served):
    for key in ("another", KEY + "x", "ключ"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)) as caught:
            openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0).models.list()
        if caught.type is openai.AuthenticationError:
            assert caught.value.code == "invalid_api_key" and caught.value.status_code == 401
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
    ):
        assert send(served, method, path, b"{}", key=None)[0] == 401
    assert send(served, "GET", "/health", key=None)[::2] == (200, b'{"status":"ok"}')


def test_a_wrong_request_is_an_error_of_openais_form(served):
    client = served.client
    with pytest.raises(openai.NotFoundError) as caught:
        greedy(client, "another")
    assert caught.value.code == "model_not_found"
    assert f"there is no model 'another' here, only base and {NAME}" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.completions.create(model="base", prompt="word " * CONTEXT_TOKENS * 2)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="base", messages="no list")
    with pytest.raises(openai.APIStatusError, match="more than 1,048,576 bytes") as too_large:
        client.completions.create(model="base", prompt="x" * app.MOST_BYTES)
    assert too_large.value.status_code == 413
    for content, said in (
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 200_000, "not valid"),
    ):
        status, _, answer = send(served, "POST", "/v1/completions", content)
        assert status == 400 and said in json.loads(answer)["error"]["message"]
    status, _, answer = send(served, "GET", "/v1/files")
    assert status == 404 and json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_a_page_of_another_site_reaches_nothing(served):
    port = urlsplit(served.address).port
    for host in ("evil.example", f"evil.example:{port}"):
        assert send(served, "GET", "/", host=host)[0] == 400
        assert send(served, "GET", "/v1/models", host=host)[0] == 400
    assert send(served, "GET", "/", host=f"localhost:{port}")[0] == 200
    for method in ("GET", "OPTIONS"):
        _, headers, _ = send(served, method, "/v1/models", origin="http://evil.example")
        assert not [name for name in headers if name.lower().startswith("access-control")]


def send(served, method, path, content=None, key: str | None = KEY, host=None, origin=None):
    """(status, headers, body) of one request, put together by hand."""
    headers = {"Host": host} if host else {}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"Origin": origin} if origin else {}
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=30)
    connection.request(method, path, content, headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_base_and_tuned_answer_at_the_same_time(served, alone):
    """Neither waits for the other's end; nor do more clients than one model has places break anything."""
    marks: dict[int, list[float]] = {}
    texts: dict[int, str] = {}

    def ask(number: int, tokens: int) -> None:
        marks[number], texts[number] = [], ""
        for part in greedy(served.client, ("base", NAME)[number % 2], tokens, stream=True):
            marks[number].append(time.monotonic())
            texts[number] += part.choices[0].delta.content or ""

    for numbers, tokens in ((range(2), 64), (range(2, 6), 16)):
        threads = [threading.Thread(target=ask, args=(number, tokens)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(marks[0][1], marks[1][1]) < min(marks[0][-1], marks[1][-1])
    assert all(texts[number].startswith(alone[name]) for number, name in enumerate(("base", NAME)))
    assert [texts[number] for number in range(2, 6)] == [alone["base"], alone[NAME]] * 2


@pytest.mark.parametrize("streamed", [True, False])
def test_the_work_for_a_client_that_goes_away_ends(streamed, served):
    """As many long answers as there are places are left alone; a short one then has a place at once."""
    body = {"model": "base", "prompt": "Once upon a time", "ignore_eos": True, "stream": streamed}
    request = json.dumps(body).encode()
    for _ in range(server.SEQUENCES):
        connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=30)
        connection.request("POST", "/v1/completions", request, {"Authorization": f"Bearer {KEY}"})
        if streamed:
            assert connection.getresponse().read(6) == b"data: "
        else:
            time.sleep(0.3)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    # Nothing but the end of the context would end them.
    began = time.monotonic()
    served.client.completions.create(model="base", prompt="a", max_tokens=1)
    short = time.monotonic() - began
    began = time.monotonic()
    served.client.completions.create(model="base", prompt="a", max_tokens=60, extra_body={"ignore_eos": True})
    assert short < time.monotonic() - began


def test_it_asks_itself_before_it_is_ready(served, alone):
    """A wrong template, adapter or base shows: other answers than the reference's."""
    question = QUESTION[0]["content"]
    expected = [(question, alone[NAME]), (question, alone["base"])]
    form = server.CHAT
    assert self_check(served.address, KEY, NAME, expected, form, answer_tokens=16) == 1
    assert self_check(served.address, KEY, "base", expected[:1], form, answer_tokens=16) == 0
    rude = form | {"system": "Answer in capital letters, in French."}
    assert self_check(served.address, KEY, NAME, expected, rude, answer_tokens=16) == 0
    plain = {"messages": False, "system": None}
    assert self_check(served.address, KEY, NAME, expected, plain, answer_tokens=16) == 0
    assert self_check(served.address, KEY, NAME, [("word " * 2000, "x")], form) == 0


def test_a_taken_port_is_one_line(served):
    port = urlsplit(served.address).port
    for number, said in ((port, "Address already in use"), (99999, "0-65535")):
        said = rf"^--port {number}: cannot be used \(.*{said}.*\), expected a free"
        with pytest.raises(UserError, match=said), server.listening(number):
            pass


@pytest.mark.parametrize("key", ["short", "with space 123", "ключключ", "a/b?c=d&e#"])
def test_a_key_that_cannot_be_sent_is_one_line(key, monkeypatch):
    monkeypatch.setenv(server.KEY_VARIABLE, key)
    with pytest.raises(UserError, match=r"^RECIPE_SERVE_KEY: expected at least 8") as caught:
        server.chosen_key()
    assert key not in str(caught.value)


def test_a_file_that_llama_cpp_cannot_load_is_one_line(gguf_files, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_files.base.read_bytes()[:20_000_000])
    for files, said in (
        (Files(tmp_path / "none.gguf"), r"none\.gguf: no such file"),
        (Files(cut), r"cut\.gguf: llama\.cpp cannot load it"),
        (Files(gguf_files.base, cut), r"with .*cut\.gguf: llama\.cpp cannot load it"),
    ):
        with (
            pytest.raises(UserError, match=said),
            server.listening(0) as listener,
            server.serving(listener, files, NAME, KEY, server.CHAT, CONTEXT_TOKENS),
        ):
            pass


@pytest.fixture
def runs(tmp_path):
    """A folder of runs with a real finished one."""
    shutil.copytree(finished_run(), tmp_path / "runs" / NAME)
    return tmp_path / "runs"


def test_the_command_makes_what_it_needs_asks_itself_and_ends_soon_at_ctrl_c(runs):
    """A process of its own, whose key stands in the address that it prints; an answer is under way when it is stopped."""
    command = [sys.executable, "-m", "recipe", "serve", "--run", NAME, "--port", "0", "--type", "f16"]
    process = subprocess.Popen(
        [*command, "--set", f"paths.runs={runs}"],
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != server.KEY_VARIABLE},
    )
    try:
        lines = [process.stderr.readline()]
        while lines[-1] and "/#key=" not in lines[-1]:
            lines.append(process.stderr.readline())
        address, _, key = lines.pop().strip().partition("/#key=")
        assert len(key) >= 32, lines
        assert {path.name for path in (runs / NAME / "exports").iterdir()} == {"gguf-base-f16", "gguf-lora"}
        assert lines[-1] == "10 of 10 greedy answers are the reference's\n"
        assert f"shows {NAME} beside its base" in process.stderr.readline()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        stream = client.completions.create(
            model=NAME, prompt="One", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=15)[1]
        assert process.returncode == 130
        assert rest == "stopped\n"
    finally:
        process.kill()


def test_what_cannot_be_served_is_one_line(runs, capsys):
    def refused(*words: str) -> str:
        assert main(["serve", "--run", NAME, "--set", f"paths.runs={runs}", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1
        return err

    assert "--type q3: unknown quantisation, expected one of" in refused("--type", "q3")
    assert "--json: serve prints no document" in refused("--json")
    with server.listening(0) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be used" in refused("--port", port)
    (runs / NAME / "summary.json").unlink()
    assert "is not finished; go on with `make train RUN=first`" in refused()


def test_a_container_without_a_network_says_so(gguf_files, monkeypatch):
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    with pytest.raises(UserError, match="no network, expected RUNTIME=host"):
        server.serve(gguf_files, NAME, 0)
