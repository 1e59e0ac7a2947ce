"""Run in a fresh process after every export: load it by the other tool and say what that makes of given texts.

python -m recipe.export.verify REQUEST.json ANSWER.json

The other tool is plain transformers (with PEFT) or llama.cpp. The request holds tokens, not a run: this process shares no
state with the one that wrote the export, and what it says can be compared between tools.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipe.files import read_json, write_json

BATCH = 8  # prompts answered at once


def main(request_file: str, answer_file: str) -> None:
    request = read_json(Path(request_file))
    tool = llama_cpp if request["tool"] == "llama.cpp" else plain
    write_json(Path(answer_file), tool(request))


def plain(request: dict[str, Any]) -> dict[str, Any]:
    """Plain transformers on `model`, with the PEFT folders `adapters` ([folder, weight] each) on it."""
    import torch
    from transformers import AutoTokenizer

    from recipe.export.peftfolder import Weighted
    from recipe.export.plain import greedy, load_plain, pad_token, token_scores
    from recipe.export.spread import Work

    adapters = [Weighted(Path(folder), weight) for folder, weight in request["adapters"]]
    documents = [(ids, labels) for ids, labels in request["documents"]]
    work = Work.of(request["prompts"], documents, request["max_new_tokens"], BATCH)
    model = load_plain(Path(request["model"]), getattr(torch, request["dtype"]), adapters, work)
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    found = {
        "different": _different(model, adapters),
        "answers": list(greedy(model, request["prompts"], tokenizer, request["max_new_tokens"], BATCH)),
        **_tokenised(
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in request["texts"]],
            request["texts"],
        ),
        "chat_template": tokenizer.chat_template,
    }
    # As the prompts are answered in batches padded on the left, and the answers then scored in one pass padded on the right,
    # what a cache or a mask gets wrong is seen too.
    documents += [
        answered(ids, reply) for ids, reply in zip(request["prompts"], found["answers"], strict=True)
    ]
    scores = token_scores(model, documents, pad_token(tokenizer))
    return found | {"scores": [[score.loss, score.tokens, score.gap] for score in scores]}


def llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp on the GGUF file `model`, with the GGUF adapter `lora` on it."""
    from recipe.export import llamacpp

    model = Path(request["model"])
    lora = Path(request["lora"]) if request["lora"] else None
    scores = llamacpp.token_scores(model, request["documents"], lora)
    tokens = llamacpp.tokenise(model, [text for text, _ in request["texts"]])
    return {
        "different": [],
        "answers": [],
        **_tokenised(tokens, request["texts"]),
        "chat_template": llamacpp.chat_template(model),
        "scores": [[score.loss, score.tokens, score.gap] for score in scores],
    }


def answered(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """A document of which only the answer counts."""
    from recipe.data.encode import IGNORED

    return [*prompt, *answer], [IGNORED] * len(prompt) + answer


def _tokenised(found: list[list[int]], texts: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """The first text that becomes other tokens than it should, None where there is none."""
    wrong = next((text for (text, ids), other in zip(texts, found, strict=True) if other != ids), None)
    return {"tokenised_otherwise": wrong}


def _different(model, adapters: list[Any]) -> list[str]:
    """Tensors of the one adapter folder that are not in the model as they stand in the file."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    if len(adapters) != 1:
        return []
    written = load_file(adapters[0].folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    return sorted(written.keys() ^ loaded.keys()) + sorted(
        name
        for name in written.keys() & loaded.keys()
        if not torch.equal(written[name].float(), loaded[name].cpu().float())
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
