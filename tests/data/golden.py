"""What each chat template makes of two conversations: token by token, and which are in the loss.

python -m tests.data.golden        # writes tests/data/golden/*.txt anew; look at what changed
"""

from __future__ import annotations

import re
from pathlib import Path

import trl
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipe.data.encode import IGNORED, encode
from recipe.data.rows import checked
from recipe.settings import Data

FOLDER = Path(__file__).parent / "golden"
OURS = Path(__file__).parent / "templates"
TRL = Path(trl.__file__).parent / "chat_templates"  # the models' own, as TRL carries them
PIECES = r" ?\w+|\s|[^\w\s]"
TURNS = ("completion", "assistant", "all")

# name: file of the template, BOS, EOS
TEMPLATES = {
    "llama-3": (TRL / "llama3.jinja", "<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.1": (TRL / "llama3_1.jinja", "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (OURS / "mistral.jinja", "<s>", "</s>"),
    "qwen2.5": (TRL / "qwen2_5.jinja", None, "<|im_end|>"),
    "chatml": (OURS / "chatml.jinja", None, "<|im_end|>"),
    "smollm2": (OURS / "smollm2.jinja", None, "<|im_end|>"),
}
SPECIAL = [
    *(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ),
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
TALK = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it late?"},
        {"role": "assistant", "content": "Yes, it is."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Later."},
    ]
}
WEATHER = {"name": "weather", "description": "now", "parameters": {"type": "object"}}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"place": "Bonn"}'},
}
TOOLS = {
    "tools": [{"type": "function", "function": WEATHER}],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Rain in Bonn?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": "dry"},
        {"role": "assistant", "content": "No rain."},
    ],
}
CONVERSATIONS = {"talk": TALK, "tools": TOOLS}
WITH_TOOLS = ("llama-3.1", "mistral", "qwen2.5")
CASES = [(name, talk) for name in TEMPLATES for talk in CONVERSATIONS if talk == "talk" or name in WITH_TOOLS]


def tokenizer_for(file: Path, bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    """A word is a token, so that a person can read them."""
    texts = [
        file.read_text().replace("\\n", "\n"),
        str(CONVERSATIONS),
        '{}[]":,.?\\ \n',
        *" abcdefghijklmnopqrstuvwxyz",
    ]
    words = sorted({word for text in texts for word in re.findall(PIECES, text)})
    words = sorted({*words, *(f" {word}" for word in words), *(word.strip() for word in words)} - {""})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    found.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL if t not in (bos, eos)]})
    found.chat_template = file.read_text()
    return found


def golden(name: str, talk: str) -> str:
    """A token to a line, with a bar before those in the loss."""
    tokenizer = tokenizer_for(*TEMPLATES[name])
    lines = []
    for train_on in TURNS:
        ids, labels = encode(checked(CONVERSATIONS[talk], talk), Data(train_on=train_on), tokenizer)
        lines.append(f"--- train_on: {train_on}")
        for token, label in zip(tokenizer.convert_ids_to_tokens(ids), labels, strict=True):
            lines.append(f"{' ' if label == IGNORED else '|'} {token!r}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    for name, talk in CASES:
        (FOLDER / f"{name}-{talk}.txt").write_text(golden(name, talk))


if __name__ == "__main__":
    main()
