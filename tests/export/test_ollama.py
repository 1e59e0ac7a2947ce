"""A Modelfile asks as the model was trained: its template writes what the tokenizer's own does, character by character."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import processors

from recipe.errors import Refused, UserError
from recipe.export import ollama
from recipe.export.ollama import chat_parts, check_name, create, modelfile
from tests.data.golden import TEMPLATES, tokenizer_for
from tests.export.go_template import execute

USER, MORE = {"role": "user", "content": "Rain?"}, {"role": "user", "content": 'And now?\n\nÄh {x} "y"'}
ANSWER, SYSTEM = (
    {"role": "assistant", "content": "No <b>rain</b>."},
    {"role": "system", "content": "Be short."},
)
TALKS = {
    "a question": [USER],
    "with a system message": [SYSTEM, MORE],
    "three turns": [USER, ANSWER, MORE],
    "five turns with a system message": [SYSTEM, USER, ANSWER, MORE, ANSWER, USER],
}


def tokenizer(name, puts_bos=True):
    """With a BOS before every text where the family's own does so: Ollama puts it, so the template must not."""
    found = tokenizer_for(*TEMPLATES[name])
    if puts_bos and found.bos_token:
        bos = (found.bos_token, found.bos_token_id)
        found.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    return found


@pytest.fixture
def folder(tmp_path):
    tokenizer("llama-3").save_pretrained(tmp_path)
    found = tokenizer("llama-3")
    ends = [found.eos_token_id, found.convert_tokens_to_ids("<|start_header_id|>")]
    generation = {"eos_token_id": ends, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.mark.parametrize("puts_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_writes_what_the_tokenizers_own_does(name, puts_bos):
    found = tokenizer(name, puts_bos)
    template = chat_parts(found).go()
    for talk in TALKS.values():
        expected = found.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        if puts_bos and found.bos_token:
            assert expected.startswith(found.bos_token)
            expected = expected.removeprefix(found.bos_token)
        assert execute(template, talk) == expected


def test_an_answer_that_is_begun_is_continued():
    written = execute(chat_parts(tokenizer("chatml")).go(), [USER, ANSWER])
    assert written == "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nNo <b>rain</b>."


CHATML = TEMPLATES["chatml"][0].read_text()
NO_TEMPLATE = {
    "today": ("{{ strftime_now('%d') }}" + CHATML, "today's date"),
    "counts": ("{{ messages | length }}" + CHATML, "otherwise"),
    "upper": (CHATML.replace("message.content", "message.content | replace('2', 'two')"), "otherwise"),
    "backwards": (CHATML.replace("in messages", "in messages[::-1]"), "in order"),
    "quotes": ('"""' + CHATML, '"""'),
    "refuses": ("{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML, "no system"),
    "none": (None, "no chat template"),
}


@pytest.mark.parametrize(("template", "said"), NO_TEMPLATE.values(), ids=NO_TEMPLATE.keys())
def test_what_go_cannot_say_is_left_to_the_gguf_file(template, said, tmp_path):
    found = tokenizer("chatml")
    found.chat_template = template
    with pytest.raises(UserError) as error:
        chat_parts(found)
    assert said in str(error.value)
    found.save_pretrained(tmp_path)
    text = modelfile("m.gguf", tmp_path, tmp_path, 512)
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf" and lines[1].startswith("# No TEMPLATE: ") and said in lines[1]
    assert "\nTEMPLATE" not in text and 'PARAMETER stop "<|im_end|>"' in lines


def test_the_modelfile(folder):
    text = modelfile("base.gguf", folder, folder, 2048, adapter="lora.gguf")
    head, template, tail = text.split('"""')
    assert head == "FROM ./base.gguf\nADAPTER ./lora.gguf\nTEMPLATE "
    assert template == chat_parts(tokenizer("llama-3")).go()
    assert tail.splitlines() == [
        "",
        "PARAMETER num_ctx 2048",
        'PARAMETER stop "<|eot_id|>"',
        'PARAMETER stop "<|start_header_id|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
    ]


@pytest.mark.parametrize("name", ["", "Upper", "a b", "-x", "a/../b", "x:", "x:y:z", "käse"])
def test_a_name_that_ollama_would_not_take(name):
    with pytest.raises(UserError, match="no name of Ollama's"):
        check_name(name)


@pytest.mark.parametrize("name", ["mine", "me/my-model.v2:q4_K_M"])
def test_a_name_that_it_takes(name):
    check_name(name)


def stand_in(folder: Path, code: int) -> Path:
    """A program `ollama` that writes down how it was called; the real one cannot be had for tests."""
    program = folder / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$PWD $*" > {folder}/called\necho "no such server" >&2\nexit {code}\n'
    )
    program.chmod(0o755)
    return program.parent


def test_ollama_create_is_run_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert create("mine", tmp_path) is False
    assert ollama.command("mine") == ["ollama", "create", "mine", "-f", "Modelfile"]
    monkeypatch.setenv("PATH", f"{stand_in(tmp_path, 0)}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert create("mine", tmp_path) is True
    assert (tmp_path / "called").read_text() == f"{tmp_path} create mine -f Modelfile\n"


def test_ollama_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{stand_in(tmp_path, 1)}{os.pathsep}/usr/bin{os.pathsep}/bin")
    with pytest.raises(Refused, match=r"ollama create mine -f Modelfile.*no such server"):
        create("mine", tmp_path)
