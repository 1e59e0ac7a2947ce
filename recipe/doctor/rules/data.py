"""Data, tokenizer and labels."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Line, Mark

TOO_LONG = "rows are longer than data.max_length"
IGNORED = "This instance will be ignored in loss calculation"
MANY = 10  # rows; TRL warns of each, and a few are no reason to fail


def longer(case: Case) -> str:
    for line in case.found(TOO_LONG):
        if tokens := re.search(r"has (\d+) tokens", line.text):
            return f"--set data.max_length={tokens[1]}, or --set data.overlong=drop, or =truncate"
    return "--set data.max_length=N, or --set data.overlong=drop, or =truncate"


def _many_ignored(case: Case) -> list[Line]:
    return case.found(IGNORED) if len(case.found(IGNORED)) >= MANY else []


RULES = (
    Rule(
        "malformed_row",
        "A row of the data cannot be read",
        "It is no JSON object of a known shape; one broken line is enough.",
        "mend the row that is named; `python -c 'import json,sys; [json.loads(l) for l in open(sys.argv[1])]' FILE` finds the "
        "first one that is no JSON",
        marks=(
            Mark("not valid JSON", r"(:| row )\d+: not valid JSON \("),
            Mark("JSON parse error", r"JSON parse error"),
            "DatasetGenerationError",
            "DatasetGenerationCastError",
            Mark(
                ", expected `messages`",
                r"(has the keys .*|JSON object with.*)`messages`, `prompt` and `completion`",
            ),
            "not UTF-8 text (byte",
            Mark("expected one of system, user", r"has the role .*expected one of system, user"),
            Mark("expected assistant (the answer)", r"ends with the role"),
            Mark("has no text `content`", r"has no text `content`"),
            Mark("expected text", r"(:| row )\d+: \S+ is \w+, expected text"),
            "expected a list of messages",
            "expected a JSON object with",
            "JSONDecodeError",
            "Conversation roles must alternate",
        ),
        certainty="likely",
        over=("request",),
    ),
    Rule(
        "rows_too_long",
        "Rows are longer than the model is trained on",
        "By default a long row stops the run instead of being cut in silence.",
        longer,
        marks=(TOO_LONG, "Sequence length exceeds the maximum", "longer than the maximum model length"),
        over=("request",),
        general_remedy="--set data.max_length=N, or --set data.overlong=drop or truncate",
    ),
    Rule(
        "all_labels_masked",
        "No token is left in the loss",
        "All labels are -100: answers were cut off by the maximal length, or the response template was not found.",
        "raise data.max_length, look at the rows that `make train` shows first (what is in brackets is not in the loss), "
        "--set data.train_on=all",
        marks=(
            "no row is left with a token in the loss",
            "could not find response key",
            "Could not find response key",
        ),
        find=_many_ignored,
        reads=(IGNORED,),
        over=("request",),
    ),
    Rule(
        "too_little_data",
        "There is less data than one step takes",
        "The global batch counts tokens over all GPUs; the data has fewer.",
        "add data, or lower train.global_batch_tokens (a multiple of GPUs x micro-batch)",
        marks=(
            Mark("expected at least one global batch", r"expected at least one global batch"),
            "num_samples should be a positive",
        ),
        over=("request",),
    ),
    Rule(
        "token_out_of_range",
        "A token id is beyond the embedding",
        "Tokens were added to the tokenizer and not to the model, or the tokenizer is of another model. On a GPU the same "
        "shows as a device-side assert.",
        "use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)); on a GPU run with "
        "CUDA_LAUNCH_BLOCKING=1, or once on the CPU, to see where",
        marks=(
            Mark("index out of range in self", r"IndexError: index out of range in self"),
            Mark("srcIndex < srcSelectDimSize", r"srcIndex < srcSelectDimSize"),
            Mark("vectorized_gather_kernel", r"vectorized_gather_kernel.*Assertion"),
        ),
        over=("device_side_assert",),
    ),
    Rule(
        "label_out_of_range",
        "A label is beyond the model's outputs",
        "Labels hold ids that the head has no output for (and that are not -100).",
        "compare max(labels) with the head's size; pad labels with -100, not with the pad token of another tokenizer",
        marks=(
            Mark("is out of bounds", r"IndexError: Target -?\d+ is out of bounds"),
            Mark("t >= 0 && t < n_classes", r"t >= 0 && t < n_classes"),
        ),
        over=("device_side_assert",),
    ),
    Rule(
        "device_side_assert",
        "A kernel on the GPU refused its input",
        "Mostly an index out of range: a token id, a label, or a position beyond the model's length.",
        "run with CUDA_LAUNCH_BLOCKING=1, or once on the CPU: the line that fails then is the right one",
        marks=("device-side assert triggered",),
        certainty="likely",
        over=("rank_crashed",),
    ),
    Rule(
        "no_chat_template",
        "The tokenizer has no chat template",
        "Base models have none, and rows of `messages` need one.",
        "--set data.chat_template=FILE.jinja (its tokens were never trained in a base model), or take the Instruct model, or "
        "rows of prompt and completion",
        marks=(
            "this model's tokenizer has no chat template",
            "tokenizer.chat_template is not set",
            "does not have a chat template",
        ),
        over=("request",),
    ),
    Rule(
        "no_pad_token",
        "The tokenizer has no padding token",
        "Llama and others were trained without one, and a batch of unequal rows needs it.",
        "tokenizer.pad_token = tokenizer.eos_token (labels of it -100); `make train` packs rows and needs none",
        marks=(
            "does not have a padding token",
            "Cannot handle batch sizes > 1 if no padding token is defined",
            "Pad_token_id must be provided",
        ),
    ),
    Rule(
        "batch_not_divisible",
        "The global batch is no whole number of micro-batches",
        "Each GPU takes the same number of micro-batches at each step.",
        "set train.global_batch_tokens to the number that the line names",
        marks=(
            Mark("train.global_batch_tokens is", r"train\.global_batch_tokens is \d+, expected a multiple"),
        ),
        over=("request",),
    ),
    Rule(
        "data_missing",
        "The data is not there",
        "The path is neither a file nor a data set of the hub that could be loaded.",
        "DATA=FILE.jsonl with a path from here, or a hub id (org/name) and the network",
        marks=(
            Mark("no such file, expected a JSONL", r"no such file, expected a JSONL"),
            Mark("data.path", r"data\.path is not set|data\.path is .*has no rows"),
            Mark("data.path", r"data\.path.*hub data set could not be loaded"),
            "DataFilesNotFoundError",
            "DatasetNotFoundError",
            "Unable to find '",
        ),
        over=("request",),
    ),
)
