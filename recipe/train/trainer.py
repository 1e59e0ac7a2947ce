"""TRL's SFTTrainer on a model that is already sharded: our loss over packed rows, our evaluation, our checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trl import SFTConfig, SFTTrainer

from recipe.engine.engine import Batch, Engine
from recipe.settings import Settings
from recipe.train import checkpoint
from recipe.train.pulse import Pulse
from recipe.train.run import Run


class ShardedSFTTrainer(SFTTrainer):
    """SFTTrainer for a model that recipe.engine.load has sharded.

    transformers leaves placement and gradient reduction alone (is_distributed_loading_by_transformers). What is
    replaced: forward and backward (recipe.engine), evaluation (weighted by tokens over all ranks), and
    saving and loading (no pickle, never the frozen base).
    """

    def __init__(self, *args: Any, run: Run, keep_checkpoints: int, pulse: Pulse, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.pulse = run, pulse
        self.engine: Engine = self.model.engine
        self.keep_checkpoints = keep_checkpoints
        self.step_tokens = 0

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

    optimizer: Any  # accelerate's wrapper around what create_optimizer makes

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over this rank's slice of all adapters as one tensor."""
        if self.optimizer is None:
            self.optimizer = self.adamw()
        return self.optimizer

    def adamw(self) -> torch.optim.AdamW:
        args = self.args
        return torch.optim.AdamW(
            [self.engine.adapters.flat],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,
        )

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clip over all ranks. Gradients that are not finite (fp16 may overflow) are dropped, on all ranks alike."""
        self.pulse.mark("all-reduce of the gradient's norm")
        norm = self.engine.adapters.clip(self.args.max_grad_norm or float("inf"))
        if not torch.isfinite(norm):
            self.engine.adapters.gradients.zero_()
            if self.is_world_process_zero():
                step = self.state.global_step + 1
                self.run.event(
                    "warning",
                    f"step {step}: gradients overflowed and were dropped",
                    cause="gradient_explosion",
                    step=step,
                )
        return norm

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        return (self._clip_grad_norm(model) if grad_norm is None else grad_norm).item()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean loss per token over the held-out rows (a collective). Draws no random numbers."""
        self.pulse.enter("evaluate")
        rank, world = dist.get_rank(), dist.get_world_size()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(self.eval_dataset), world):
                # Every rank must run the same number of forwards, since each gathers layers: the last round may repeat.
                mine = start + rank < len(self.eval_dataset)
                row = self.data_collator([self.eval_dataset[start + rank if mine else start]])
                batch = Batch.of(row, self.engine.adapters.device)
                loss = self.engine.loss(batch, training=False)
                if mine:
                    total += torch.tensor([loss.item(), len(batch.targets)], dtype=torch.float64)
        self.pulse.mark("all-reduce of the held-out loss")
        dist.all_reduce(total)
        loss = (total[0] / total[1]).item() if total[1] else float("nan")
        if self.is_world_process_zero():
            self.run.event(
                "evaluation",
                f"held-out loss {loss:.4f}",
                step=self.state.global_step,
                loss=loss,
                tokens=int(total[1]),
            )
        return {f"{metric_key_prefix}_loss": loss}

    def _save_checkpoint(self, model, trial) -> None:
        self.pulse.enter("save")
        folder = self.run.checkpoint(self.state.global_step)
        state = {"step": self.state.global_step, "scheduler": self.lr_scheduler.state_dict()}
        trainer_state = json.dumps(dataclasses.asdict(self.state), sort_keys=True)
        checkpoint.save(
            folder,
            self.model,
            self.engine.adapters,
            self.optimizer.optimizer,
            state,
            trainer_state,
            self.pulse.mark,
            self.pulse.mark_alone,
        )
        if self.is_world_process_zero():
            checkpoint.prune(self.run.folder, self.keep_checkpoints)
            self.run.event("checkpoint", f"saved {folder.name}", step=self.state.global_step)

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
        if checkpoint_folder is not None and not checkpoint.load_random_state(
            Path(checkpoint_folder), dist.get_rank()
        ):
            self.run.event(
                "warning", "resumed on more ranks than the checkpoint has: their dropout starts afresh"
            )


def training_arguments(settings: Settings, run: Run, world_size: int, evaluates: bool) -> SFTConfig:
    """`evaluates`: whether there are held-out rows."""
    train = settings.train
    evaluates = evaluates and train.eval_every > 0
    return SFTConfig(
        output_dir=str(run.folder),
        per_device_train_batch_size=1,  # one packed row of micro_batch_tokens
        gradient_accumulation_steps=settings.accumulation(world_size),
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs or 1.0,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.scheduler, train.scheduler),
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
        dataloader_drop_last=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to=[],
        disable_tqdm=True,
        include_num_input_tokens_seen="no",
    )
