"""Run in a fresh process by the export: load an adapter folder with plain PEFT and say what held-out loss it gives.

python -m recipe.export.verify runs/NAME ADAPTER_FOLDER      (prints one JSON document)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from recipe.data.encode import load_tokenizer
from recipe.engine.devices import DTYPES
from recipe.export.plain import held_out_documents, load_plain, mean_loss, pad_token
from recipe.files import read_json
from recipe.train.run import Run


def main(run_folder: str, adapter_folder: str) -> None:
    run, adapters = Run(Path(run_folder)), Path(adapter_folder)
    model_folder = Path(read_json(run.manifest)["model"]["folder"])
    name = read_json(run.summary)["compute_dtype"]
    dtype = next(dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{name}")
    model = load_plain(model_folder, dtype, adapters)
    written = load_file(adapters / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    documents = held_out_documents(run)
    tokenizer = load_tokenizer(model_folder, run.settings().data)
    print(
        json.dumps(
            {
                "tensors": len(written),
                "different": sorted(name for name in written.keys() ^ loaded.keys())
                + sorted(
                    name
                    for name in written.keys() & loaded.keys()
                    if not torch.equal(written[name].float(), loaded[name].cpu().float())
                ),
                "held_out_loss": mean_loss(model, documents, pad_token(tokenizer)) if documents else None,
                "documents": len(documents),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
