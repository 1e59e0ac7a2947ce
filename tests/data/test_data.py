"""What is in the loss is exactly the answer, and packing neither splits nor loses a document."""

import dataclasses
import json

import pytest
from tokenizers import processors

from recipe.data.encode import IGNORED, encode
from recipe.data.pack import PackedCollator
from recipe.data.rows import Row
from recipe.data.show import shown_rows
from recipe.errors import UserError
from recipe.settings import Data, from_dict
from tests.data.preparing import prepared_once
from tests.models import CHAT_TEMPLATE, EOS, tiny_tokenizer

TALK = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world, ünïcode ✓"},
        {"role": "user", "content": "answer?"},
        {"role": "assistant", "content": "yes\nno"},
    ]
}
ALL_OF_IT = (
    "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    "<|im_start|>assistant\nworld, ünïcode ✓<|im_end|>\n<|im_start|>user\nanswer?<|im_end|>\n"
    "<|im_start|>assistant\nyes\nno<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def with_special_tokens(single: str):
    """A tokenizer that adds tokens itself, as Llama's does: `single` is such as `<s> $A`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [("<s>", tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=ids)
    return tokenizer


def parts(values, tokenizer, **data):
    """The whole text of a row as the model gets it, and the labelled texts, one for each stretch."""
    ids, labels = encode(Row(values, "here"), Data(**data), tokenizer)
    assert labels[0] == IGNORED, "nothing predicts the first token"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    stretches, inside = [], False
    for label in labels:
        if label != IGNORED:
            stretches = stretches if inside else [*stretches, []]
            stretches[-1].append(label)
        inside = label != IGNORED
    return tokenizer.decode(ids), [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("completion", ["yes\nno<|im_end|>"]),
        ("assistant", ["world, ünïcode ✓<|im_end|>", "yes\nno<|im_end|>"]),
        ("all", [ALL_OF_IT.removeprefix("<|im_start|>")]),
    ],
)
def test_of_a_conversation_the_answers_are_in_the_loss(train_on, expected, tokenizer):
    text, labelled = parts(TALK, tokenizer, train_on=train_on)
    assert text == ALL_OF_IT
    assert labelled == expected


def test_a_template_that_writes_the_bos_token_gives_it_once():
    tokenizer = with_special_tokens("<s> $A")
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    text, labelled = parts(TALK, tokenizer)
    assert text == "<s>" + ALL_OF_IT
    assert labelled == ["yes\nno<|im_end|>"]


@pytest.mark.parametrize("single", ["<s> $A", f"<s> $A {EOS}"], ids=["bos", "bos and eos"])
@pytest.mark.parametrize(
    ("values", "train_on", "expected"),
    [
        ({"prompt": "hello", "completion": " world"}, "completion", " world" + EOS),
        ({"prompt": "hello", "completion": " world"}, "assistant", " world" + EOS),
        ({"prompt": "hello", "completion": " world"}, "all", "hello world" + EOS),
        ({"prompt": "", "completion": "world"}, "completion", "world" + EOS),
        ({"text": "hello world"}, "completion", "hello world" + EOS),
    ],
)
def test_plain_text_has_one_bos_and_a_learnt_eos(single, values, train_on, expected):
    tokenizer = with_special_tokens(single)
    text, labelled = parts(values, tokenizer, train_on=train_on)
    assert text == "<s>" + "".join(values.values()) + EOS
    assert labelled == [expected]


def test_without_a_bos_token_the_first_token_of_a_text_is_not_labelled(tokenizer):
    text, (labelled,) = parts({"text": "hello world"}, tokenizer)
    assert text == "hello world" + EOS
    assert labelled == text.removeprefix(tokenizer.decode(tokenizer("hello world")["input_ids"][:1]))


def test_a_conversational_prompt_and_completion_is_a_conversation(tokenizer):
    turns = TALK["messages"]
    assert parts({"prompt": turns[:4], "completion": turns[4:]}, tokenizer) == parts(TALK, tokenizer)


def test_a_template_whose_answers_cannot_be_found_again_is_refused(tokenizer):
    """It writes earlier answers otherwise than when they were given."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content if loop.last else message.content | upper }}"
    )
    with pytest.raises(
        UserError, match="here: the chat template changes earlier turns, so the answer of turn 2"
    ):
        parts(TALK, tokenizer, train_on="assistant")
    text, labelled = parts(TALK, tokenizer, train_on="completion")
    assert "WORLD" in text and labelled == ["yes\nno<|im_end|>"]


def test_an_answer_to_nothing_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"here: messages\[0\] is the answer to nothing"):
        parts({"messages": [{"role": "assistant", "content": "hello"}]}, tokenizer)


def test_the_collator_restarts_positions_and_says_where_documents_end():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, IGNORED, 9], "seq_lengths": [3, 2]}
    batch = PackedCollator()([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9]], "no document's first token is a target"
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_the_collator_never_labels_a_first_token():
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    assert PackedCollator()([row])["labels"].tolist() == [[IGNORED, 6, IGNORED, 8]]


def settings_for(folder, rows, **data):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"path": str(path), "max_length": 32, "eval_fraction": 0.0, **data}
    return from_dict({"data": values, "paths": {"models": str(folder / "models")}})


def texts(documents, tokenizer):
    return [tokenizer.decode(ids) for ids, _ in documents]


LONG = [{"text": "a"}, {"text": "b" * 50}, {"text": "c" * 20}, {"text": "d" * 40}]


def test_an_overlong_row_stops_with_its_place_and_their_number(tokenizer, tmp_path):
    with pytest.raises(
        UserError,
        match=r"data\.jsonl:2: has 51 tokens, and 2 of 4 rows are longer than data\.max_length \(32\)",
    ):
        prepared_once(settings_for(tmp_path, LONG), tokenizer)


def test_overlong_rows_are_dropped_and_counted(tokenizer, tmp_path):
    data = prepared_once(settings_for(tmp_path, LONG, overlong="drop"), tokenizer)
    assert texts(data.train, tokenizer) == ["a" + EOS, "c" * 20 + EOS]
    assert data.notes == ["2 of 4 rows are longer than 32 tokens: drop"]


def test_overlong_rows_are_cut_and_counted(tokenizer, tmp_path):
    data = prepared_once(settings_for(tmp_path, LONG, overlong="truncate"), tokenizer)
    assert [len(ids) for ids, _ in data.train] == [2, 32, 21, 32]
    ids, labels = data.train[1]
    assert labels == [IGNORED, *ids[1:]]
    assert data.notes == ["2 of 4 rows are longer than 32 tokens: truncate"]


def test_a_row_whose_answer_is_cut_away_is_left_out_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "p" * 40, "completion": "never seen"}, {"text": "a"}]
    data = prepared_once(settings_for(tmp_path, rows, overlong="truncate"), tokenizer)
    assert len(data.train) == 1
    assert data.notes[-1] == "1 of 2 rows have no token in the loss: left out"


def test_the_hold_out_is_disjoint_and_the_same_every_time(tokenizer, tmp_path):
    rows = [{"text": f"number {n}"} for n in range(40)]
    settings = settings_for(tmp_path, rows, eval_fraction=0.25)
    once, again = prepared_once(settings, tokenizer), prepared_once(settings, tokenizer)
    train, held_out = (texts(part, tokenizer) for part in (once.train, once.held_out))
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted(train + held_out) == sorted(row["text"] + EOS for row in rows)
    assert once.held_out == again.held_out
    other = dataclasses.replace(settings, train=dataclasses.replace(settings.train, seed=1))
    assert prepared_once(other, tokenizer).held_out != once.held_out


def test_a_held_out_file_takes_nothing_from_the_training_rows(tokenizer, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "x"}\n')
    settings = settings_for(tmp_path, [{"text": "a"}] * 9, eval_fraction=0.5, eval_path=str(held_out))
    data = prepared_once(settings, tokenizer)
    assert len(data.train) == 9
    assert texts(data.held_out, tokenizer) == ["x" + EOS]


SYSTEM, QUESTION, ANSWER = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
FORMS = {
    "one system message": ([[SYSTEM, QUESTION, ANSWER]] * 2, True, "system"),
    "two of them": (
        [[SYSTEM, QUESTION, ANSWER], [SYSTEM | {"content": "other"}, QUESTION, ANSWER]],
        True,
        None,
    ),
    "none in one row": ([[SYSTEM, QUESTION, ANSWER], [QUESTION, ANSWER]], True, None),
    "text": ([None, None], False, None),
    "text in one row": ([[SYSTEM, QUESTION, ANSWER], None], False, None),
}


@pytest.mark.parametrize(("rows", "messages", "system"), FORMS.values(), ids=FORMS.keys())
def test_how_the_rows_put_a_question_is_known_to_chat(rows, messages, system, tokenizer, tmp_path):
    rows = [{"messages": row} if row else {"text": "a"} for row in rows]
    data = prepared_once(settings_for(tmp_path, rows, max_length=256, eval_fraction=0.0), tokenizer)
    assert data.form == {"messages": messages, "system": system}


def test_a_single_row_is_trained_on_not_held_out(tokenizer, tmp_path):
    data = prepared_once(settings_for(tmp_path, [{"text": "a"}], eval_fraction=0.5), tokenizer)
    assert (len(data.train), len(data.held_out)) == (1, 0)


def test_a_template_from_a_file_names_the_tokens_that_a_base_model_never_trained(tokenizer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    data = prepared_once(
        settings_for(tmp_path, [TALK], max_length=256, chat_template=str(template)), tokenizer
    )
    (note,) = data.notes
    assert "never trained its chat tokens (<|im_end|>, <|im_start|>)" in note


def test_the_shown_rows_mark_what_is_not_in_the_loss(tokenizer):
    rows = [{"prompt": "hello", "completion": " world"}, TALK, TALK, TALK]
    encoded = [encode(Row(row, "here"), Data(), tokenizer) for row in rows]
    lines = shown_rows(encoded, tokenizer, color=False).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(f"[[hello]] world{EOS}")
    assert lines[1].endswith("<|im_start|>assistant⏎]]yes⏎no<|im_end|>[[⏎]]")
    assert "\x1b[2mhello\x1b[0m world" in shown_rows(encoded, tokenizer, color=True)
