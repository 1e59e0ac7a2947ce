"""Every method beside plain SFT, on two real ranks, has the losses and learning rates of the plain library.

One pair of ranks trains all cases; what they are compared with is tests/train/stock.py.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipe.cli import main
from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches
from recipe.errors import UserError
from recipe.files import read_json
from recipe.train.run import read_jsonl
from tests.models import tiny_checkpoint
from tests.train import stock
from tests.train.in_one_launch import begun, train_all
from tests.train.tiny_run import differing

STEPS = 3
TOLERANCE = 1e-4
PEAK = 5e-4  # at a higher rate Adam makes as much of rounding as of small gradients
BASE = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "data": {"max_length": 64},
    "train": {
        "steps": STEPS,
        "learning_rate": PEAK,
        "warmup_steps": 1,
        "global_batch_tokens": 512,
        "micro_batch_tokens": 128,
        "save_every": STEPS,
        "rehearsal": False,
    },
    "eval": {"samples": 1, "exact_match": 2, "max_new_tokens": 4},
}
NEW_TOKENS, NEW_IDS = ["<|tool|>", "<|im_start|>"], [1, 299]  # by the rows of tests.models' tokenizer
# What `recipe train` is told, and what the libraries are told: the schedules too.
CASES = {
    "rslora": (
        {
            "lora.rslora": True,
            "train.scheduler": "warmup_stable_decay",
            "train.decay_steps": 1,
            "train.min_lr_ratio": 0.2,
        },
        {
            "lora": {"use_rslora": True},
            "schedule": {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 1, "min_lr_ratio": 0.2},
            },
        },
    ),
    "lora+": (
        {
            "lora.lr_ratio": 8,
            "train.weight_decay": 0.1,
            "train.scheduler": "cosine_with_min_lr",
            "train.min_lr_ratio": 0.1,
        },
        {
            "optimizer": lambda model: create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
            ),
            "schedule": {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            },
        },
    ),
    "start": (
        {"lora.start": "start", "train.scheduler": "polynomial", "train.min_lr_ratio": 0.5},
        {
            "start": True,
            "schedule": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": PEAK / 2}},
        },
    ),
    "text": (
        {"data.path": "text.jsonl", "data.overlong": "split", "train.scheduler": "cosine"},
        {"schedule": {"lr_scheduler_type": "cosine"}},
    ),
    "dpo": (
        {
            "data.path": "pairs.jsonl",
            "train.method": "dpo",
            "train.dpo_beta": 0.3,
            "train.scheduler": "inverse_sqrt",
        },
        {"dpo": {"beta": 0.3}, "schedule": {"lr_scheduler_type": "inverse_sqrt"}},
    ),
    # One that the tokenizer has, one that it lacks; with a head of its own PEFT has to be told that it is trained too.
    "tokens": (
        {
            "data.path": "tokens.jsonl",
            "lora.new_tokens": NEW_TOKENS,
            "train.weight_decay": 0.1,
            "train.scheduler": "constant",
        },
        {
            "lora": {"trainable_token_indices": {"embed_tokens": NEW_IDS, "lm_head": NEW_IDS}},
            "schedule": {"lr_scheduler_type": "constant_with_warmup"},
        },
    ),
    "tied tokens": (
        {
            "model.id": "tied",
            "data.path": "tokens.jsonl",
            "lora.new_tokens": NEW_TOKENS,
            "lora.lr_ratio": 8,
            "train.scheduler": "constant",
            "train.rehearsal": True,
            "train.save_every": 1,
        },
        {
            "lora": {"trainable_token_indices": NEW_IDS},
            "optimizer": lambda model: create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=8
            ),
            "schedule": {"lr_scheduler_type": "constant_with_warmup"},
        },
    ),
    # The adapters it starts with are the reference: without that the first loss would not be log 2.
    "dpo from adapters": (
        {
            "data.path": "pairs.jsonl",
            "train.method": "dpo",
            "lora.start": "start-rs",
            "lora.rslora": True,
            "train.scheduler": "constant",
            "train.save_every": 1,
        },
        {"start": True, "dpo": {"beta": 0.1}, "schedule": {"lr_scheduler_type": "constant_with_warmup"}},
    ),
}


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, data of three kinds, and adapters that plain PEFT has written."""
    root = tmp_path_factory.mktemp("methods")
    tiny_checkpoint(root / "tiny")
    tiny_checkpoint(root / "tied", tied=True)
    answers = ["the answer is yes", "no", "hello world, the answer is no"]
    lines(
        root / "rows.jsonl",
        [{"prompt": f"number {n}", "completion": f" {answers[n % 3]}"} for n in range(150)],
    )
    lines(
        root / "pairs.jsonl",
        [
            {
                "prompt": f"number {n}",
                "chosen": f" {answers[n % 3]}",
                "rejected": f" {answers[(n + 1) % 2] * (1 + n % 4)}",
            }
            for n in range(60)
        ],
    )
    lines(
        root / "tokens.jsonl",
        [
            {"prompt": f"number {n}<|im_start|>", "completion": f"<|tool|>{answers[n % 3]}<|tool|>"}
            for n in range(150)
        ],
    )
    lines(root / "text.jsonl", [{"text": f"{n} is a number, " * (4 + 9 * (n % 5))} for n in range(40)])
    values = {
        **BASE,
        "model": {"id": str(root / "tiny")},
        "data": {**BASE["data"], "path": str(root / "rows.jsonl")},
        "paths": {"models": str(root / "models"), "runs": str(root / "runs")},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(values))
    for name, rslora in (("start", False), ("start-rs", True)):
        from tests.train.in_one_launch import load, prepare

        model = stock.peft_model(
            prepare(load(root / "config.yaml")).folder, {"use_rslora": rslora}, None, seed=5
        )
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def runs(root):
    """Every case, trained by the same two ranks."""
    begin = []
    for name, (settings, _) in CASES.items():
        placed = {
            key: root / value if key in ("data.path", "lora.start", "model.id") else value
            for key, value in settings.items()
        }
        begin.append(begun(root / "config.yaml", name.replace(" ", "-").replace("+", "plus"), placed))
    killed = ("dpo from adapters", "tied tokens")
    resumed = train_all(begin, killed=[(list(CASES).index(name), 2) for name in killed])
    return {name: run for name, (run, _) in zip(CASES, begin, strict=True)} | {
        f"{name}, resumed": run for name, run in zip(killed, resumed, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_and_rates_are_those_of_the_plain_library(root, runs, name):
    run, (settings, told) = runs[name], CASES[name]
    mine = read_jsonl(run.metrics)
    options = {**told, "schedule": {"warmup_steps": 1, **told["schedule"]}}
    if options.pop("start", None):
        options["start"] = root / settings["lora.start"]
    losses, rates = stock.losses_and_rates(run, **options)
    assert [line["learning_rate"] for line in mine] == pytest.approx(rates, rel=1e-6)
    apart = [abs(line["loss"] - loss) for line, loss in zip(mine, losses, strict=True)]
    print(name, "apart", max(apart), losses)
    assert len(apart) == STEPS and max(apart) < TOLERANCE, (apart, losses)


# The same runs against libraries that are told otherwise: what is compared above can tell the method from its lack.
OTHERWISE = {
    "rslora": {"lora": {}},
    "lora+": {"optimizer": None},
    "start": {"start": None},
    "dpo": {"dpo": {"beta": 0.1}},
    "tokens": {"lora": {"trainable_token_indices": NEW_IDS}},  # the embedding's rows alone
    "tied tokens": {"lora": {}},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_without_the_method_the_library_has_other_losses(root, runs, name):
    run, (_, told) = runs[name], CASES[name]
    options = {**told, "schedule": {"warmup_steps": 1, **told["schedule"]}, **OTHERWISE[name]}
    losses, _ = stock.losses_and_rates(run, **options)
    mine = [line["loss"] for line in read_jsonl(run.metrics)]
    apart = max(abs(a - b) for a, b in zip(mine, losses, strict=True))
    assert apart > 20 * TOLERANCE, apart


def test_dpo_tells_its_own_numbers_apart_from_the_loss_of_the_answers(runs):
    run = runs["dpo"]
    first, last = (event for event in read_jsonl(run.events) if event["kind"] == "evaluation")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and last["loss"] < first["loss"] - 1e-3
    assert (
        last["chosen_loss"] > 1 and 0 <= last["accuracy"] <= 1 and last["pairs"] == 5
    )  # of six, one has two answers alike
    summary = read_json(run.summary)
    assert summary["held_out_dpo_loss"] == last["loss"]
    assert summary["held_out_loss"] == last["chosen_loss"]


def test_adapters_of_dpo_from_adapters_load_in_plain_peft_and_evaluate(root, runs):
    """rsLoRA and lora.start with them: export compares all tensors and the loss in a fresh process."""
    run = runs["dpo from adapters"]
    for command in ("export", "eval"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            arguments = [command, "--run", run.name, "--set", f"paths.runs={root / 'runs'}", "--json"]
            assert main(arguments) == 0
    found = json.loads(out.getvalue())
    assert found["held_out_rows"] == 5
    assert found["tuned"]["loss"] == pytest.approx(read_json(run.summary)["held_out_loss"], abs=TOLERANCE)
    config = read_json(run.adapters / "adapter_config.json")
    assert config["use_rslora"] is True
    card = (run.adapters / "README.md").read_text()
    assert "| method | DPO, beta 0.1, rsLoRA (alpha / sqrt(rank)), from the adapters of" in card
    assert "held-out loss of the chosen answers" in card
    trained, begun_with = (
        load_file(folder / "adapter_model.safetensors") for folder in (run.adapters, root / "start-rs")
    )
    assert all(
        torch.isfinite(t).all() and not torch.equal(t, begun_with[name]) for name, t in trained.items()
    )
    manifest = read_json(run.manifest)
    assert manifest["start"]["folder"] == str(root / "start-rs")
    # And those may be begun with in turn, by the name of the run.
    begun(
        root / "config.yaml",
        "again",
        {"lora.start": run.name, "lora.rslora": True, "data.path": root / "rows.jsonl"},
    )


@pytest.mark.parametrize("name", ["dpo from adapters", "tied tokens"])
def test_a_resumed_run_ends_as_the_whole_one(runs, name):
    """DPO with the reference that it began with, new tokens with their rows and moments."""
    whole, resumed = runs[name], runs[f"{name}, resumed"]
    assert [line["step"] for line in read_jsonl(resumed.metrics)] == [3]
    assert [line["loss"] for line in read_jsonl(resumed.metrics)] == [
        line["loss"] for line in read_jsonl(whole.metrics)
    ][2:]
    assert differing(whole.checkpoint(STEPS), resumed.checkpoint(STEPS)) == []


@pytest.mark.parametrize("name", ["tokens", "tied tokens"])
def test_new_tokens_are_exported_for_plain_peft_with_their_tokenizer(root, runs, name):
    """Export compares all tensors and the loss in a fresh process; eval decodes and counts with the new tokens."""
    run, tied = runs[name], name == "tied tokens"
    for command in ("export", "eval") if tied else ("export",):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            arguments = [command, "--run", run.name, "--set", f"paths.runs={root / 'runs'}", "--json"]
            assert main(arguments) == 0
    if tied:
        found = json.loads(out.getvalue())
        assert found["tuned"]["loss"] == pytest.approx(read_json(run.summary)["held_out_loss"], abs=TOLERANCE)
        assert found["tuned"]["loss"] < found["base"]["loss"] - 20 * TOLERANCE
        assert "<|tool|>" in found["samples"][0]["reference"]
    told = read_json(run.adapters / "adapter_config.json")["trainable_token_indices"]
    assert told == CASES[name][1]["lora"]["trainable_token_indices"]
    for folder in (run.adapters, run.folder / "tokenizer"):
        assert AutoTokenizer.from_pretrained(folder)("yes<|tool|>")["input_ids"][-1] == 299
    exported = load_file(run.adapters / "adapter_model.safetensors")
    rows = {key: value for key, value in exported.items() if "token_adapter" in key}
    assert len(rows) == (1 if tied else 2) and len(exported) == 2 * 7 * 2 + len(rows)
    original = load_file(root / ("tied" if tied else "tiny") / "model.safetensors")
    for key, value in rows.items():
        module = "lm_head" if "lm_head" in key else "model.embed_tokens"
        assert ((value - original[f"{module}.weight"][NEW_IDS]).abs().amax(1) > PEAK).all(), key
    # And those may be begun with in turn: their rows too.
    again = {"lora.start": run.name, "data.path": root / "tokens.jsonl", "lora.new_tokens": NEW_TOKENS}
    begun(root / "config.yaml", f"{run.name}-again", again)
    with pytest.raises(
        UserError, match=r"trainable_token_indices is .*, expected None: other adapters cannot"
    ):
        begun(root / "config.yaml", f"{run.name}-without", again | {"lora.new_tokens": []})


def test_a_text_that_is_split_is_packed_whole(runs):
    rows = MicroBatches.open(runs["text"].folder / "data", "train")
    documents = stock.documents([rows[number] for number in range(len(rows))])
    assert max(len(ids) for ids, _ in documents) == 64
    assert all(labels[0] == IGNORED and IGNORED not in labels[1:] for _, labels in documents)
    assert sum(ids[-1] == 0 for ids, _ in documents) == 36  # an EOS for each text that is not held out
