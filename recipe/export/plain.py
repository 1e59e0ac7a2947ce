"""The other tool: plain transformers + PEFT on the plain quantised model, without a line of our engine.

Export, evaluation and chat load the model this way, so that what they say holds for anybody who loads the result. Where
the GPUs are too small for that, recipe/export/streamed.py puts the same modules together with layers in host RAM.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import psutil
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from recipe.data.encode import IGNORED
from recipe.data.pack import MicroBatches
from recipe.errors import UserError
from recipe.export.peftfolder import Weighted
from recipe.export.scores import Score
from recipe.export.scores import mean_loss as mean_of
from recipe.export.spread import FORWARD_TOKENS, LOSS_TOKENS, Document, Sizes, Spread, Work, place, rooms
from recipe.files import read_json
from recipe.plan.shapes import read_config, shape_from_config
from recipe.train.run import Run

RAM_SHARE, GPU_SHARE = 0.6, 0.7  # of what is free, for weights; the rest is for what is computed with them


def load_plain(
    model_folder: Path,
    dtype: torch.dtype,
    adapters: Path | Sequence[Weighted] | None,
    work: Work | None = None,
    cap_bytes: int | None = None,
) -> PreTrainedModel | PeftModel:
    """The NF4 model with the adapters of a PEFT folder on it, or of several, on the GPUs there are, else on the CPU.

    A model that is not quantised (a merged one, or the base that it came from) is spread by transformers itself.
    work: what will be asked of it at once, for which room is left. cap_bytes: of each GPU, at most. Layers that fit on
    no GPU stay in host RAM. Raises Refused where that is too small.
    """
    logging.disable_progress_bar()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # KV caches grow by every token
    chosen = [Weighted(adapters)] if isinstance(adapters, Path) else list(adapters or ())
    config = read_config(model_folder / "config.json")
    if "quantization_config" not in config:
        return with_adapters(_unquantised(model_folder, dtype), chosen)
    folders = [one.folder for one in chosen]
    spread = spread_of(model_folder, dtype, folders, work or Work(), cap_bytes)
    if spread.plain:
        model = _from_pretrained(model_folder, dtype, spread)
    else:
        from recipe.export.streamed import load_streamed

        print(f"the model is larger than GPU memory: {spread.describe()}", file=sys.stderr)
        model = load_streamed(model_folder, dtype, spread)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with bf16 instructions bitsandbytes repacks a layer in inference and computes in bf16, whatever
            # is asked for: 1e-3 of held-out loss. What is compared here must be computed in `dtype`.
            module.support_avx512bf16_for_cpu = False
    return with_adapters(model, chosen)


def with_adapters(model: PreTrainedModel, adapters: Sequence[Weighted]) -> PreTrainedModel | PeftModel:
    if not adapters:
        return model.eval()
    names = ["default", *(f"other-{number}" for number in range(1, len(adapters)))]
    tuned = PeftModel.from_pretrained(model, str(adapters[0].folder))
    for name, one in list(zip(names, adapters, strict=True))[1:]:
        tuned.load_adapter(str(one.folder), name)
    tuned.base_model.set_adapter(names if len(names) > 1 else names[0], inference_mode=True)
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            for name, one in zip(names, adapters, strict=True):
                module.set_scale(name, one.weight)
    return tuned.eval()


def spread_of(
    model_folder: Path,
    dtype: torch.dtype,
    adapters: Sequence[Path],
    work: Work,
    cap_bytes: int | None = None,
) -> Spread:
    """Where the model's parts are to lie on this machine."""
    config = model_folder / "config.json"
    described = read_config(config)
    nested = described.get("quantization_config", {}).get("bnb_4bit_use_double_quant", True)
    adapter_bytes = sum((folder / "adapter_model.safetensors").stat().st_size for folder in adapters)
    trained_tokens = any(
        read_json(folder / "adapter_config.json").get("trainable_token_indices") for folder in adapters
    )
    shape = shape_from_config(described, str(config))
    sizes = Sizes.of(shape, nested, dtype, work, adapter_bytes, trained_tokens)
    return place(sizes, rooms(cap_bytes) if torch.cuda.is_available() else [])


def _from_pretrained(model_folder: Path, dtype: torch.dtype, spread: Spread) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(model_folder)
    # The checkpoint names the dtype that GPUs compute in; here it is the run's.
    config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, config=config, dtype=dtype, device_map=spread.device_map
    )
    # transformers keeps the stored dtype of what a quantised checkpoint holds unquantised, whatever `dtype` says.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _unquantised(model_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Over GPUs, host RAM and, what fits in neither, as files that are read again in every pass."""
    room = _room()
    if len(room) == 1 and fits_in_memory(model_folder, dtype):
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, device_map={"": "cpu"})
    beside = tempfile.mkdtemp(prefix="offload-")  # for what is in no safetensors file: as a rule nothing
    atexit.register(shutil.rmtree, beside, ignore_errors=True)
    return AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=dtype,
        device_map="auto",
        max_memory=room,
        offload_folder=beside,
    )


def fits_in_memory(model_folder: Path, dtype: torch.dtype) -> bool:
    """Whether a 16-bit checkpoint has room on GPUs and in host RAM. Else it is read from the disk in every pass, which
    plain transformers can do and PEFT cannot."""
    size = sum(path.stat().st_size for path in model_folder.glob("*.safetensors")) * dtype.itemsize / 2
    return size < sum(_room().values())


def _room() -> dict[int | str, int]:
    """Bytes for weights, by GPU and of host RAM."""
    room: dict[int | str, int] = {
        gpu: max(0, int(torch.cuda.mem_get_info(gpu)[0] * GPU_SHARE))
        for gpu in range(torch.cuda.device_count())
    }
    return {**room, "cpu": int(psutil.virtual_memory().available * RAM_SHARE)}


def held_out_documents(run: Run) -> list[Document]:
    """The held-out rows of a run, one by one, as they were tokenised for training."""
    rows = MicroBatches.open(run.folder / "data", "held_out")
    documents = [document for number in range(len(rows)) for document in rows.documents_of(number)]
    # Of a pair the answer that is to be given.
    return documents[::2] if run.settings().train.method == "dpo" else documents


@torch.no_grad()
def token_scores(model, documents: Sequence[Document], pad: int, batch_size: int = 8) -> list[Score]:
    """Of each document, from padded batches and full logits: another way than the trainer's."""
    found: list[Score | None] = [None] * len(documents)
    ordered = sorted(range(len(documents)), key=lambda number: len(documents[number][0]))
    for numbers in _batches(ordered, [len(ids) for ids, _ in documents], batch_size):
        batch = [documents[number] for number in numbers]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        logits = model(input_ids=ids.to(device_of(model)), attention_mask=mask.to(device_of(model))).logits
        for number, (_, labels), row in zip(numbers, batch, logits, strict=True):
            found[number] = _score(row, torch.tensor(labels[1:], device=row.device))
    return [score for score in found if score is not None]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> Score:
    """Of one text, from its logits (tokens, vocabulary) and the token that comes after each, IGNORED where none counts."""
    loss, gap = 0.0, 0.0
    places = (targets != IGNORED).nonzero()[:, 0]
    for some in places.split(LOSS_TOKENS):  # in fp32 they would take three times the room
        mine = logits[some].float()
        labelled = mine.gather(1, targets[some, None])[:, 0]
        loss += (mine.logsumexp(1) - labelled).sum().item()
        gap = max(gap, (mine.amax(1) - labelled).max().item())
    return Score(loss, len(places), gap)


def device_of(model) -> torch.device:
    """Where tokens are to lie; of a model whose parameters are read from the disk, where accelerate fetches them from."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def mean_loss(model, documents: Sequence[Document], pad: int, batch_size: int = 8) -> float:
    """Mean cross-entropy per labelled token."""
    return mean_of(token_scores(model, documents, pad, batch_size))


def _batches(numbers: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Of up to `batch_size` texts in ascending length, and of FORWARD_TOKENS tokens where one text is not longer."""
    batch: list[int] = []
    for number in numbers:
        if len(batch) == batch_size or (batch and lengths[number] * (len(batch) + 1) > FORWARD_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


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
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device_of(model))
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device_of(model)
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=end,
            **GREEDY,
            **in_pieces(len(batch), width),
        )
        for row in output[:, width:].tolist():
            yield row[: row.index(end) + 1] if end in row else row


def answers(
    model, prompts: Sequence[list[int]], tokenizer, max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    """Greedy answers as text."""
    for ids in greedy(model, prompts, tokenizer, max_new_tokens, batch_size):
        yield tokenizer.decode(ids, skip_special_tokens=True).strip()


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def in_pieces(rows: int, width: int) -> dict[str, int]:
    """An option of `generate` for prompts of `width` tokens: no more than FORWARD_TOKENS pass the layers at once."""
    return {"prefill_chunk_size": max(1, FORWARD_TOKENS // rows)} if rows * width > FORWARD_TOKENS else {}


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
    folder = run.folder / "checkpoints" / read_json(run.summary)["checkpoint"]
    if damaged := damaged_files(folder):
        raise UserError(f"{folder}: {', '.join(damaged)} is missing or damaged; train again or restore it")
    return folder
