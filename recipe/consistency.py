"""What no single setting can tell: which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipe.errors import UserError
from recipe.values import shown

if TYPE_CHECKING:
    from recipe.settings import Settings, Train

# Learning-rate schedules that end at a share of the peak.
WITH_MINIMUM = ("polynomial", "cosine_with_min_lr", "warmup_stable_decay")


def check_together(settings: Settings, sources: dict[str, str]) -> None:
    """What no single value can tell."""
    data, train = settings.data, settings.train
    if data.path is not None and data.sources:
        raise UserError(
            f"{sources.get('data.sources', sources.get('data.path', ''))}data.path is {shown(data.path)} and data.sources "
            f"has {len(data.sources)} entries, expected one of them; leave out the other (--set data.sources=[])"
        )
    if data.columns and data.sources:
        raise UserError(
            f"{sources.get('data.columns', '')}data.columns is set beside data.sources, expected `columns` in each source"
        )
    if (train.steps is None) == (train.epochs is None):
        raise UserError(
            f"{sources.get('train.epochs', sources.get('train.steps', ''))}train.steps is {shown(train.steps)} and "
            f"train.epochs is {shown(train.epochs)}, expected exactly one of them (the other one: null)"
        )
    if settings.micro_batch_tokens < settings.longest_row:
        least = f"2 x data.max_length (2 x {data.max_length})" if train.method == "dpo" else ""
        raise UserError(
            f"{sources.get('train.micro_batch_tokens', '')}train.micro_batch_tokens is {settings.micro_batch_tokens}, "
            f"expected at least {least or f'data.max_length ({data.max_length})'}, since a row is never split over "
            "micro-batches"
        )
    _check_schedule(train, sources)
    if train.steps is not None and train.warmup_steps > train.steps:
        raise UserError(
            f"{sources.get('train.warmup_steps', '')}train.warmup_steps is {train.warmup_steps}, "
            f"expected at most train.steps ({train.steps})"
        )
    if train.early_stopping and not train.eval_every:
        raise UserError(
            f"{sources.get('train.early_stopping', '')}train.early_stopping is {train.early_stopping} and "
            "train.eval_every is 0, expected the steps between evaluations, such as train.eval_every: 25"
        )
    if train.early_stopping and not data.eval_path and not data.eval_fraction and data.path != "demo":
        raise UserError(
            f"{sources.get('train.early_stopping', '')}train.early_stopping is {train.early_stopping}, but no rows are "
            "held out; expected data.eval_path, or data.eval_fraction above 0"
        )
    if settings.track.prometheus and not settings.track.prometheus.endswith(".prom"):
        raise UserError(
            f"{sources.get('track.prometheus', '')}track.prometheus is {shown(settings.track.prometheus)}, "
            "expected a file name that ends with .prom, since the node exporter reads no other"
        )
    if train.global_batch_tokens < settings.micro_batch_tokens:
        raise UserError(
            f"{sources.get('train.global_batch_tokens', '')}train.global_batch_tokens is {train.global_batch_tokens}, "
            f"expected at least one micro-batch ({settings.micro_batch_tokens} tokens)"
        )


def _check_schedule(train: Train, sources: dict[str, str]) -> None:
    """A key that the schedule does not read would be a mistake that nobody sees."""
    if train.min_lr_ratio and train.scheduler not in WITH_MINIMUM:
        raise UserError(
            f"{sources.get('train.min_lr_ratio', '')}train.min_lr_ratio is {train.min_lr_ratio:g}, but "
            f"train.scheduler is {train.scheduler}, expected 0 or one of {', '.join(WITH_MINIMUM)}"
        )
    stable = train.scheduler == "warmup_stable_decay"
    if stable != (train.decay_steps is not None):
        expected = "the number of steps in which the rate falls" if stable else "null"
        raise UserError(
            f"{sources.get('train.decay_steps', sources.get('train.scheduler', ''))}train.decay_steps is "
            f"{shown(train.decay_steps)}, expected {expected} with train.scheduler: {train.scheduler}"
        )
    if train.steps is not None and train.decay_steps and train.warmup_steps + train.decay_steps > train.steps:
        raise UserError(
            f"{sources.get('train.decay_steps', '')}train.decay_steps is {train.decay_steps}, expected at most "
            f"{train.steps - train.warmup_steps} (train.steps less train.warmup_steps)"
        )
