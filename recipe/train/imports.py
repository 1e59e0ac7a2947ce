"""What a rank imports without a need costs a quarter of its start. Imported before all else, and nowhere but in a rank.

transformers and TRL import what is installed (SciPy for losses of object detection), and bitsandbytes compiles functions
that we never call, for which torch brings its whole compiler.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

# What is imported stays: to look for garbage among it would be a sixth of the time. The worker enables it again.
gc.disable()
for name in ("wandb", "scipy"):  # recipe.train.trackers takes wandb back
    sys.modules[name] = None  # type: ignore[assignment]

import torch  # noqa: E402


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return function or _as_it_is


_compile = torch.compile
torch.compile = _as_it_is
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
