"""The other tool: plain transformers + PEFT on the plain quantised model, without a line of our engine.

Export, evaluation and chat load the model this way, so that what they say holds for anybody who loads the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches
from recipe.errors import UserError
from recipe.train.run import Run

Document = tuple[list[int], list[int]]  # input_ids, labels


def load_plain(model_folder: Path, dtype: torch.dtype, adapters: Path | None) -> PreTrainedModel | PeftModel:
    """The NF4 model, spread over the GPUs there are, with the adapters of a PEFT folder on it."""
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model_folder)
    # The checkpoint names the dtype that GPUs compute in; here it is the run's.
    config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    place = {"": "cpu"} if not torch.cuda.is_available() else "auto"
    model = AutoModelForCausalLM.from_pretrained(model_folder, config=config, dtype=dtype, device_map=place)
    # transformers keeps the stored dtype of what a quantised checkpoint holds unquantised, whatever `dtype` says.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with bf16 instructions bitsandbytes repacks a layer in inference and computes in bf16, whatever
            # is asked for: 1e-3 of held-out loss. What is compared here must be computed in `dtype`.
            module.support_avx512bf16_for_cpu = False
    model.eval()
    if adapters is None:
        return model
    return PeftModel.from_pretrained(model, str(adapters)).eval()


def held_out_documents(run: Run) -> list[Document]:
    """The held-out rows of a run, one by one, as they were tokenised for training."""
    rows = MicroBatches.open(run.folder / "data", "held_out")
    documents = [document for number in range(len(rows)) for document in rows.documents_of(number)]
    # Of a pair the answer that is to be given.
    return documents[::2] if run.settings().train.method == "dpo" else documents


@torch.no_grad()
def mean_loss(model, documents: list[Document], pad: int, batch_size: int = 8) -> float:
    """Mean cross-entropy per labelled token, from padded batches and full logits: another way than the trainer's."""
    total, count = 0.0, 0
    ordered = sorted(documents, key=lambda document: len(document[0]))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        targets = labels[:, 1:].to(logits.device)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += losses.item()
        count += int((targets != IGNORED).sum())
    return total / max(count, 1)


def prompts_and_answers(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], str]]:
    """For each document the tokens before its first labelled one, and the labelled text that follows."""
    pairs = []
    for ids, labels in documents:
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        last = next((i for i in range(first, len(labels)) if labels[i] == IGNORED), len(labels))
        if first > 1:
            pairs.append((ids[:first], tokenizer.decode(ids[first:last], skip_special_tokens=True).strip()))
    return pairs


@torch.no_grad()
def answers(
    model, prompts: list[list[int]], tokenizer, max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    """Greedy answers, in batches padded on the left."""
    pad = pad_token(tokenizer)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(len(ids) for ids in batch)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        for row in output[:, width:]:
            yield tokenizer.decode(row, skip_special_tokens=True).strip()


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@contextmanager
def adapters_off(model, off: bool) -> Iterator[None]:
    if off and isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def finished_checkpoint(run: Run) -> Path:
    """The checkpoint that a finished run ended with, its hashes checked. Raises UserError where there is none."""
    from recipe.train.checkpoint import damaged_files

    if not run.finished:
        raise UserError(f"RUN={run.name}: is not finished; go on with `make train RUN={run.name}` first")
    from recipe.files import read_json

    folder = run.folder / "checkpoints" / read_json(run.summary)["checkpoint"]
    if damaged := damaged_files(folder):
        raise UserError(f"{folder}: {', '.join(damaged)} is missing or damaged; train again or restore it")
    return folder
