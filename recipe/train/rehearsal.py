"""A dress rehearsal before step 1, so that no run fails after four days for want of memory or disk.

The longest micro-batch of the data forward and backward beside a full optimizer state, an optimizer step, the longest
held-out row, a checkpoint written and read back: all on the real model and disk. Then everything is as it was, bit for
bit: the run that follows is the one without a rehearsal.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from recipe.data.pack import MicroBatches
from recipe.engine.engine import Batch
from recipe.engine.lora import Adapters
from recipe.errors import Refused
from recipe.files import require_space
from recipe.train import checkpoint
from recipe.train.alarms import NotFinite
from recipe.train.pulse import Pulse
from recipe.train.run import Run
from recipe.train.saver import Place
from recipe.train.trainer import ShardedSFTTrainer

GIB = 2**30


def rehearse(trainer: ShardedSFTTrainer, run: Run, pulse: Pulse, keep_checkpoints: int) -> None:
    """A collective. Raises what a step, an evaluation or a save would raise later; the pulse's phase says it was here."""
    pulse.enter("rehearsal")
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row = worst_row(trainer.train_dataset)
    with untouched(trainer):
        optimizer = trainer.adamw()
        _step(trainer, optimizer, row)
        if len(trainer.eval_dataset):
            _evaluate(trainer, worst_row(trainer.eval_dataset))
        size = _save_and_reload(trainer, optimizer, run, pulse)
        # The one that is written stands beside those that are kept.
        require_space(run.folder, size * (keep_checkpoints + 1), f"{keep_checkpoints + 1} checkpoints")
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None
    if dist.get_rank() == 0:
        lengths = trainer.train_dataset[row]["seq_lengths"]
        vram = f", {peak:.1f} GiB of GPU memory" if peak is not None else ""
        evaluation = ", an evaluation" if len(trainer.eval_dataset) else ""
        run.event(
            "rehearsed",
            f"rehearsed in {seconds:.0f} s: {sum(lengths)} tokens with a document of {max(lengths)}{evaluation}, a "
            f"checkpoint of {size / 2**20:.1f} MiB{vram}",
            seconds=round(seconds, 3),
            vram_reserved_gib=None if peak is None else round(peak, 3),
            tokens=sum(lengths),
            checkpoint_bytes=size,
        )


def worst_row(rows: MicroBatches) -> int:
    """The packed row with most tokens; of several the one with the longest document, whose attention costs most."""
    return int(np.lexsort((-rows.longest(), -rows.tokens()))[0])


@contextmanager
def untouched(trainer: ShardedSFTTrainer) -> Iterator[None]:
    """Afterwards parameters, gradients and random states are as before; on the way out by an error the run ends anyway."""
    adapters = trainer.engine.adapters
    before = [flat.detach().cpu().clone() for flat in adapters.flats]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    yield
    for flat, values in zip(adapters.flats, before, strict=True):
        flat.detach().copy_(values)
    adapters.forget_gradients()
    trainer.step_tokens = 0
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _step(trainer: ShardedSFTTrainer, optimizer: torch.optim.Optimizer, row: int) -> None:
    """All ranks take the same row, the worst that can meet. The optimizer's state is there before it, as from step 2 on."""
    adapters = trainer.engine.adapters
    adapters.begin_backward()
    optimizer.step()  # of gradients that are zero
    with torch.enable_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[row]]))
        loss.backward()
    if not torch.isfinite(loss):
        raise NotFinite(
            f"the loss of the longest micro-batch is {loss.item()} before any training: the weights or the arithmetic are "
            "broken; run `make prepare` again, and compare with --set compute.kernels=plain"
        )
    if not torch.isfinite(adapters.clip(trainer.args.max_grad_norm or float("inf"))):
        adapters.zero_gradients()  # as the training does
    optimizer.step()


def _evaluate(trainer: ShardedSFTTrainer, row: int) -> None:
    batch = Batch.of(trainer.data_collator([trainer.eval_dataset[row]]), trainer.engine.adapters.device)
    with torch.no_grad():
        trainer.held_out(batch)


def _trained(adapters: Adapters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of them."""
    found = {}
    for flat, of in zip(adapters.flats, ("", " of the new tokens"), strict=False):
        found["the adapters" if not of else "the new tokens"] = flat.detach()
        found |= {f"{key}{of}": optimizer.state[flat][key] for key in checkpoint.MOMENTS}
    return found


def _save_and_reload(
    trainer: ShardedSFTTrainer, optimizer: torch.optim.Optimizer, run: Run, pulse: Pulse
) -> int:
    """The bytes of a checkpoint. Raises Refused where it cannot be written, or is not what was in memory."""
    folder = run.folder / ".rehearsal"
    adapters = trainer.engine.adapters
    held = {key: value.clone() for key, value in _trained(adapters, optimizer).items()}
    try:
        trainer.saver.begin(folder, optimizer, Place.here(0, {}), "{}", pulse.mark)
        trainer.saver.wait(pulse.mark)
        if trainer.saver.failure:
            raise Refused(
                f"{folder.parent}: a checkpoint cannot be written ({trainer.saver.failure}); free some space there, or begin "
                "anew on another disk with --set paths.runs="
            )
        pulse.mark("read the checkpoint back")
        for flat in adapters.flats:
            flat.detach().zero_()
        checkpoint.load_parameters(folder, trainer.model)
        checkpoint.load_optimizer(folder, trainer.model, adapters, optimizer)
        read = _trained(adapters, optimizer)
        wrong = [name for name in held if not torch.equal(held[name], read[name])]
        pulse.mark("hash what was read back")
        wrong += checkpoint.damaged_files(folder)
        if wrong:
            raise Refused(
                f"{folder.parent}: a checkpoint that was read back is not what was written ({', '.join(wrong)} differ); check "
                "that disk and the RAM, and begin anew on another disk with --set paths.runs="
            )
        size = sum(path.stat().st_size for path in folder.iterdir())
        pulse.mark("barrier after the rehearsal's save")
        dist.barrier()  # all ranks have read it
        return size
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
