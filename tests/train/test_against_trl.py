"""Fifty steps of the demo model: our trainer on our engine against stock TRL + PEFT + bitsandbytes on one process.

The same rows, adapters and order of data; nothing else is shared: stock TRL gets the documents of a row as a padded
batch, and computes whole logits by autograd.
"""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from recipe.cli import main
from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches, WholeBatches
from recipe.engine.build import initial_lora, peft_config
from recipe.export.plain import load_plain
from recipe.files import read_json
from recipe.train.run import Run, read_jsonl

pytestmark = pytest.mark.slow
STEPS = 50
TOKENS = 192
CONFIG = "recipe/configs/smollm2-135m.yaml"
SETTINGS = {
    "lora.dropout": 0,
    "train.learning_rate": 5e-4,
    "train.steps": STEPS,
    "train.global_batch_tokens": TOKENS,
    "train.micro_batch_tokens": TOKENS,
    "train.save_every": STEPS,
    "data.max_length": TOKENS,
    "data.overlong": "drop",
    "compute.processes": 1,
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The run that `recipe train` has made."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = [f"--set={key}={value}" for key, value in (SETTINGS | {"paths.runs": runs}).items()]
    assert main(["train", "--config", CONFIG, "--run", "ours", *overrides]) == 0
    return Run(runs / "ours")


class Padded:
    """A packed row as a batch of its documents, padded on the right: what stock TRL trains on."""

    def __call__(self, features):
        (row,) = features
        width = max(row["seq_lengths"])
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        start = 0
        for length in row["seq_lengths"]:
            piece, padding = slice(start, start + length), width - length
            batch["input_ids"].append(row["input_ids"][piece] + [0] * padding)
            batch["labels"].append(row["labels"][piece] + [IGNORED] * padding)
            batch["attention_mask"].append([1] * length + [0] * padding)
            start += length
        return {name: torch.tensor(rows) for name, rows in batch.items()}


def stock(run):
    """The losses of plain TRL on the rows of `run`."""
    settings = run.settings()
    folder = Path(read_json(run.manifest)["model"]["folder"])
    model = get_peft_model(load_plain(folder, torch.float32, None), peft_config(settings.lora))
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes rounds to the checkpoint's dtype in the backward pass only, whatever it computes in.
            module.weight.quant_state.dtype = torch.float32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(
                    initial_lora(name.removesuffix(".weight"), tuple(parameter.shape), settings.train.seed)
                )
    packed = MicroBatches.open(run.folder / "data", "train")
    # In the order that our trainer's own sampler gives; TRL shuffles no more.
    rows = Dataset.from_list([packed[number] for number in WholeBatches(len(packed), 1, settings.train.seed)])
    assert len(rows) >= STEPS
    set_seed(settings.train.seed)
    arguments = SFTConfig(
        output_dir=str(run.folder / "stock"),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=settings.train.learning_rate,
        lr_scheduler_type=settings.train.scheduler,
        warmup_steps=settings.train.warmup_steps,
        weight_decay=settings.train.weight_decay,
        max_grad_norm=settings.train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=settings.train.seed,
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=arguments, data_collator=Padded(), train_dataset=rows)
    # TRL casts the adapters of a quantised model to bf16; ours are fp32 masters.
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(
                    initial_lora(name.removesuffix(".weight"), tuple(parameter.shape), settings.train.seed)
                )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_loss_curve_is_that_of_stock_trl(ours):
    mine = [line["loss"] for line in read_jsonl(ours.metrics)]
    theirs = stock(ours)
    assert len(mine) == len(theirs) == STEPS
    assert mine[-1] < 0.5 * mine[0]  # it learns, so that equal is not equally still
    apart = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    print(json.dumps({"apart": max(apart), "first": mine[0], "last": mine[-1]}))
    assert max(apart) < 1e-3, apart  # 3.5e-5 was measured; more at a higher rate, which amplifies rounding
