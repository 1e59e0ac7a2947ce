"""The other ways to do it, with a model of random NF4 weights of the true shape.

article, fsdp_qlora: FSDP2 with every decoder layer offloaded to pinned host RAM, transformers' own layers, loss and
gradient checkpointing, all logits at once. Where the originals leave a choice, they get the cheaper one: the
embedding is looked up in host RAM and never gathered, the head stays on the GPUs.
trl: TRL's SFTTrainer on one GPU that holds the whole model.

Each layer is filled, quantised and sharded before the next one exists, so that no rank ever holds the model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipe.bench.spec import Spec
from recipe.engine.random import random_config

if TYPE_CHECKING:
    from recipe.bench.worker import Clock

IGNORED = -100
LEARNING_RATE = 1e-4
# PEFT's own choice for a 4-bit base, which the article's "mixed_precision: no" leaves as it is.
ADAPTER_DTYPE = torch.float32


class Program(Protocol):
    """A model in training, driven by the worker a micro-batch at a time."""

    def step(self, input_ids_row: torch.Tensor, document_lengths: list[int]) -> torch.Tensor: ...

    def optimizer_step(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...


class SelfDriven(Protocol):
    """One with a training loop of its own, which tells the clock when a step begins and ends."""

    def train(self, clock: Clock) -> list[float]: ...

    def describe(self) -> dict[str, Any]: ...


def compute_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU, whose bf16 matmul is slow and often missing."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def meta_model(spec: Spec, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model on the meta device, its projections as bitsandbytes' NF4 linears; nothing trainable."""
    shape = spec.shape
    # Embedding and head lie in different places below.
    config = random_config(dataclasses.replace(shape, tied=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        for name, module in list(model.model.named_modules()):
            if name.rpartition(".")[2] in shape.linears:
                model.model.set_submodule(name, _nf4_linear(module, dtype))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # as PEFT and TRL know a quantised model
    return model


def _nf4_linear(module: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """The storage dtype is the one that FSDP2 gathers in: a cast would destroy the packed bytes."""
    return bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=dtype,
        device="meta",
    )


def lora_config(spec: Spec) -> LoraConfig:
    return LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_rank,
        lora_dropout=spec.dropout,
        target_modules=list(spec.shape.linears),
        bias="none",
        task_type="CAUSAL_LM",
    )


def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in place of the meta parameters, quantised where they belong to an NF4 linear."""
    for name, part in module.named_modules():
        for key, old in list(part.named_parameters(recurse=False)):
            if not old.is_meta:
                continue
            adapter = ".lora_A." in name or ".lora_B." in name
            if isinstance(part, bnb.nn.Linear4bit) and key == "weight":
                new = _random(torch.Size((part.out_features, part.in_features)), device, dtype)
                part.weight = bnb.nn.Params4bit(
                    new,
                    requires_grad=False,
                    quant_storage=dtype,
                    quant_type="nf4",
                    compress_statistics=True,
                    module=part,
                ).to(device)
                part.quant_state = part.weight.quant_state  # FSDP2 keeps the bytes only
                continue
            if ".lora_B." in name or key == "bias":
                new = torch.zeros(old.shape, device=device, dtype=ADAPTER_DTYPE if adapter else dtype)
            elif old.dim() == 1:
                new = torch.ones(old.shape, device=device, dtype=dtype)
            else:
                new = _random(old.shape, device, ADAPTER_DTYPE if adapter else dtype)
            setattr(part, key, nn.Parameter(new, requires_grad=old.requires_grad))


def _random(size: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, device=device, dtype=dtype).normal_(0, 0.02)


def positions_of(document_lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """(1, tokens), counting from 0 in each document: transformers then keeps them apart. None for a single one."""
    if len(document_lengths) == 1:
        return None
    return torch.cat([torch.arange(length, device=device) for length in document_lengths])[None]


def labels_of(row: torch.Tensor, document_lengths: list[int]) -> torch.Tensor:
    """(1, tokens): every token but the first of each document is to be predicted."""
    labels = row.clone()
    starts = torch.tensor([0, *document_lengths[:-1]]).cumsum(0)
    labels[starts.to(row.device)] = IGNORED
    return labels[None]


class Offloaded:
    """FSDP2 with every decoder layer in host RAM between its uses: the article's way, and fsdp_qlora's."""

    def __init__(self, spec: Spec, device: torch.device, mesh: DeviceMesh):
        self.device = device
        dtype = compute_dtype(device)
        base = meta_model(spec, dtype)
        with torch.device("meta"):
            self.model = get_peft_model(base, lora_config(spec), low_cpu_mem_usage=True)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        host = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for index, layer in enumerate(base.model.layers):
            # Ranks shard what each of them has filled, so they must have filled it alike.
            torch.manual_seed(spec.seed + index)
            fill(layer, device, dtype)
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=host)
        torch.manual_seed(spec.seed + spec.shape.layers)
        fill(base.lm_head, device, dtype)
        fully_shard(base.lm_head, mesh=mesh, reshard_after_forward=False)
        self.embedding = _random(torch.Size((spec.shape.vocab, spec.shape.hidden)), device, dtype).cpu()
        base.model.embed_tokens = nn.Identity()
        fill(base.model.norm, device, dtype)
        base.model.rotary_emb = type(base.model.rotary_emb)(base.config).to(device)
        # Without a sharded root every layer is its own, with streams of its own and no prefetch.
        fully_shard(self.model, mesh=mesh)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
        self.layers = spec.shape.layers
        torch.manual_seed(spec.seed + mesh.get_local_rank())  # dropout

    def step(self, input_ids_row: torch.Tensor, document_lengths: list[int]) -> torch.Tensor:
        embedded = F.embedding(input_ids_row[None], self.embedding).to(self.device)
        loss = self.model(
            inputs_embeds=embedded,
            position_ids=positions_of(document_lengths, self.device),
            labels=labels_of(input_ids_row, document_lengths).to(self.device),
            use_cache=False,
        ).loss
        loss.backward()
        return loss.detach()

    def optimizer_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def describe(self) -> dict[str, Any]:
        return {"offloaded_layers": self.layers, "attention": "sdpa", "adapters": str(ADAPTER_DTYPE)[6:]}


class Trl:
    """SFTTrainer with bitsandbytes and PEFT, as its documentation has it, on random rows of one length."""

    def __init__(self, spec: Spec, device: torch.device, mesh: DeviceMesh | None):
        self.spec, self.device = spec, device
        dtype = compute_dtype(device)
        torch.manual_seed(spec.seed)
        self.model = meta_model(spec, dtype)
        fill(self.model, device, dtype)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config).to(device)

    def train(self, clock: Clock) -> list[float]:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        class Timed(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                clock.begin()

            def on_step_end(self, *args, **kwargs):
                clock.end()

        spec = self.spec
        words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
        rows = [clock.row().tolist() for _ in range(spec.total_steps * spec.micro_batches)]
        with tempfile.TemporaryDirectory(prefix="recipe-bench-trl-") as folder:
            trainer = SFTTrainer(
                model=self.model,
                args=SFTConfig(
                    output_dir=folder,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=spec.micro_batches,
                    max_steps=spec.total_steps,
                    learning_rate=LEARNING_RATE,
                    optim="adamw_torch_fused",
                    bf16=self.device.type == "cuda",
                    use_cpu=self.device.type == "cpu",
                    gradient_checkpointing=True,
                    gradient_checkpointing_kwargs={"use_reentrant": False},
                    max_length=None,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    remove_unused_columns=False,
                    logging_steps=1,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    seed=spec.seed,
                ),
                train_dataset=Dataset.from_dict({"input_ids": rows}),
                data_collator=self._collate,
                processing_class=PreTrainedTokenizerFast(
                    tokenizer_object=words, eos_token="<end>", pad_token="<end>"
                ),
                peft_config=lora_config(spec),
                callbacks=[Timed()],
            )
            trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        row = torch.tensor(rows[0]["input_ids"])
        lengths = self.spec.document_lengths
        batch = {"input_ids": row[None], "labels": labels_of(row, lengths)}
        positions = positions_of(lengths, row.device)
        return batch | (
            {"attention_mask": torch.ones_like(row)[None]}
            if positions is None
            else {"position_ids": positions}
        )

    def describe(self) -> dict[str, Any]:
        return {"offloaded_layers": 0, "attention": "sdpa", "adapters": "bfloat16"}


def _ours(spec: Spec, device: torch.device, mesh: DeviceMesh) -> Program:
    from recipe.bench.ours import Ours

    return Ours(spec, device, mesh)


# build(spec, device, mesh) -> Program or SelfDriven; mesh is None for those of spec.ONE_RANK.
VARIANTS: dict[str, Callable[..., Any]] = {
    "ours": _ours,
    "article": Offloaded,
    "fsdp_qlora": Offloaded,
    "trl": Trl,
}
