"""Rows of preferences for DPO: the same prompt with a chosen and a rejected answer, packed so that both stay together.

A pair is tokenised like two rows of `prompt` and `completion`, and lies on disk as one document: the chosen answer's
tokens, then those of the rejected one. Packing moves whole pairs; a micro-batch then has the documents chosen, rejected,
chosen, rejected, …
"""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedTokenizerBase

from recipe.data.encode import encode
from recipe.data.rows import SIDES, Row, checked
from recipe.errors import UserError
from recipe.settings import Data

SHAPE = "`prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that begin alike"


def answers_of(row: Row) -> tuple[Row, Row]:
    """The chosen and the rejected answer, each as a row of its own. Raises UserError."""
    values = row.values
    if not all(side in values for side in SIDES):
        keys = ", ".join(map(str, values)) or "(none)"
        raise UserError(f"{row.where}: has the keys {keys}, expected {SHAPE} with train.method: dpo")
    kinds = {type(values[side]) for side in SIDES}
    if kinds not in ({str}, {list}) or not all(values[side] for side in SIDES):
        found = " and ".join(type(values[side]).__name__ if values[side] else "empty" for side in SIDES)
        raise UserError(
            f"{row.where}: chosen and rejected are {found}, expected two texts or two conversations"
        )
    if values.get("prompt") is None:
        from trl import extract_prompt

        values = extract_prompt({side: values[side] for side in SIDES})
    if not isinstance(values["prompt"], kinds.pop()):
        found = type(values["prompt"]).__name__
        raise UserError(
            f"{row.where}: prompt is {found}, expected the kind that the answers are (text or list)"
        )
    for side in SIDES:
        if isinstance(values[side], list) and len(values[side]) != 1:
            raise UserError(
                f"{row.where}: {side}: has {len(values[side])} messages behind the prompt, expected one answer"
            )
    chosen, rejected = (
        checked({"prompt": values["prompt"], "completion": values[side]}, f"{row.where}: {side}")
        for side in SIDES
    )
    return chosen, rejected


def check_row(row: Row, method: str) -> None:
    """Raises UserError where a row is not what `train.method` learns from."""
    if method == "dpo":
        answers_of(row)
    elif all(side in row.values for side in SIDES):
        raise UserError(f"{row.where}: has `chosen` and `rejected`, expected train.method: dpo with them")


def encode_pair(
    row: Row, data: Data, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """input_ids and labels of the chosen answer with its prompt, and of the rejected one. Raises UserError."""
    data = dataclasses.replace(data, train_on="completion")
    return [encode(answer, data, tokenizer) for answer in answers_of(row)]
