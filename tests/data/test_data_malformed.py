"""Whatever stands in a data file: rows, or one line that says where and what; never a traceback, never a changed file."""

import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipe.data.rows import training_rows
from recipe.data.tokenise import documents_of
from recipe.errors import UserError
from recipe.settings import COLUMNS, Data
from tests.data.golden import TEMPLATES, tokenizer_for
from tests.data.test_data_sources import WRITERS

EXAMPLES = 60
QUICK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TEXT = st.text(st.characters(), max_size=12)  # half a surrogate pair too
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
CALL = st.fixed_dictionaries(
    {},
    optional={
        "function": st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON}) | JSON,
        "id": JSON,
    },
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "judge"]) | JSON,
        "content": TEXT | JSON,
        "weight": st.sampled_from([0, 1]) | JSON,
        "train": st.booleans() | JSON,
        "tool_calls": st.lists(CALL, max_size=2) | JSON,
    },
)
ANSWER = st.builds(lambda text: {"role": "assistant", "content": text}, TEXT)
CONVERSATION = st.builds(lambda talk, last: [*talk, last], st.lists(MESSAGE, max_size=3), ANSWER | MESSAGE)
TURN = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "function_call"]) | JSON, "value": TEXT | JSON}
)
PAIR = st.fixed_dictionaries(
    {"chosen": TEXT | CONVERSATION | JSON, "rejected": TEXT | CONVERSATION | JSON},
    optional={"prompt": TEXT | CONVERSATION | JSON},
)
ROW = (
    st.fixed_dictionaries({"messages": CONVERSATION | JSON}, optional={"tools": JSON})
    | st.fixed_dictionaries({"prompt": TEXT | CONVERSATION | JSON, "completion": TEXT | CONVERSATION | JSON})
    | PAIR
    | st.fixed_dictionaries(
        {"conversations": st.lists(TURN, max_size=3) | JSON}, optional={"tools": JSON, "system": JSON}
    )
    | st.fixed_dictionaries(
        {"instruction": TEXT | JSON, "output": TEXT | JSON}, optional={"input": JSON, "system": JSON}
    )
    | st.dictionaries(st.sampled_from(COLUMNS) | TEXT, JSON, max_size=4)
    | JSON
)
TOKENIZERS = {name: tokenizer_for(*TEMPLATES[name]) for name in ("chatml", "mistral", "qwen2.5")}


def read(path, tokenizer, **data):
    """All rows, encoded; or what was said of the first that cannot be."""
    before = path.read_bytes()
    try:
        for row in training_rows(Data(path=str(path), **data)):
            method = "dpo" if "chosen" in row.values else "sft"
            for document in documents_of(row, Data(train_on="assistant"), method, tokenizer):
                assert all(len(ids) == len(labels) and ids for ids, labels in document)
            assert isinstance(row.text, str)
    except UserError as error:
        said = str(error)
        assert str(path) in said or said.startswith("data.path"), said
        assert said.count(str(path)) + said.count("data.path") >= 1 and len(said) < 1000
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "only").mkdir()
    return tmp_path / "only"


@pytest.mark.parametrize("template", TOKENIZERS)
def test_rows_of_any_form(template, folder):
    @QUICK
    @given(st.lists(ROW, max_size=3))
    def run(rows):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read(path, TOKENIZERS[template])

    run()


@pytest.mark.parametrize("ending", WRITERS)
def test_bytes_of_any_kind(ending, folder):
    """Some of them a good file, cut or with a byte changed."""
    good = folder / f"good.{ending}"
    WRITERS[ending](good)
    content = good.read_bytes()
    good.unlink()

    @QUICK
    @given(st.data())
    def run(data):
        kind = data.draw(st.sampled_from(["noise", "letters", "cut", "changed"]))
        if kind == "noise":
            raw = data.draw(st.binary(max_size=40))
        elif kind == "letters":
            raw = data.draw(st.text('[]{}":,\\ \n\r\t0e-"' + string.ascii_letters, max_size=40)).encode()
        elif kind == "cut":
            raw = content[: data.draw(st.integers(0, len(content)))]
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            raw = content[:at] + data.draw(st.binary(min_size=1, max_size=2)) + content[at + 1 :]
        path = folder / f"rows.{ending}"
        path.write_bytes(raw)
        read(path, TOKENIZERS["chatml"])

    run()


def test_columns_of_any_name(folder):
    @QUICK
    @given(st.lists(ROW, max_size=2), st.dictionaries(st.sampled_from(COLUMNS), TEXT, min_size=1, max_size=3))
    def run(rows, columns):
        path = folder / "rows.json"
        path.write_text(json.dumps(rows))
        read(path, TOKENIZERS["chatml"], columns=columns)

    run()


def test_a_row_that_is_nested_without_end(folder):
    path = folder / "rows.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not valid JSON \(nested too deeply\)"):
        list(training_rows(Data(path=str(path))))
