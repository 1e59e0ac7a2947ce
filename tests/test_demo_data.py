"""The demo's data: made by its generator, small, balanced, and held out sentence by sentence."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from recipe.data.rows import checked
from recipe.data.sources import DEMO

ANSWER = re.compile(r"(account|billing|sales|shipping|technical) \| (urgent|normal)")


def load_generator():
    spec = importlib.util.spec_from_file_location("make_data", DEMO / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[tuple[str, str]]:
    """(message, answer) of each row; every row must be of a shape that training accepts."""
    pairs = []
    for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
        system, user, assistant = checked(json.loads(line), name).messages
        assert [turn["role"] for turn in (system, user, assistant)] == ["system", "user", "assistant"]
        pairs.append((user["content"], assistant["content"]))
    return pairs


def sentences(pairs: list[tuple[str, str]]) -> set[str]:
    """Sentences without what the generator varies in them: numbers, and which product is named."""
    generator = load_generator()
    products = "|".join(" ".join(generator.PRODUCTS).split())
    found = set()
    for message, _ in pairs:
        for sentence in re.split(r"(?<=[.?!]) ", message):
            found.add(re.sub(r"\d+", "N", re.sub(rf"\b({products})", "P", sentence)).lower().strip(" .?!"))
    return found


@pytest.mark.parametrize(("name", "held_out"), [("train.jsonl", False), ("heldout.jsonl", True)])
def test_files_are_what_the_generator_writes(name, held_out):
    generator = load_generator()
    assert (DEMO / name).read_text(encoding="utf-8") == generator.as_jsonl(generator.rows(held_out))


def test_everything_together_is_smaller_than_300_kb():
    assert sum(file.stat().st_size for file in Path(DEMO).iterdir() if file.is_file()) < 300_000


def test_at_least_fifty_prompts_are_held_out_and_none_twice():
    messages = [message for message, _ in read("heldout.jsonl")]
    assert len(messages) >= 50
    assert len(set(messages)) == len(messages)


def test_no_held_out_sentence_and_no_held_out_product_occurs_in_training():
    train, held_out = read("train.jsonl"), read("heldout.jsonl")
    assert not sentences(train) & sentences(held_out)
    unseen = load_generator().PRODUCTS[True].split()
    assert not [message for message, _ in train if any(product in message for product in unseen)]


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_answer_is_one_line_of_the_fixed_format(name):
    assert [answer for _, answer in read(name) if not ANSWER.fullmatch(answer)] == []


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_one_fixed_answer_is_right_in_a_tenth_of_the_rows(name):
    answers = Counter(answer for _, answer in read(name))
    assert set(answers.values()) == {sum(answers.values()) // 10}


def test_each_training_request_comes_with_both_urgencies_so_that_it_gives_neither_away():
    generator = load_generator()
    remarks = {line for texts in generator.REMARKS.values() for line in generator.lines(texts[False])}
    urgencies: dict[str, list[str]] = {}
    for message, answer in read("train.jsonl"):
        request = " ".join(part for part in re.split(r"(?<=[.?!]) ", message) if part not in remarks)
        (request,) = sentences([(request, answer)])
        urgencies.setdefault(request, []).append(answer.split(" | ")[1])
    assert len(urgencies) == 150
    assert {tuple(sorted(found)) for found in urgencies.values()} == {("normal", "urgent")}
