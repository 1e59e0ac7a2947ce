"""Imported once by the server that test ranks are forked from (tests/models.py): what each rank would else do itself.

transformers compiles 900 regular expressions the first time that PEFT wraps a model: 0.4 s for each rank.
"""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import recipe.export.plain
import recipe.prepare.quantise
import recipe.train.trainer  # noqa: F401

get_checkpoint_conversion_mapping("llama")
