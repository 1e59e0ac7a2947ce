"""Models from a hub: resumed, watched, checked, and refused in one line; the hub is one of our own (fake_hub.py)."""

import contextlib
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from recipe.errors import UserError
from recipe.prepare import download, prepare
from tests.models import PRELOADED
from tests.prepare.fake_hub import settings_for, weights_of

TOKEN = "hf_OnlyForThisTestAndVerySecret"


def refusal(settings):
    with pytest.raises(UserError) as caught:
        prepare(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_model_is_what_the_folder_gives_and_stays(hub, expected, tmp_path):
    prepared = prepare(settings_for(tmp_path, revision="v1"))
    assert weights_of(prepared.folder) == expected
    assert prepared.name == "org/tiny" and prepared.revision == "v1"
    assert prepared.rates["stages"]["download"]["bytes"] == sum(
        p.stat().st_size for p in hub.folder.glob("*.safetensors")
    )
    kept = tmp_path / "models" / "org--tiny"
    assert weights_of(kept) == weights_of(hub.folder)
    assert not list((kept / ".hub").glob("*.part"))

    shutil.rmtree(prepared.folder)
    asked = len(hub.requests)
    again = prepare(settings_for(tmp_path, revision="v1"))
    assert weights_of(again.folder) == expected
    assert [r.file for r in hub.requests[asked:]] == ["listing"]


def test_the_licence_and_what_names_it_come_along(hub, tmp_path):
    """Many bases state their licence in the front matter of their README alone."""
    papers = {
        "LICENSE": "theirs",
        "USE_POLICY.md": "be good",
        "NOTICE": "of",
        "README.md": "---\nlicense: mit\n---\n",
    }
    for name, text in papers.items():
        (hub.folder / name).write_text(text)
    folder = prepare(settings_for(tmp_path, keep=False)).folder
    assert {name: (folder / name).read_text() for name in papers} == papers


def test_a_file_of_another_commit_is_fetched_again_and_the_others_are_not(hub, tmp_path):
    shutil.rmtree(prepare(settings_for(tmp_path)).folder)
    changed = sorted(hub.folder.glob("*.safetensors"))[1]
    content = bytearray(changed.read_bytes())
    content[-5] ^= 1
    changed.write_bytes(content)
    hub.commit = "d" * 40
    asked = len(hub.requests)
    prepare(settings_for(tmp_path))
    assert {r.file for r in hub.requests[asked:]} == {"listing", changed.name}
    assert weights_of(tmp_path / "models" / "org--tiny") == weights_of(hub.folder)


def test_a_cut_connection_is_gone_on_with_at_the_byte_where_it_broke(hub, expected, tmp_path):
    name = sorted(weights_of(hub.folder))[0]
    hub.cuts[name] = 65536
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    assert [r.first for r in hub.bodies() if r.file == name] == [0, 65536]


def test_a_stall_is_noticed_and_the_download_goes_on(hub, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "STALL_SECONDS", 3.0)
    name = sorted(weights_of(hub.folder))[0]
    hub.stalls[name] = [65536]
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    said = [line for line in capsys.readouterr().err.splitlines() if "no bytes" in line]
    assert said == [
        f"model.id is `org/tiny`: no bytes of {name} for 3 s; going on over plain HTTP, without Xet"
    ]


def test_a_silent_xet_server_is_given_up_for_plain_http(hub, expected, tmp_path, monkeypatch, capsys):
    """The known way in which a download hangs for ever: hf_xet waits, and no timeout of Python's ends it."""
    monkeypatch.setattr(download, "STALL_SECONDS", 4.0)
    hub.xet_is_silent = True
    assert weights_of(prepare(settings_for(tmp_path, keep=False)).folder) == expected
    assert "xet" in {r.file for r in hub.requests}  # it was tried
    said = [line for line in capsys.readouterr().err.splitlines() if "no bytes" in line]
    assert len(said) == 1 and said[0].endswith("; going on over plain HTTP, without Xet")


def test_a_second_stall_ends_in_one_line_and_the_next_run_goes_on_there(hub, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 3.0)
    name = sorted(weights_of(hub.folder))[0]
    hub.stalls[name] = [65536, 131072]
    message = refusal(settings_for(tmp_path))
    assert f"no bytes of {name} for 3 s, over plain HTTP too" in message and "run it again" in message
    asked = len(hub.requests)
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    (rest,) = [r for r in hub.requests[asked:] if r.file == name and r.method == "GET"]
    assert rest.first == 131072


def test_a_flipped_byte_is_found_by_the_hash_that_the_hub_states(hub, expected, tmp_path):
    name = sorted(weights_of(hub.folder))[1]
    hub.flipped.add(name)
    message = refusal(settings_for(tmp_path))
    assert f"{name} has the sha256" in message and "the hub states" in message and "run it again" in message
    assert not (tmp_path / "models" / "org--tiny" / name).exists()
    hub.flipped.clear()
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected


def test_hashes_come_from_the_files_where_the_listing_has_none(hub, tmp_path):
    hub.lists_hashes = False
    hub.flipped.add(sorted(weights_of(hub.folder))[1])
    assert "has the sha256" in refusal(settings_for(tmp_path))


def test_a_gated_model_names_the_page_of_its_licence(hub, tmp_path):
    hub.gated = True
    message = refusal(settings_for(tmp_path))
    assert "accept it at https://huggingface.co/org/tiny, then set HF_TOKEN" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"revision": "v9"}, "no revision `v9` there, expected a commit, tag or branch"),
        ({"model": "org/other"}, "no such model on the hub"),
    ],
)
def test_what_is_not_there_is_named(hub, tmp_path, options, expected):
    assert expected in refusal(settings_for(tmp_path, **options))


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    config = (hub.folder / "config.json").read_text()
    (hub.folder / "config.json").write_text(config.replace("llama", "gpt2").replace("Llama", "GPT2"))
    assert "gpt2" in refusal(settings_for(tmp_path)).lower()
    assert not hub.bodies()


def test_weights_that_do_not_fit_the_config_are_refused_before_they_are_fetched(hub, tmp_path):
    config = (hub.folder / "config.json").read_text()
    (hub.folder / "config.json").write_text(
        config.replace('"intermediate_size": 128', '"intermediate_size": 256')
    )
    assert "weights and config are of different models" in refusal(settings_for(tmp_path))
    assert not list((tmp_path / "models").rglob("model-*.safetensors.*part"))
    assert not list((tmp_path / "models" / "org--tiny").glob("*.safetensors"))


def test_without_network_what_an_earlier_call_has_fetched_is_enough(hub, expected, tmp_path, monkeypatch):
    shutil.rmtree(prepare(settings_for(tmp_path)).folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    assert "could not be reached" in refusal(settings_for(tmp_path, model="org/other"))


@pytest.mark.parametrize("where", ["environment", "file"])
@pytest.mark.parametrize("status", [403, 500])
def test_the_token_is_sent_and_never_shown(hub, tmp_path, monkeypatch, capfd, where, status):
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (tmp_path / "token").write_text(TOKEN + "\n")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.refuses = status, "what is TOKEN, said the hub to Bearer TOKEN"
    message = refusal(settings_for(tmp_path))
    hub.refuses, hub.gated = None, True
    message += refusal(settings_for(tmp_path))
    assert {r.token for r in hub.requests} == {TOKEN}
    captured = capfd.readouterr()
    written = "".join(p.read_text(errors="ignore") for p in (tmp_path / "models").rglob("*") if p.is_file())
    for text in (message, captured.out, captured.err, written):
        assert TOKEN not in text and TOKEN[3:] not in text


def test_the_token_stays_with_the_hub_when_it_sends_to_another_host(hub, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.redirects, hub.lists_hashes = True, False
    hub.cuts[sorted(weights_of(hub.folder))[0]] = 65536
    assert weights_of(prepare(settings_for(tmp_path)).folder) == expected
    sent = [r for r in hub.requests if r.file.startswith("cdn/")]
    assert len(sent) >= 4 and {r.token for r in sent} == {None}
    assert 65536 in {r.first for r in sent}


def prepare_at(settings, url):
    from huggingface_hub import constants

    constants.ENDPOINT = url
    prepare(settings)


def downloads(models):
    """Process ids of downloads that have files of this folder open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(models) in os.readlink(link):
                found.add(int(link.parts[2]))
    return found


def test_a_killed_prepare_leaves_no_download_behind_and_the_next_goes_on_with_its_part(
    hub, expected, tmp_path
):
    name = sorted(weights_of(hub.folder))[0]
    hub.stalls[name] = [131072]
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(
        target=prepare_at, args=(settings_for(tmp_path, keep=False), hub.url)
    )
    process.start()
    wait_for(lambda: any(r.file == name and r.sent >= 131072 for r in hub.bodies()))
    wait_for(lambda: downloads(tmp_path / "models"))
    process.kill()
    process.join()
    wait_for(lambda: not downloads(tmp_path / "models"))
    asked = len(hub.requests)
    assert weights_of(prepare(settings_for(tmp_path, keep=False)).folder) == expected
    assert [r.first for r in hub.requests[asked:] if r.file == name and r.method == "GET"] == [131072]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("token", ["hf_with\x07bell_inside", "hf_wïth_umlaut", "no prefix at all"])
def test_a_token_that_no_header_can_hold_is_not_shown_either(hub, tmp_path, monkeypatch, capfd, token):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.gated = True
    message = refusal(settings_for(tmp_path))
    captured = capfd.readouterr()
    for text in (message, captured.out, captured.err):
        assert token not in text and "bell_inside" not in text and "th_umlaut" not in text
