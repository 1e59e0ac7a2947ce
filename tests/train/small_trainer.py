"""The product's own trainer in a rank of a test, on the small model of the engine's tests."""

from __future__ import annotations

from typing import Any

from recipe.data.encode import load_tokenizer
from recipe.data.pack import PackedCollator
from recipe.plan.placement import Placement
from recipe.settings import from_dict
from recipe.train.pulse import Pulse
from recipe.train.run import Run
from recipe.train.stopping import Stopper
from recipe.train.trainer import ShardedSFTTrainer, training_arguments
from tests.data.preparing import micro_batches
from tests.engine.steps import LAYERS, LORA, ROWS, packed_row, sharded_model


def all_rows() -> list[dict[str, Any]]:
    return [packed_row(number) for number in range(len(ROWS))]


def small_trainer(
    mesh,
    folder,
    run: Run,
    packed: list[dict[str, Any]],
    values: dict[str, Any],
    kernels: str = "fused",
    lora=LORA,
    evaluates: bool = False,
) -> ShardedSFTTrainer:
    """folder: of the model. packed: its rows, to train and to evaluate. values: settings that are not the default."""
    pulse, rows, settings = Pulse(run, mesh.get_local_rank()), micro_batches(packed), from_dict(values)
    return ShardedSFTTrainer(
        model=sharded_model(mesh, folder, Placement(LAYERS), kernels, lora),
        args=training_arguments(settings, run, mesh.size(), evaluates=evaluates),
        data_collator=PackedCollator(),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=load_tokenizer(folder, settings.data),
        run=run,
        keep_checkpoints=1,
        pulse=pulse,
        stopper=Stopper(run, pulse),
    )
