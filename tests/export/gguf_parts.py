"""Tiny models with the tokenizers of each family, and what transformers thinks of them, for the tests of GGUF files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recipe.export.gguf_vocab import PRE_TOKENIZERS, SPACE
from tests.models import CHAT_TEMPLATE, VOCAB, tiny_checkpoint

EXPRESSIONS = {name: steps for (steps, _), name in PRE_TOKENIZERS.items()}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PIECES = [
    "hello",
    "world",
    "don't",
    "WE'LL",
    "1234567",
    "3.14",
    "käse",
    "日本語",
    "🦙🦙",
    "foo_bar()",
    "x==y",
    "\n\n",
    "  ",
]
TEXT = " ".join(
    random.Random(0).choices([*PIECES, "the answer is yes", "system", "user", "assistant"], k=2000)
)
TRICKY = [
    "hello world",
    " leading and trailing ",
    "don't WE'LL I'M 'Re",
    "1 12 123 1234 12345678 3.14159 ²³ ٣٤",
    "käse 日本語のテキスト 🦙👍🏽 e\u0301",
    "line\n\n\n  indented\t\ttabs \r\n end   ",
    "if x==y: foo_bar(a[0], 'b')  # !!??...",
    "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
    "HelloWorldCamelCase ÄÖÜß",
    "a",
    "",
]


def byte_level(pre: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that splits texts as those do that llama.cpp calls `pre`."""
    steps = EXPRESSIONS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    before = [pre_tokenizers.Digits(individual_digits=True)] * ("digits" in steps)
    before += [pre_tokenizers.Split(Regex(s), "isolated") for s in steps if s not in ("digits", "gpt-2")]
    before += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt-2" in steps)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def sentencepiece(metaspace: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it in tokenizer.json: BPE over characters, what is unknown as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = tokenizer.from_str(tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()  # words, else whole texts would become tokens
    plain.train_from_iterator(
        [TEXT.replace("🦙", "").replace("日本語", "")],
        trainers.BpeTrainer(vocab_size=VOCAB - 8, special_tokens=special, show_progress=False),
    )
    described, trained = json.loads(tokenizer.to_str()), json.loads(plain.to_str())
    described["model"]["vocab"], described["model"]["merges"] = (
        trained["model"]["vocab"],
        trained["model"]["merges"],
    )
    # Bytes are tokens of the model, not special ones.
    described["added_tokens"] = [t for t in trained["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
# By name: the tokenizer, and what tiny_checkpoint is asked for.
MODELS = {
    "llama": (lambda: byte_level("gpt-2"), {"family": "llama"}),
    "smollm": (lambda: byte_level("smollm"), {"family": "llama", "tied": True}),
    "llama-3": (lambda: byte_level("llama-bpe", bos=True), {"family": "llama", "rope_parameters": LLAMA3}),
    "llama-biased": (lambda: byte_level("smaug-bpe"), {"family": "llama", "attention_bias": True}),
    "llama-2": (
        sentencepiece,
        {"family": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral": (
        lambda: sentencepiece("always"),
        {"family": "mistral", "sliding_window": 4096, "head_dim": 32},
    ),
    "mistral-nemo": (lambda: byte_level("tekken", bos=True), {"family": "mistral", "sliding_window": None}),
    "qwen2": (lambda: byte_level("qwen2"), {"family": "qwen2", "rope_parameters": YARN}),
    "qwen3": (lambda: byte_level("qwen2"), {"family": "qwen3", "tied": True, "head_dim": 32}),
    "yarn-with-factor": (
        lambda: byte_level("gpt-2"),
        {"family": "llama", "rope_parameters": YARN | {"attention_factor": 0.7}},
    ),
}


def small_model(folder: Path, name: str, **config) -> Path:
    tokenizer, options = MODELS[name]
    tiny_checkpoint(folder, **options | config)
    tokenizer().save_pretrained(folder)
    return folder


def documents(count: int = 3, length: int = 40) -> list[tuple[list[int], list[int]]]:
    """Random tokens; the first third is not counted."""
    draw = random.Random(1)
    rows = [[draw.randrange(8, VOCAB - 8) for _ in range(length + 30 * n)] for n in range(count)]
    return [(ids, [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in rows]


@torch.no_grad()
def plain_scores(model, documents) -> list[tuple[float, float]]:
    """Loss and gap of each document by transformers."""
    found = []
    for ids, labels in documents:
        logits, targets = model(torch.tensor([ids])).logits[0, :-1].double(), torch.tensor(labels[1:])
        counted = targets != -100
        right = logits[counted].gather(1, targets[counted, None])[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        found.append((loss.item(), (logits[counted].max(1).values - right).max().item()))
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
