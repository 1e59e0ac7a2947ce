"""`recipe data`: what it shows is what is trained on, and what it finds is what was put there."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from recipe.cli import main
from recipe.data import check
from tests.models import CHAT_TEMPLATE, tiny_tokenizer

ASKED = [("user", "hello {n}"), ("assistant", "yes, the answer is {n}")]


def talk(n, *turns):
    return {"messages": [{"role": role, "content": text.format(n=n)} for role, text in turns or ASKED]}


@pytest.fixture
def place(tmp_path):
    """A config, twenty good rows, five held-out ones, and of the prepared model what concerns data."""
    model = tmp_path / "models" / "tiny-nf4"
    (tmp_path / "tiny").mkdir()
    tiny_tokenizer().save_pretrained(model)
    write(tmp_path / "rows.jsonl", [talk(n) for n in range(20)])
    write(tmp_path / "held.jsonl", [talk(n) for n in range(100, 105)])
    embeddings(model, {})
    config(tmp_path)
    return tmp_path


def config(place, **data):
    rows = {
        "path": str(place / "rows.jsonl"),
        "eval_path": str(place / "held.jsonl"),
        "max_length": 128,
        **data,
    }
    values = {
        "model": {"id": str(place / "tiny")},
        "data": rows,
        "paths": {"models": str(place / "models"), "runs": str(place / "runs")},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(values))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def embeddings(model, changed):
    """Of ordinary size, but for the rows of `changed`."""
    table = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
    for row, values in changed.items():
        table[row] = values
    save_file({"model.embed_tokens.weight": table}, model / "model.safetensors")


def data(place, capsys, what, *more):
    code = main(["data", what, "--config", str(place / "config.yaml"), *more])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def found(place, capsys):
    code, out, _ = data(place, capsys, "check", "--json")
    report = json.loads(out)
    assert code == (1 if report["errors"] else 0)
    return {finding["kind"]: finding for finding in report["findings"]}


def test_good_rows_have_no_finding(place, capsys):
    assert data(place, capsys, "check") == (0, "nothing found\n", "")


def test_rows_are_shown_as_the_model_sees_them(place, capsys):
    code, out, _ = data(place, capsys, "show", "--rows", "2")
    assert code == 0 and out.count("rows.jsonl:") == 2
    assert (
        "[[<|im_start|>user\nhello 1<|im_end|>\n<|im_start|>assistant\n]]yes, the answer is 1<|im_end|>[[\n]]"
        in out
    )
    rows = json.loads(data(place, capsys, "show", "--rows", "1", "--json")[1])
    learnt = [token for token, kept in zip(rows[0]["tokens"], rows[0]["in_loss"], strict=True) if kept]
    assert "".join(learnt) == "yes, the answer is 0<|im_end|>"


def pair(n, chosen="yes", rejected="no"):
    return {
        "prompt": f"hello world, what is it: {n}, or is it not?",
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
    }


DPO = ("--set", "train.method=dpo", "--set", "data.eval_path=null", "--set", "train.micro_batch_tokens=256")


def test_pairs_are_shown_answer_by_answer(place, capsys):
    write(place / "rows.jsonl", [pair(n) for n in range(20)])
    code, out, _ = data(place, capsys, "show", "--rows", "2", *DPO)
    assert code == 0 and out.count("rows.jsonl:") == 4
    for side, answer in (("chosen", "yes"), ("rejected", "no")):
        assert re.search(
            rf"rows\.jsonl:2: {side} \(\d+ tokens, \d+ in the loss\)\n\[\[hello world, what is it: 1, or is it not\?\]\] {answer}<",
            out,
        )
    rows = json.loads(data(place, capsys, "show", "--rows", "1", "--json", *DPO)[1])
    assert [row["where"].rpartition(":")[2] for row in rows] == [" chosen", " rejected"]
    # Together they are longer than data.max_length, which is of each.
    longest = max(len(row["input_ids"]) for row in rows)
    for tokens, over in ((longest, 0), (longest - 1, 2)):
        limit = f"data.max_length={tokens}"
        shown = data(place, capsys, "show", "--rows", "1", *DPO, "--set", limit)[1]
        assert shown.count("over data.max_length") == over


def test_pairs_are_counted_and_checked_as_such(place, capsys):
    same = "word " * 30
    rows = [pair(n) for n in range(18)] + [pair(18, same, f"{same} no"), pair(19, "yes", "yes")]
    write(place / "rows.jsonl", rows)
    options = (*DPO, "--set", "data.eval_fraction=0")
    code, out, err = data(place, capsys, "stats", "--json", *options)
    stats = json.loads(out)
    assert (code, stats["rows"], sum(stats["lengths"]["counts"])) == (0, 19, 19)
    longest = next(
        high
        for high, count in zip(
            stats["lengths"]["edges"][:0:-1], stats["lengths"]["counts"][::-1], strict=True
        )
        if count
    )
    assert longest > 128, "both answers together"
    assert "1 of 20 pairs have two answers alike, or one without a token in the loss: left out" in err
    assert data(place, capsys, "check", *options)[:2] == (0, "nothing found\n")
    more = [pair(0, rejected="never"), pair(1), pair(20, rejected="ask ann@example.org")]
    write(place / "rows.jsonl", [*rows, *more])
    findings = json.loads(data(place, capsys, "check", "--json", *options)[1])["findings"]
    assert {(f["kind"], f["count"], f["places"][0].rpartition(":")[2]) for f in findings} == {
        ("duplicates", 1, "22"),
        ("an e-mail address", 1, "23"),
    }
    write(place / "rows.jsonl", [*rows, {"chosen": [3], "rejected": [4]}])
    for method, count in (("dpo", 1), ("sft", 21)):
        code, out, _ = data(place, capsys, "check", "--json", *options, "--set", f"train.method={method}")
        (malformed,) = (f for f in json.loads(out)["findings"] if f["kind"] == "malformed")
        assert (code, malformed["count"]) == (1, count)
    assert "rows.jsonl:1: has `chosen` and `rejected`, expected train.method: dpo" in malformed["places"][0]
    code, _, err = data(place, capsys, "stats", *options)
    assert code == 2 and "rows.jsonl:21: chosen: prompt + completion[0] has no text" in err


def test_columns_of_pairs_may_be_called_otherwise(place, capsys):
    write(place / "rows.jsonl", [{"q": "is it?", "good": " yes", "bad": " no"}])
    names = "data.columns={prompt: q, chosen: good, rejected: bad}"
    rows = json.loads(data(place, capsys, "show", "--json", *DPO, "--set", names)[1])
    assert ["".join(row["tokens"]).startswith("is it?") for row in rows] == [True, True]


def test_stats_are_those_that_a_run_keeps(place, capsys):
    code, out, _ = data(place, capsys, "stats", "--json")
    stats = json.loads(out)
    assert (code, stats["rows"], stats["held_out_rows"], stats["turns"]) == (0, 20, 5, 40)
    assert sum(stats["lengths"]["counts"]) == 20
    code, out, _ = data(place, capsys, "stats")
    assert out.startswith(f"20 rows, {stats['tokens']:,} tokens, ") and "█" in out


SPOILED = {
    "malformed": ([{"text": 3}], "error", 1, "rows.jsonl:21: text is int"),
    "empty": ([talk(50, ("user", "q"), ("assistant", " "))], "error", 1, "rows.jsonl:21"),
    "duplicates": ([talk(3), talk(3)], "warning", 2, "rows.jsonl:21"),
    "leakage, exact": ([talk(101)], "error", 1, "held.jsonl:2"),
    "leakage, normalised": (
        [talk(101, ("user", "Hello  101!"), ("assistant", "yes the answer, is 101"))],
        "error",
        1,
        "held.jsonl:2",
    ),
    "overlong": ([talk(50, ("user", "q " * 200), ("assistant", "a"))], "error", 1, "rows.jsonl:21"),
    "special": ([talk(50, ("user", "<|im_end|> now"), ("assistant", "a"))], "warning", 1, "rows.jsonl:21"),
    "an e-mail address": (
        [talk(50, ("user", "to ann@example.org"), ("assistant", "a"))],
        "warning",
        1,
        "rows.jsonl:21",
    ),
    "an API key": (
        [talk(50, ("user", "AKIA" + "A" * 16), ("assistant", "a"))],
        "warning",
        1,
        "rows.jsonl:21",
    ),
    "a private key": (
        [talk(50, ("user", "-----BEGIN RSA " + "PRIVATE KEY-----"), ("assistant", "a"))],
        "warning",
        1,
        "rows.jsonl:21",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_was_put_there_is_found_with_its_place(kind, place, capsys):
    rows, level, count, where = SPOILED[kind]
    with open(place / "rows.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    findings = found(place, capsys)
    finding = findings.pop(kind)
    assert (finding["level"], finding["count"]) == (level, count)
    assert where in finding["places"][0]
    assert set(findings) <= {"leakage, normalised"}, "nothing else"
    out = data(place, capsys, "check")[1]
    assert "ann@example.org" not in out and "AKIA" not in out, "the place, not the value"


def test_what_leaks_into_a_share_held_out_is_found(place, capsys):
    config(place, eval_path=None, eval_fraction=0.5)
    assert "leakage, exact" not in found(place, capsys)
    write(place / "rows.jsonl", [talk(n % 10) for n in range(20)])
    assert found(place, capsys)["leakage, exact"]["count"] > 0


def test_chat_tokens_that_were_never_trained_are_named(place, capsys):
    (place / "chat.jinja").write_text(CHAT_TEMPLATE + "{# <|unknown|> #}")
    config(place, chat_template=str(place / "chat.jinja"))
    model, (end, start) = place / "models" / "tiny-nf4", (0, 1)
    assert found(place, capsys)["untrained"]["places"] == ["<|unknown|> is no token of this tokenizer"]
    for changed, said in (
        ({end: 1e-4, start: 1}, "norm"),
        ({end: 1, start: 1.00001}, "that of another chat token"),
    ):
        embeddings(model, changed)
        places = found(place, capsys)["untrained"]["places"]
        assert any(place.startswith("<|im_end|>") and said in place for place in places), places


def test_without_a_prepared_model_the_rows_are_checked_all_the_same(place, capsys):
    shutil.rmtree(place / "models")
    code, out, err = data(place, capsys, "check")
    assert (code, out) == (0, "nothing found\n") and "no model is prepared yet" in err
    code, out, err = data(place, capsys, "show")
    assert code == 2 and out == "" and err.startswith("error: data show: there is no tokenizer in ")


def test_a_finding_names_some_places_and_counts_all(place, capsys):
    write(place / "rows.jsonl", [talk(1)] * 20)
    out = data(place, capsys, "check")[1]
    assert out.splitlines()[0].split()[:2] == ["warning", "19"]
    assert f"and {19 - check.PLACES} more" in out


def test_no_rows_to_show_is_a_wrong_request(place, capsys):
    assert data(place, capsys, "show", "--rows", "0") == (2, "", "error: --rows is 0, expected at least 1\n")
