"""The other tool: plain transformers + PEFT on the plain quantised model, without a line of our engine.

Export, evaluation and chat load the model this way, so that what they say holds for anybody who loads the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches
from recipe.errors import UserError
from recipe.export.scores import Score
from recipe.export.scores import mean_loss as mean_of
from recipe.train.run import Run

Document = tuple[list[int], list[int]]  # input_ids, labels


def load_plain(model_folder: Path, dtype: torch.dtype, adapters: Path | None) -> PreTrainedModel | PeftModel:
    """A quantised or a plain model, spread over the GPUs there are, with the adapters of a PEFT folder on it."""
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model_folder)
    if hasattr(config, "quantization_config"):
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
    return with_adapters(model, [(adapters, 1.0)])


def with_adapters(
    model: PreTrainedModel, adapters: Sequence[tuple[str | Path, float]]
) -> PreTrainedModel | PeftModel:
    """The model with PEFT folders on it, each with a weight (1: as it was trained)."""
    if not adapters:
        return model
    names = ["default", *(f"other-{number}" for number in range(1, len(adapters)))]
    tuned = PeftModel.from_pretrained(model, str(adapters[0][0]))
    for name, (folder, _) in list(zip(names, adapters, strict=True))[1:]:
        tuned.load_adapter(str(folder), name)
    tuned.base_model.set_adapter(names if len(names) > 1 else names[0], inference_mode=True)
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                module.set_scale(name, weight)
    return tuned.eval()


def held_out_documents(run: Run) -> list[Document]:
    """The held-out rows of a run, one by one, as they were tokenised for training."""
    rows = MicroBatches.open(run.folder / "data", "held_out")
    documents = [document for number in range(len(rows)) for document in rows.documents_of(number)]
    # Of a pair the answer that is to be given.
    return documents[::2] if run.settings().train.method == "dpo" else documents


@torch.no_grad()
def token_scores(model, documents: Sequence[Document], pad: int, batch_size: int = 8) -> list[Score]:
    """Of each document, from padded batches and full logits: another way than the trainer's."""
    found: dict[int, Score] = {}
    ordered = sorted(range(len(documents)), key=lambda number: len(documents[number][0]))
    for start in range(0, len(ordered), batch_size):
        numbers = ordered[start : start + batch_size]
        batch = [documents[number] for number in numbers]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        for number, (_, labels), row in zip(numbers, batch, logits, strict=True):
            targets = torch.tensor(labels[1:], device=row.device)
            kept = targets != IGNORED
            mine = row[: len(targets)][kept].float()
            labelled = mine.gather(1, targets[kept, None])[:, 0]
            loss = (mine.logsumexp(1) - labelled).sum().item()
            gap = (mine.amax(1) - labelled).max().item() if kept.any() else 0.0
            found[number] = Score(loss, int(kept.sum()), gap)
    return [found[number] for number in range(len(documents))]


def mean_loss(model, documents: Sequence[Document], pad: int, batch_size: int = 8) -> float:
    """Mean cross-entropy per labelled token."""
    return mean_of(token_scores(model, documents, pad, batch_size))


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
def greedy(
    model, prompts: Sequence[list[int]], tokenizer, max_new_tokens: int, batch_size: int
) -> Iterator[list[int]]:
    """The tokens of each greedy answer, with the EOS that ends it; in batches padded on the left."""
    pad, end = pad_token(tokenizer), tokenizer.eos_token_id
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
            eos_token_id=end,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        for row in output[:, width:].tolist():
            yield row[: row.index(end) + 1] if end in row else row


def answers(
    model, prompts: Sequence[list[int]], tokenizer, max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    """Greedy answers as text."""
    for ids in greedy(model, prompts, tokenizer, max_new_tokens, batch_size):
        yield tokenizer.decode(ids, skip_special_tokens=True).strip()


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
