"""Rows of preferences, long texts, LoRA+'s step and adapters to start with: what needs no ranks to be wrong."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from recipe.data import preference
from recipe.data.encode import IGNORED, encode
from recipe.data.rows import Row, checked
from recipe.errors import UserError
from recipe.settings import from_dict
from recipe.train import start
from recipe.train.optimizer import LoraPlusAdamW
from tests.data.preparing import prepared_once
from tests.models import tiny_tokenizer
from tests.train.stock import Pairs, documents

WORDS = ["user", "assistant", "hello", "world", "the", "answer", "is", "yes", "no"]


def rows_of(count: int) -> list[dict]:
    def words(first: int, number: int) -> str:
        return " ".join(itertools.islice(itertools.cycle(WORDS), first, first + number))

    return [
        {
            "prompt": words(n, 3 + n % 5),
            "chosen": " " + words(n, 1 + n % 7),
            "rejected": " " + words(n + 1, 1 + n % 4),
        }
        for n in range(count)
    ]


def settings_of(path, rows, **data):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return from_dict(
        {
            "data": {"path": str(path), "max_length": 64, "eval_fraction": 0.0} | data,
            "train": {"method": "dpo", "micro_batch_tokens": 128, "global_batch_tokens": 512},
            "paths": {"models": str(path.parent / "models"), "runs": str(path.parent / "runs")},
        }
    )


def test_pairs_are_tokenised_as_trl_does(tmp_path):
    rows = rows_of(40)
    tokenizer = tiny_tokenizer()
    ours = prepared_once(settings_of(tmp_path / "pairs.jsonl", rows), tokenizer).parts
    trainer = object.__new__(Pairs)  # for its preparation alone, which needs no model
    trainer._tokenizer = tokenizer
    theirs = super(Pairs, trainer)._prepare_dataset(
        Dataset.from_list(rows),
        tokenizer,
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
        "train",
    )
    assert len(ours) == len(theirs) == 40
    for mine, other in zip(ours, theirs, strict=True):
        prompt, answers = other["prompt_ids"], (other["chosen_ids"], other["rejected_ids"])
        assert mine == [(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in answers]


def test_both_answers_of_a_pair_are_packed_side_by_side(tmp_path):
    tokenizer = tiny_tokenizer()
    data = prepared_once(settings_of(tmp_path / "pairs.jsonl", rows_of(60)), tokenizer)
    rows = data.packed
    assert all(set(row) == {"input_ids", "labels", "seq_lengths"} for row in rows)
    found = [documents([row])[i : i + 2] for row in rows for i in range(0, len(row["seq_lengths"]), 2)]
    assert sorted(found) == sorted(data.parts) and len(found) == 60
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 128 for row in rows)
    assert max(len(row["seq_lengths"]) for row in rows) > 2
    for chosen, rejected in found:
        assert chosen[0][0] == rejected[0][0] and chosen[0] != rejected[0]


def test_conversations_with_and_without_their_prompt_are_the_same_pair():
    tokenizer = tiny_tokenizer()
    data = from_dict({"train": {"method": "dpo"}, "data": {"max_length": 64}}).data
    question = [{"role": "user", "content": "hello"}]
    yes, no = ({"role": "assistant", "content": word} for word in ("yes", "no"))
    explicit = Row({"prompt": question, "chosen": [yes], "rejected": [no]}, "a")
    implicit = Row({"chosen": [*question, yes], "rejected": [*question, no]}, "b")
    made = [preference.encode_pair(row, data, tokenizer) for row in (explicit, implicit)]
    assert made[0] == made[1]
    assert explicit.messages == implicit.messages == [*question, yes]
    trained = [[label for label in labels if label != IGNORED] for _, labels in made[0]]
    assert [tokenizer.decode(answer) for answer in trained] == ["yes<|im_end|>", "no<|im_end|>"]


YES = [{"role": "assistant", "content": "yes"}]
WRONG = {
    "no pair": ({"text": "hello"}, "has the keys text, expected `prompt`, `chosen` and `rejected`"),
    "kinds": ({"prompt": "a", "chosen": "b", "rejected": YES}, "chosen and rejected are str and list"),
    "prompt": ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is int, expected the kind"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "c"}, "chosen and rejected are empty and str"),
    "blank": ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen: completion is empty"),
    "turns": (
        {"prompt": [{"role": "user", "content": "a"}], "chosen": YES + YES, "rejected": YES},
        "has 2 messages behind the prompt, expected one answer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_no_pair_is_named(name):
    values, said = WRONG[name]
    row = checked(values, "pairs.jsonl:7")
    with pytest.raises(UserError, match=r"^pairs.jsonl:7: ") as refused:
        preference.check_row(row, "dpo")
    assert said in str(refused.value)


def test_pairs_are_not_trained_as_answers():
    with pytest.raises(UserError, match=r"x:1: has `chosen` and `rejected`, expected train.method: dpo"):
        preference.check_row(checked(rows_of(1)[0], "x:1"), "sft")


def test_a_micro_batch_has_room_for_a_pair():
    values = {"train": {"method": "dpo", "micro_batch_tokens": 100}, "data": {"max_length": 64}}
    with pytest.raises(UserError, match=r"expected at least 2 x data.max_length \(2 x 64\)"):
        from_dict(values)
    values["train"]["micro_batch_tokens"] = "auto"
    assert from_dict(values).micro_batch_tokens == 128


def test_a_long_text_is_split_and_each_token_learned_once(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = ["hello world " * 150, "the answer " * 3, "yes no " * 32]
    settings = settings_of(tmp_path / "text.jsonl", [{"text": text} for text in texts], overlong="split")
    settings = replace(settings, train=replace(settings.train, method="sft"))
    made = prepared_once(settings, tokenizer).train
    whole = [encode(Row({"text": text}, "x"), settings.data, tokenizer)[0] for text in texts]
    assert len(whole[0]) > 4 * 64 and whole[0][-1] == tokenizer.eos_token_id
    assert all(len(ids) <= 64 for ids, _ in made)
    learned = [label for _, labels in made for label in labels if label != IGNORED]
    assert learned == [token for ids in whole for token in ids[1:]]
    assert all(labels[0] == IGNORED for _, labels in made)
    assert learned.count(tokenizer.eos_token_id) == 3
    rows = [{"prompt": "a", "completion": "hello world " * 90}]
    (tmp_path / "text.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="longer than"):
        prepared_once(settings, tokenizer)


def test_lora_plus_is_adamw_with_two_groups():
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(3, 50, generator=generator)
    flat = torch.nn.Parameter(begin.clone())
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    ours = LoraPlusAdamW(flat, 20, 16.0, fused=True, **options)
    a, b = (torch.nn.Parameter(part.clone()) for part in (begin[:, :20], begin[:, 20:]))
    theirs = torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 16e-2}], **options)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 40) for o in (ours, theirs)]
    for _ in range(40):
        flat.grad = torch.randn(flat.shape, generator=generator)
        a.grad, b.grad = flat.grad[:, :20].clone(), flat.grad[:, 20:].clone()
        for step in (ours, theirs, *schedules):
            step.step()
    # Values of up to 3 are 2.4e-7 apart; 40 steps round 40 times.
    assert (flat - torch.cat([a, b], 1)).abs().max() < 4e-6
    assert (b - begin[:, 20:]).abs().mean() > 0.1


ADAPTER = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"], "use_rslora": False}
MISMATCHES = {
    "rank": ({"r": 8}, "rank is 8, expected 16 as the run has it; set lora.rank to the former"),
    "alpha": ({"lora_alpha": 32}, "alpha is 32, expected 16"),
    "rslora": ({"use_rslora": True}, "rslora is True, expected False"),
    "targets": (
        {"target_modules": ["v_proj", "q_proj"]},
        r"target_modules is [q_proj, v_proj], expected [q_proj]",
    ),
    "dora": ({"use_dora": True}, "use_dora is True, expected False"),
    "kind": ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
    "no weights": ({}, "has no adapter_model.safetensors"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_adapters_that_do_not_match_are_refused(tmp_path, name):
    changed, said = MISMATCHES[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | changed))
    settings = from_dict({"lora": {"start": str(tmp_path), "target_modules": ["q_proj"]}})
    with pytest.raises(UserError) as refused:
        start.find(settings)
    assert said in str(refused.value) and str(tmp_path) in str(refused.value)


def test_a_start_that_is_nowhere_is_named(tmp_path):
    settings = from_dict({"lora": {"start": "earlier"}, "paths": {"runs": str(tmp_path)}})
    with pytest.raises(
        UserError, match=r"lora.start is `earlier`: neither a folder .*make export-adapters RUN=earlier"
    ):
        start.find(settings)


REFUSED = {
    "lora.dora": ({"lora": {"dora": True}}, "DoRA divides every output row by the norm of the whole W"),
    "ratio": ({"train": {"min_lr_ratio": 0.1}}, "train.min_lr_ratio is 0.1, but train.scheduler is linear"),
    "decay": ({"train": {"decay_steps": 5}}, "train.decay_steps is `5`, expected null"),
    "no decay": (
        {"train": {"scheduler": "warmup_stable_decay"}},
        "train.decay_steps is empty, expected the number",
    ),
    "long decay": (
        {"train": {"scheduler": "warmup_stable_decay", "decay_steps": 95, "warmup_steps": 10}},
        "expected at most 90",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_do_nothing_or_cannot_be_are_refused(name):
    values, said = REFUSED[name]
    with pytest.raises(UserError) as refused:
        from_dict(values)
    assert said in str(refused.value)
