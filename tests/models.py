"""Real parts for tests: tiny Hugging Face checkpoints with random weights, and real ranks to shard them over."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipe.prepare import prepare
from recipe.settings import from_dict

VOCAB = 512
EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a rank needs is imported once, in the server that the ranks are forked from: a start costs 0.1 s, not 6 s.
PRELOADED = [
    "tests.preload",
    "recipe.engine.load",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
]
RANK_TIMEOUT = datetime.timedelta(seconds=120)


def tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """A checkpoint as a hub has it: config, safetensors, tokenizer with EOS and chat template. Weights are random.

    family: llama, qwen2 (biases in q, k, v; random, not zero), qwen3 or mistral; `config` overrides its sizes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **sizes | config), dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1:  # large enough that every layer matters in the loss
                torch.nn.init.normal_(parameter, std=0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """Byte-level BPE: knows every text, and has an EOS token and a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["user assistant system hello world the answer is yes no " * 4],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[EOS, "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=CHAT_TEMPLATE)


def tiny_nf4(folder: Path, **options: Any) -> Path:
    """The folder of a tiny checkpoint that `recipe prepare` has quantised; options as in tiny_checkpoint."""
    source = tiny_checkpoint(folder / "source", **options)
    settings = from_dict({"model": {"id": str(source)}, "paths": {"models": str(folder / "models")}})
    return prepare(settings).folder


def source_of(prepared: Path) -> Path:
    """The unquantised checkpoint that a folder of tiny_nf4 was made from."""
    return prepared.parents[1] / "source"


def run_ranks(world: int, function: Callable[..., Any], *args: Any, method: str = "forkserver") -> list[Any]:
    """Call `function(mesh, *args)` on `world` real processes joined by gloo; what each returned, by rank.

    `function` stands at the top of a module. A rank that raises ends the others, and its traceback is the test's.
    method: "spawn" for ranks that use a GPU, which no forked process can where what it was forked from looked at one.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        torch.multiprocessing.start_processes(
            _rank, (world, scratch, function, args), nprocs=world, start_method=method
        )
        return [torch.load(_result(scratch, rank), weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, scratch: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world, timeout=RANK_TIMEOUT
    )
    mesh = dist.init_device_mesh("cpu", (world,))
    torch.save(function(mesh, *args), _result(scratch, rank))
    dist.barrier()
    dist.destroy_process_group()


def _result(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"rank{rank}.pt"
