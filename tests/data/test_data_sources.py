"""Every kind of file, shape and column gives the same rows; several sources come as often as their weights say."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from recipe.data.rows import checked, training_rows
from recipe.data.tokenise import encoded
from recipe.errors import UserError
from recipe.settings import Data, Source, from_dict
from tests.data.preparing import prepared_once
from tests.models import tiny_tokenizer

ROWS = [{"prompt": f"question {n}, “ünïcode”\n", "completion": f"answer {n}"} for n in range(7)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, rows=ROWS):
    path.write_text(json.dumps(rows, indent=2))


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_csv(path, rows=ROWS):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


WRITERS = {"jsonl": write_jsonl, "json": write_json, "parquet": write_parquet, "csv": write_csv}


@pytest.mark.parametrize("kind", WRITERS)
def test_each_kind_of_file_gives_the_same_rows(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path)
    rows = list(training_rows(Data(path=str(path))))
    assert [row.values for row in rows] == ROWS
    places = {"jsonl": f"{path}:2", "json": f"{path} row 2", "parquet": f"{path} row 2", "csv": f"{path}:5"}
    assert rows[1].where == places[kind]


def test_a_pattern_is_all_that_it_matches_in_order(tmp_path):
    write_parquet(tmp_path / "b.parquet", ROWS[3:])
    write_csv(tmp_path / "a.csv", ROWS[:3])
    assert [row.values for row in training_rows(Data(path=str(tmp_path / "*.*")))] == ROWS
    with pytest.raises(UserError, match=r"data\.path is `.*\*\.json`: matches no file"):
        list(training_rows(Data(path=str(tmp_path / "*.json"))))


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_are_renamed_by_settings(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"question": r["prompt"], "answer": r["completion"], "id": "x"} for r in ROWS])
    columns = {"prompt": "question", "completion": "answer"}
    assert [row.values for row in training_rows(Data(path=str(path), columns=columns))] == ROWS
    with pytest.raises(
        UserError, match=r"rows\..*: has no `reply`, expected it for `completion` as `columns` says"
    ):
        list(training_rows(Data(path=str(path), columns={"prompt": "question", "completion": "reply"})))


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SHAPES = {
    "alpaca": (ALPACA, turns(("user", "Add.\n\n1 and 2"), ("assistant", "3"))),
    "alpaca without input": (ALPACA | {"input": ""}, turns(("user", "Add."), ("assistant", "3"))),
    "alpaca with a system message": (
        {"instruction": "Add.", "output": "3", "system": "Count."},
        turns(("system", "Count."), ("user", "Add."), ("assistant", "3")),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        turns(("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two"},
            ]
        },
        [
            *turns(("user", "q")),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            *turns(("tool", "2"), ("assistant", "two")),
        ],
    ),
    "calls with arguments as text, and parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                *turns(("tool", "2"), ("assistant", "two")),
            ]
        },
        [
            *turns(("user", "q!")),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            *turns(("tool", "2"), ("assistant", "two")),
        ],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_columns_become_messages(name):
    values, messages = SHAPES[name]
    assert checked(values, "here").messages == messages


def test_what_parquet_adds_to_rows_that_lack_it_is_taken_out(tmp_path):
    """A table has each field in each entry: here `tool_calls` in the question."""
    rows = [SHAPES["calls with arguments as text, and parts of text"][0]]
    rows[0]["messages"][0] = turns(("user", "q!"))[0]
    write_parquet(tmp_path / "rows.parquet", rows)
    (row,) = training_rows(Data(path=str(tmp_path / "rows.parquet")))
    assert row.messages == SHAPES["calls with arguments as text, and parts of text"][1]


BAD = {
    "weight": ({"messages": [*turns(("user", "q")), {"role": "assistant", "content": "a", "weight": 0.5}]}, r"messages\[1\]\.weight is 0\.5, expected 0 or 1"),
    "a question to be learnt": ({"messages": [{"role": "user", "content": "q", "train": True}, *turns(("assistant", "a"))]}, r"messages\[0\] is to be learnt and has the role `user`"),
    "arguments": ({"messages": [*turns(("user", "q")), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, r"messages\[1\]\.tool_calls\[0\] arguments is not valid JSON"),
    "a call without a name": ({"messages": [*turns(("user", "q")), {"role": "assistant", "tool_calls": [3]}]}, r"messages\[1\]\.tool_calls\[0\] has no `function` with a `name`"),
    "speaker": ({"conversations": [{"from": "narrator", "value": "v"}]}, r"conversations\[0\] is from `narrator`, expected one of human"),
    "tools": ({"messages": turns(("user", "q"), ("assistant", "a")), "tools": "no list"}, "tools is not valid JSON, expected a list of functions"),
    "alpaca's output": ({"instruction": "Add.", "output": " "}, "output is empty, expected text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_row_is_said_with_its_place(name):
    values, said = BAD[name]
    with pytest.raises(UserError, match=f"^here: {said}") as raised:
        checked(values, "here")
    assert "\n" not in str(raised.value)


def test_sources_come_as_often_as_their_weights_say(tmp_path):
    tokenizer = tiny_tokenizer()
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(20)])
    sources = [
        {"path": str(tmp_path / f"{name}.jsonl"), "weight": w}
        for name, w in (("a", 0.5), ("b", 1), ("c", 2.25))
    ]

    def made(seed):
        settings = from_dict(
            {
                "data": {"sources": sources, "eval_fraction": 0, "max_length": 32},
                "train": {"seed": seed},
                "paths": {"models": str(tmp_path / "models")},
            }
        )
        data = prepared_once(settings, tokenizer)
        return data, [tokenizer.decode(ids)[:1] for ids, _ in data.train], data.train

    data, letters, documents = made(1)
    assert {letter: letters.count(letter) for letter in "abc"} == {"a": 10, "b": 20, "c": 45}
    assert (
        data.notes[0].startswith("data.sources[0] (")
        and "weight 0.5: 10 documents an epoch of 20" in data.notes[0]
    )
    assert made(1)[2] == documents != made(2)[2]
    assert [source["rows"] for source in data.stats["sources"]] == [20, 20, 20]
    assert data.stats["rows"] == 60 and data.stats["epoch_tokens"] > data.stats["tokens"]


def test_choices_that_do_not_count_are_said(tmp_path):
    row = {
        "messages": [
            *turns(
                ("user", "q"),
            ),
            {"role": "assistant", "content": "a", "weight": 0},
            *turns(("user", "q"), ("assistant", "a")),
        ]
    }
    write_jsonl(tmp_path / "a.jsonl", [row])
    data = {"path": str(tmp_path / "a.jsonl"), "eval_fraction": 0, "max_length": 256}
    settings = from_dict({"data": data, "paths": {"models": str(tmp_path / "models")}})
    assert prepared_once(settings, tiny_tokenizer()).notes == [
        "messages with `weight` or `train` count only with data.train_on: assistant"
    ]


def test_a_part_of_the_rows_is_encoded_as_all_of_them():
    """What a process of its own gets and gives."""
    tokenizer, data = tiny_tokenizer(), Data(max_length=64)
    raw = [(f"x:{n}", row) for n, row in enumerate(ROWS)]
    whole, seen = encoded(raw, {}, data, "sft", tokenizer)
    parts = [encoded(raw[i : i + 3], {}, data, "sft", tokenizer)[0] for i in (0, 3, 6)]
    assert whole.ids.tolist() == [token for part in parts for token in part.ids.tolist()]
    assert whole.learnt.tolist() == [n for part in parts for n in part.learnt.tolist()]
    assert seen.rows == len(ROWS) and not seen.messages


def test_a_source_is_a_setting_as_all_are():
    assert from_dict({"data": {"sources": [{"path": "a", "weight": "2"}]}}).data.sources == [Source("a", 2.0)]
