"""The other tool for whole trainings: stock TRL, PEFT and transformers on one process, on the rows of a run of ours.

It gets the documents of packed rows as padded batches, and shares neither arithmetic nor schedule nor optimizer with us.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches, WholeBatches
from recipe.engine.build import initial_lora
from recipe.export.plain import load_plain
from recipe.files import read_json
from recipe.settings import PROJECTIONS
from recipe.train.run import Run

ROWS_PER_STEP = 4  # packed rows, of all ranks and micro-batches

Optimizer = Callable[[PeftModel], torch.optim.Optimizer]


def losses_and_rates(
    run: Run,
    schedule: dict[str, Any],
    lora: dict[str, Any] | None = None,
    start: Path | None = None,
    optimizer: Optimizer | None = None,
    dpo: dict[str, Any] | None = None,
) -> tuple[list[float], list[float]]:
    """Loss and learning rate of each step. schedule, lora, dpo: arguments of the libraries, written by hand."""
    settings = run.settings()
    folder = Path(read_json(run.manifest)["model"]["folder"])
    model = peft_model(folder, lora or {}, start, settings.train.seed)
    begun_with = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = in_order(run)
    assert len(rows) >= ROWS_PER_STEP * settings.train.steps  # within the first epoch
    arguments: dict[str, Any] = {
        "output_dir": str(run.folder / "stock"),
        "max_steps": settings.train.steps,
        "learning_rate": settings.train.learning_rate,
        "weight_decay": settings.train.weight_decay,
        "max_grad_norm": settings.train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": settings.train.seed,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "max_length": None,
        "report_to": [],
        "disable_tqdm": True,
        **schedule,
    }
    set_seed(settings.train.seed)
    optimizers = (optimizer(model) if optimizer else None, None)
    if dpo is None:
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(
                per_device_train_batch_size=1,
                gradient_accumulation_steps=ROWS_PER_STEP,
                dataset_kwargs={"skip_prepare_dataset": True},
                **arguments,
            ),
            data_collator=padded,
            train_dataset=rows,
            optimizers=optimizers,
        )
    else:
        trainer = Pairs(
            model=model,
            args=DPOConfig(per_device_train_batch_size=ROWS_PER_STEP, **dpo, **arguments),
            data_collator=padded_pairs,
            train_dataset=rows,
            optimizers=optimizers,
        )
    # TRL casts the adapters of a quantised model to bf16; ours are fp32 masters.
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name in begun_with:
            parameter.data = begun_with[name.replace(".ref.", ".default.")].clone()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line["loss"] for line in lines], [line["learning_rate"] for line in lines]


def in_order(run: Run) -> Dataset:
    """The packed rows of a run as the sampler of our trainer orders them; TRL shuffles no more."""
    packed = MicroBatches.open(run.folder / "data", "train")
    order = WholeBatches(len(packed), ROWS_PER_STEP, run.settings().train.seed)
    return Dataset.from_list([packed[number] for number in order])


def peft_model(folder: Path, lora: dict[str, Any], start: Path | None, seed: int) -> PeftModel:
    """Plain PEFT on the quantised model in fp32, with new adapters or those of a folder."""
    base = load_plain(folder, torch.float32, None)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes rounds to the checkpoint's dtype in the backward pass only, whatever it computes in.
            module.weight.quant_state.dtype = torch.float32
    if start is not None:
        return PeftModel.from_pretrained(base, str(start), is_trainable=True).train()
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(base, LoraConfig(**options)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(initial_lora(name.removesuffix(".weight"), tuple(parameter.shape), seed))
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None  # TRL's loss asks for it, and PEFT's wrapper around trained rows has none
    return model


class Pairs(DPOTrainer):
    """DPOTrainer for rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def documents(features: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document of packed rows."""
    found = []
    for row in features:
        start = 0
        for length in row["seq_lengths"]:
            piece = slice(start, start + length)
            found.append((row["input_ids"][piece], row["labels"][piece]))
            start += length
    return found


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return _padded(documents(features))


def padded_pairs(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As TRL's own collator has them: all that are chosen, then all that are rejected."""
    found = documents(features)
    batch = _padded(found[0::2] + found[1::2])
    batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
    return batch


def _padded(found: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in found)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in found]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in found]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in found]),
    }
