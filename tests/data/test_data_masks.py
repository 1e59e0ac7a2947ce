"""Which tokens are learnt, token by token, for the chat templates that people use; a golden file for each."""

import copy

import pytest

from recipe.data.chat import conversation
from recipe.data.encode import IGNORED, encode
from recipe.data.rows import checked
from recipe.errors import UserError
from recipe.settings import Data
from tests.data.golden import CASES, CONVERSATIONS, FOLDER, TALK, TEMPLATES, TRL, golden, tokenizer_for


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_the_mask_is_the_golden_one(name, talk):
    """Written anew by `python -m tests.data.golden`."""
    assert golden(name, talk) == (FOLDER / f"{name}-{talk}.txt").read_text()


@pytest.mark.parametrize(("name", "talk"), CASES)
def test_begin_once_end_always_and_answers_only(name, talk):
    """What any golden file must say, whoever wrote it."""
    tokenizer = tokenizer_for(*TEMPLATES[name])
    row = checked(CONVERSATIONS[talk], "here")
    ids, labels = encode(row, Data(train_on="assistant"), tokenizer)
    if tokenizer.bos_token:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert labels[0] == IGNORED and tokenizer.pad_token is None
    stretches = "".join("|" if label == IGNORED else chr(label) for label in labels).split("|")
    stretches = [[ord(letter) for letter in stretch] for stretch in stretches if stretch]
    assert all(stretch[-1] == tokenizer.eos_token_id for stretch in stretches)
    answers = [message for message in row.messages if message["role"] == "assistant"]
    assert len(stretches) == len(answers)
    for stretch, answer in zip(stretches, answers, strict=True):
        said = tokenizer.decode(stretch).replace(" ", "")
        if "tool_calls" in answer:
            assert '"weather"' in said and '{"place":"Bonn"}' in said
        else:
            assert said == answer["content"].replace(" ", "") + tokenizer.eos_token


@pytest.mark.parametrize(
    ("plain", "marked"), [("llama-3", "llama3_training"), ("qwen2.5", "qwen2_5_training")]
)
@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_a_template_that_marks_what_is_generated_gives_the_same(plain, marked, train_on):
    file, bos, eos = TEMPLATES[plain]
    row = checked(TALK, "here")
    by_match = conversation(row, train_on, tokenizer_for(file, bos, eos))
    assert conversation(row, train_on, tokenizer_for(TRL / f"{marked}.jinja", bos, eos)) == by_match


def test_marks_that_are_not_one_for_each_answer_are_refused():
    file, bos, eos = TEMPLATES["chatml"]
    tokenizer = tokenizer_for(file, bos, eos)
    tokenizer.chat_template += "{% generation %}{% endgeneration %}"
    with pytest.raises(
        UserError, match="here: the chat template marks 1 generated parts, expected one for each of the 2"
    ):
        encode(checked(TALK, "here"), Data(), tokenizer)


def chosen(**keys):
    talk = copy.deepcopy(TALK)
    talk["messages"][2] |= keys
    return talk


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [
        ({"weight": 0}, ["Later.<|im_end|>"]),
        ({"train": False}, ["Later.<|im_end|>"]),
        ({"weight": 1}, ["Yes, it is.<|im_end|>", "Later.<|im_end|>"]),
        ({}, ["Yes, it is.<|im_end|>", "Later.<|im_end|>"]),
    ],
)
def test_a_message_may_say_that_it_is_not_to_be_learnt(keys, learnt):
    tokenizer = tokenizer_for(*TEMPLATES["chatml"])
    text, spans = conversation(checked(chosen(**keys), "here"), "assistant", tokenizer)
    assert [text[start:end] for start, end in spans] == learnt
    assert "weight" not in text


BARE = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def test_an_answer_gets_its_end_where_the_template_has_none():
    tokenizer = tokenizer_for(*TEMPLATES["chatml"])
    tokenizer.chat_template = BARE
    ids, labels = encode(checked(TALK, "here"), Data(train_on="assistant"), tokenizer)
    end = tokenizer.eos_token_id
    assert ids.count(end) == 2 and [labels[i] for i, token in enumerate(ids) if token == end] == [end, end]
    learnt = tokenizer.decode([label for label in labels if label != IGNORED]).replace(" ", "")
    assert learnt == "Yes,itis.<|im_end|>Later.<|im_end|>"
    ids, labels = encode(checked(TALK, "here"), Data(train_on="all"), tokenizer)
    assert ids.count(end) == 1 and labels[1:] == ids[1:]


def test_where_the_same_answer_stands_twice_each_is_found_at_its_place():
    """Mistral's template moves the system message, so that earlier answers are looked for in the text."""
    tokenizer = tokenizer_for(*TEMPLATES["mistral"])
    talk = copy.deepcopy(TALK)
    talk["messages"][1:1] = [
        {"role": "user", "content": "now?"},
        {"role": "assistant", "content": "Yes, it is."},
    ]
    text, spans = conversation(checked(talk, "here"), "assistant", tokenizer)
    assert [text[start:end] for start, end in spans] == ["Yes, it is.</s>", "Yes, it is.</s>", "Later.</s>"]
    assert spans == sorted(set(spans))


def test_an_answer_that_a_question_imitates_is_not_guessed():
    tokenizer = tokenizer_for(*TEMPLATES["mistral"])
    talk = copy.deepcopy(TALK)
    talk["messages"][3]["content"] = "late?[/INST]Yes, it is.</s>"
    with pytest.raises(
        UserError, match="here: the chat template changes earlier turns, so the answer of turn 2"
    ):
        conversation(checked(talk, "here"), "assistant", tokenizer)


def test_a_text_that_brings_its_own_begin_has_one():
    from tests.data.test_data import with_special_tokens

    tokenizer = with_special_tokens("<s> $A")
    ids, _ = encode(checked({"text": "<s>hello"}, "here"), Data(), tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
