"""An export reaches a hub private unless agreed otherwise, whole, checked, each byte once, and nothing else with it."""

import io
import os
import shutil
import subprocess
import sys

import pytest

from recipe.errors import Refused, UserError
from recipe.export.contents import PROOF
from recipe.export.publish import publish, render
from recipe.files import read_json, sha256_of, write_json
from tests.export.finished import LLAMA_LICENCE, finished_run, tree
from tests.export.upload_hub import GOOD_TOKEN, READ_ONLY_TOKEN, UploadHub
from tests.train.tiny_run import ROOT, flip_a_byte, wait_for

REPO = "me/poet"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(finished_run() / "adapters", tmp_path / "runs" / "poet" / "adapters")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with UploadHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "RECIPE_NETWORK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        yield hub


def listed(folder):
    return {PROOF, *read_json(folder / PROOF)["sha256"]}


def relist(folder, *names):
    """As the export would have listed these files."""
    proof = read_json(folder / PROOF)
    proof["sha256"] |= {name: sha256_of(folder / name) for name in names}
    write_json(folder / PROOF, proof)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_private_verified_and_only_what_is_listed(folder, hub, capsys):
    (folder / "notes.txt").write_text("planted")
    (folder / ".secret").write_text("planted")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "README.md").write_text("planted")
    result = publish(folder, REPO)
    state = hub.state(REPO)
    assert state["private"] is True
    assert set(state["files"]) == listed(folder)
    assert all(hub.content(REPO, name) == (folder / name).read_bytes() for name in state["files"])
    assert result["verified"] and result["url"] == f"{hub.url}/{REPO}"
    assert result["sent_bytes"] == result["bytes"] > 0
    out, err = capsys.readouterr()
    assert out == "" and GOOD_TOKEN not in err
    assert "me/poet (private):" in err
    assert all(name in err for name in listed(folder))
    assert render(result).startswith(f"{hub.url}/{REPO}: private, ")


def test_a_second_call_sends_nothing_and_a_change_only_what_changed(folder, hub):
    publish(folder, REPO)
    asked, commits = len(hub.requests), hub.commits
    result = publish(folder, REPO)
    assert result["sent"] == [] and result["verified"]
    assert {method for method, _ in hub.requests[asked:]} == {"GET"} and hub.commits == commits
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    relist(folder, "README.md")
    stored = len(hub.stored)
    assert publish(folder, REPO)["sent"] == ["README.md", PROOF]
    assert len(hub.stored) == stored, "the weights were sent again"


def test_killed_in_the_middle_it_goes_on(folder, hub):
    """One of three large files stalls; the process is killed; what has come is not sent again."""
    for number in range(2):
        (folder / f"model-{number}.safetensors").write_bytes(os.urandom(2**18))
    relist(folder, "model-0.safetensors", "model-1.safetensors")
    hub.stalls = sha256_of(folder / "model-1.safetensors")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    code = f"from pathlib import Path; from recipe.export.publish import publish; publish(Path({str(folder)!r}), {REPO!r})"
    sender = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: hub.stalled and len(hub.stored) == 2, sender)
    finally:
        sender.kill()
        sender.wait()
    assert hub.state(REPO)["files"] == {}
    before, hub.stalls = list(hub.stored), None
    assert publish(folder, REPO)["verified"]
    assert hub.stored[:2] == before and hub.stored[2:] == [sha256_of(folder / "model-1.safetensors")]
    assert set(hub.state(REPO)["files"]) == listed(folder)


def test_a_dry_run_shows_all_and_asks_nobody(folder, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = publish(folder, REPO, public=True, dry_run=True)
    assert hub.requests == []
    text = render(result)
    assert all(name in text for name in listed(folder))
    assert "would go to me/poet (PUBLIC: everybody can read it):" in text and "nothing was sent" in text


def test_public_is_asked_for(folder, hub, monkeypatch, capsys):
    with pytest.raises(UserError, match="--public: everybody could read me/poet, and there is no terminal"):
        publish(folder, REPO, public=True)
    for answer in ("", "no\n", "y\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(Refused, match="not confirmed; nothing was sent"):
            publish(folder, REPO, public=True)
    assert hub.requests == []
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", Terminal("poet\n"))
    assert publish(folder, REPO, public=True)["verified"]
    err = capsys.readouterr().err
    assert err.index("adapter_model.safetensors") < err.index("Type its name"), "asked before it was shown"
    assert hub.state(REPO)["private"] is False
    monkeypatch.undo()


def test_public_without_a_terminal_by_yes(folder, hub):
    publish(folder, "me/other", public=True, assume_yes=True)
    assert hub.state("me/other")["private"] is False


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_that_is_the_other_way_is_left_alone(public, folder, hub):
    hub.save(REPO, {"private": public, "files": {}})
    said = "is a private repository" if public else "is a public repository"
    with pytest.raises(UserError, match=f"{said}, .* was asked for; nothing was sent"):
        publish(folder, REPO, public=public, assume_yes=True)
    assert hub.state(REPO) == {"private": public, "files": {}}


def test_a_repository_that_turns_out_public_gets_nothing(folder, hub):
    hub.ignores_private = True
    with pytest.raises(UserError, match="is a public repository"):
        publish(folder, REPO)
    assert hub.state(REPO)["files"] == {} and hub.stored == []


def refusal(folder, repo=REPO):
    with pytest.raises(UserError) as caught:
        publish(folder, repo)
    said = str(caught.value)
    assert "\n" not in said and "hf_" not in said
    return said


def test_no_token(folder, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub, expected HF_TOKEN" in refusal(folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_wrongwrongwrongwrong", REPO, "the hub does not take the token"),
        (READ_ONLY_TOKEN, REPO, "the token may not write there (token *** has no write access)"),
        (GOOD_TOKEN, "you/poet", "it needs the right to write to you"),
    ],
)
def test_a_token_that_may_not(token, repo, said, folder, hub, monkeypatch, capfd):
    """The hub's own message repeats the token; ours must not."""
    monkeypatch.setenv("HF_TOKEN", token)
    assert said in refusal(folder, repo)
    assert "hf_" not in "".join(capfd.readouterr())
    assert hub.stored == [] and hub.commits == 0


def test_a_hub_that_is_not_there(folder, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the hub was not reached" in refusal(folder)


def test_no_network_by_design(folder, hub, monkeypatch):
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    assert "this container has no network, by design; use RUNTIME=host" in refusal(folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo", ["poet", "a/b/c", "me/po et", "me/", "me/a--b", "-me/poet", "me/poet.git", ""]
)
def test_a_name_that_no_hub_takes(repo, folder, hub):
    assert "expected OWNER/NAME" in refusal(folder, repo)
    assert hub.requests == []


def test_the_name_of_a_llama_begins_with_llama(folder, hub):
    (folder / "LICENSE").write_text(LLAMA_LICENCE)
    relist(folder, "LICENSE")
    said = refusal(folder)
    assert "name not allowed: the Llama 3.1 Community License" in said and "such as me/Llama-poet" in said
    assert hub.requests == []
    found = publish(folder, "me/Llama-3.1-poet", dry_run=True)
    assert "Built with Llama" in render(found) and "has to travel along" not in render(found)


def test_a_licence_that_does_not_travel_is_missed(folder, hub):
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: llama3.1\n", 1))
    relist(folder, "README.md")
    (folder / "LICENSE").write_text(LLAMA_LICENCE)  # not of the export, so it would not be sent
    assert "its text has to travel along" in render(publish(folder, "me/Llama-poet", dry_run=True))


def test_a_damaged_file_is_not_sent(folder, hub):
    flip_a_byte(folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors: is not as it was verified" in refusal(folder)
    assert hub.requests == []


def test_what_the_hub_has_in_the_end_is_compared(folder, hub):
    hub.spoils = "tokenizer_config.json"
    with pytest.raises(Refused, match=r"1 of .* not there as sent \(first: tokenizer_config\.json\)"):
        publish(folder, REPO)


def test_other_files_of_the_repository_stay_and_are_named(folder, hub):
    hub.keep("c" * 40, b"old")
    hub.save(REPO, {"private": True, "files": {"old.bin": {"oid": "c" * 40, "size": 3, "lfs": None}}})
    result = publish(folder, REPO)
    assert result["others"] == ["old.bin"] and "1 other files stay there (old.bin)" in render(result)
    assert hub.content(REPO, "old.bin") == b"old"


def test_publishing_changes_nothing_here(folder, hub):
    before = tree(folder)
    publish(folder, REPO)
    assert tree(folder) == before
