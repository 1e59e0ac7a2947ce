"""TRL's SFTTrainer on a model that is already sharded: our loss over packed rows, our evaluation, our checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from recipe.data.pack import MicroBatches, WholeBatches
from recipe.engine.engine import Batch, Engine
from recipe.settings import Settings, Train
from recipe.train import checkpoint
from recipe.train.heldout import perplexity
from recipe.train.optimizer import LoraPlusAdamW
from recipe.train.pulse import Pulse
from recipe.train.run import Run, read_jsonl
from recipe.train.saver import Saver
from recipe.train.stopping import Stopper

COUNTS = ("tokens", "pairs")  # of held-out rows: for the event, no metric


class ShardedSFTTrainer(SFTTrainer):
    """SFTTrainer for a model that recipe.engine.load has sharded.

    transformers leaves placement and gradient reduction alone (is_distributed_loading_by_transformers). What is
    replaced: forward and backward (recipe.engine), evaluation (weighted by tokens over all ranks), and
    saving and loading (no pickle, never the frozen base).
    """

    held_out_sums = 2  # what `held_out` returns

    def __init__(
        self,
        *args: Any,
        train_dataset: MicroBatches,
        eval_dataset: MicroBatches,
        run: Run,
        keep_checkpoints: int,
        pulse: Pulse,
        stopper: Stopper,
        **kwargs: Any,
    ):
        # TRL looks at a sample, and takes none but a data set of its own kind.
        sample = Dataset.from_list([train_dataset[0]])
        super().__init__(*args, train_dataset=sample, eval_dataset=sample, **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.run, self.pulse, self.stopper = run, pulse, stopper
        self.engine: Engine = self.model.engine
        self.keep_checkpoints = keep_checkpoints
        self.saver = Saver(self.model, self.engine.adapters)
        self.step_tokens = 0
        # Held-out losses by step, of earlier starts of the run too.
        self.evaluations = {e["step"]: e["loss"] for e in read_jsonl(run.events) if e["kind"] == "evaluation"}
        self.skips = False  # whether the step that is being made is left out

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the token losses over the labels of all ranks' micro-batches of this step.

        The engine averages gradients over ranks, so each rank's share is scaled up by their number.
        """
        self.pulse.micro_batch += 1
        batch = Batch.of(inputs, self.engine.adapters.device)
        total = self.engine.loss(batch, training=True)
        self.step_tokens += len(batch.ids)
        if num_items_in_batch is None:
            return total / max(len(batch.targets), 1)
        return total * dist.get_world_size() / torch.as_tensor(num_items_in_batch).clamp(min=1)

    control: Any  # transformers'

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        """Whole global batches in an order of seed and epoch; each rank takes its part of each."""
        per_batch = self.args.gradient_accumulation_steps * dist.get_world_size()
        self.order = WholeBatches(len(self.train_dataset), per_batch, self.args.data_seed)
        return self.order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """After a resume within an epoch accelerate wraps the order once more, and would not tell it which epoch it is.

        No step where a resumed training has stopped early before (EarlyStop says so when it begins).
        """
        self.order.set_epoch(epoch)
        if not self.control.should_training_stop:
            super()._run_epoch(*args, epoch=epoch, **kwargs)

    optimizer: Any  # accelerate's wrapper around what create_optimizer makes

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over this rank's slice of all adapters as one tensor, and the rows of new tokens."""
        if self.optimizer is None:
            self.optimizer = self.adamw()
        return self.optimizer

    def adamw(self) -> torch.optim.AdamW:
        args, adapters = self.args, self.engine.adapters
        options: dict[str, Any] = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "fused": True,
        }
        if adapters.lora.lr_ratio != 1:
            flat, *others = adapters.flats
            return LoraPlusAdamW(flat, adapters.first_of_b, adapters.lora.lr_ratio, others, **options)
        return torch.optim.AdamW(adapters.flats, **options)

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clip over all ranks. A step whose gradients are not finite (fp16 may overflow) is left out, on all alike."""
        self.pulse.mark("all-reduce of the gradient's norm")
        norm = self.engine.adapters.clip(self.args.max_grad_norm or float("inf"))
        self.skips = not torch.isfinite(norm)
        if self.skips:
            for flat in self.engine.adapters.flats:
                flat.grad = None  # AdamW passes over what has no gradient
        return norm

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        return (self._clip_grad_norm(model) if grad_norm is None else grad_norm).item()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss over the held-out rows (a collective). Draws no random numbers."""
        self.pulse.enter("evaluate")
        started = time.perf_counter()
        rank, world = dist.get_rank(), dist.get_world_size()
        total = torch.zeros(self.held_out_sums, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(self.eval_dataset), world):
                # Every rank must run the same number of forwards, since each gathers layers: the last round may repeat.
                mine = start + rank < len(self.eval_dataset)
                row = self.data_collator([self.eval_dataset[start + rank if mine else start]])
                batch = Batch.of(row, self.engine.adapters.device)
                sums = self.held_out(batch)
                if mine:
                    total += torch.tensor(sums, dtype=torch.float64)
        self.pulse.mark("all-reduce of the held-out loss")
        dist.all_reduce(total)
        metrics = self.held_out_metrics(total.tolist())
        # A checkpoint of the best so far: it is kept.
        self.evaluations[self.state.global_step] = metrics["loss"]
        if best_step(self.evaluations) == self.state.global_step:
            self.control.should_save = True
        if self.is_world_process_zero():
            told = ", ".join(
                f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in metrics if name not in COUNTS
            )
            self.run.event(
                "evaluation",
                f"held-out {told}",
                step=self.state.global_step,
                **metrics,
                seconds=round(time.perf_counter() - started, 3),
            )
        named = {
            f"{metric_key_prefix}_{name}": value for name, value in metrics.items() if name not in COUNTS
        }
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def held_out(self, batch: Batch) -> list[float]:
        """What is summed up over the held-out rows, of one of them (a collective)."""
        return [self.engine.loss(batch, training=False).item(), len(batch.targets)]

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        """From the sums over all rows; `loss` is the one that training lowers."""
        loss = sums[0] / sums[1] if sums[1] else float("nan")
        return {"loss": loss, "perplexity": perplexity(loss), "tokens": int(sums[1])}

    def _save_checkpoint(self, model, trial) -> None:
        """Begin to save the step that is done; `saver.wait` is for who needs it complete."""
        self.pulse.enter("save")
        place = self.stopper.place
        assert place is not None and place.step == self.state.global_step
        trainer_state = json.dumps(dataclasses.asdict(self.state), sort_keys=True)
        with self.stopper.saving(place.step):
            folder = self.run.checkpoint(place.step)
            self.saver.begin(
                folder, self.optimizer.optimizer, place, trainer_state, self.pulse.mark, self.saved
            )

    def saved(self, folder: Path) -> None:
        """In the saver's thread of rank 0: a checkpoint is complete."""
        checkpoint.prune(self.run.folder, self.keep_checkpoints, best_step(self.evaluations))
        self.run.event(
            "checkpoint",
            f"saved {folder.name}",
            step=checkpoint.read_state(folder)["step"],
            paused_seconds=round(self.saver.paused_seconds, 4),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.pulse.enter("load")
        checkpoint.load_parameters(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_folder) -> None:
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        checkpoint.load_optimizer(folder, self.model, self.engine.adapters, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(checkpoint.read_state(folder)["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint_folder) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_random_state(Path(checkpoint_folder), dist.get_rank())


def best_step(losses: dict[int, float]) -> int | None:
    """The step with the lowest held-out loss after any training, the first of equal ones."""
    trained = {step: loss for step, loss in losses.items() if step and math.isfinite(loss)}
    return min(trained, key=lambda step: (trained[step], step), default=None)


def training_arguments(settings: Settings, run: Run, world_size: int, evaluates: bool) -> SFTConfig:
    """`evaluates`: whether there are held-out rows."""
    train = settings.train
    evaluates = evaluates and train.eval_every > 0
    return SFTConfig(
        output_dir=str(run.folder),
        run_name=run.name,  # as trackers call it
        per_device_train_batch_size=1,  # one packed row of micro_batch_tokens
        gradient_accumulation_steps=settings.accumulation(world_size),
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs or 1.0,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.scheduler, train.scheduler),
        lr_scheduler_kwargs=schedule_arguments(train),
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=train.seed,
        data_seed=train.seed,
        bf16=False,  # the engine computes in bf16 and keeps fp32 masters: no autocast on top
        fp16=False,  # its backward is that of the sum over tokens, scaled in fp32: it needs no loss scale
        use_cpu=not torch.cuda.is_available(),
        # TRL's default would wrap the layers that kernels=plain borrows: their recomputation finds no weights.
        activation_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # Watch asks for our own checkpoints; transformers refuses its own for such a model
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_every if evaluates else None,
        metric_for_best_model="loss" if evaluates else None,  # the trainer's state keeps the lowest
        dataloader_drop_last=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to=[],
        disable_tqdm=True,
        include_num_input_tokens_seen="no",
    )


def schedule_arguments(train: Train) -> dict[str, Any]:
    """What transformers' schedule of that name takes besides the steps."""
    if train.scheduler == "cosine_with_min_lr":
        return {"min_lr_rate": train.min_lr_ratio}
    if train.scheduler == "polynomial":  # of power 1
        return {"lr_end": train.min_lr_ratio * train.learning_rate}
    if train.scheduler == "warmup_stable_decay":
        return {"num_decay_steps": train.decay_steps, "min_lr_ratio": train.min_lr_ratio}
    return {}
