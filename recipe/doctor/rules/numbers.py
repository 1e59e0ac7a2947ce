"""Losses and gradients that went wrong."""

from __future__ import annotations

import math
import re
import statistics

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import LOSSES, Line, Mark

# Whole needles: one that stands on every line would make a large log slow to read. "train_loss" ends with them too.
NAN_LOSS = tuple(
    Mark(said, re.escape(said) + r"\b")
    for said in ("loss': nan", "loss': 'nan", 'loss": NaN', "loss: nan", "loss=nan", "loss: NaN")
)
EPOCH = re.compile(r"epoch['\"]?[:=] ?['\"]?(\d+\.?\d*)")
WINDOW = 5
SPIKE = 3.0  # times the loss that it had already reached
FLAT_LOSS = 0.5  # below that, a loss of three times as much is noise


def lower_rate(case: Case) -> str:
    rate = case.setting("train.learning_rate")
    if case.is_run and rate:
        return (
            f"a new run with --set train.learning_rate={rate / 10:g} (now {rate:g}) and --set train.warmup_steps="
            f"{max(10, 2 * (case.setting('train.warmup_steps') or 0))}; train.max_grad_norm=1 clips (now "
            f"{case.setting('train.max_grad_norm')})"
        )
    return "a tenth of the learning rate (LoRA: 1e-4 to 2e-4), some warm-up, clipping at 1; fp32 masters for the adapters"


def nan_steps(case: Case) -> list[Line]:
    """The first steps whose loss is no number; one that later steps have got over was a row's, not the run's."""
    losses = case.numbers("loss")
    if losses and not math.isfinite(losses[-1][0]):
        return [line for loss, line in losses if not math.isfinite(loss)][:2]
    if any(event.cause == "nan_batch" for event in case.events):
        return []  # they were left out, of which the log's mean over all steps knows nothing
    told = [line for mark in NAN_LOSS for line in case.found(mark)]
    last = max((line.number for line in told), default=0)
    later = [line for mark in LOSSES for line in case.found(mark) if line.number > last]
    return [] if later else told


def spike(case: Case) -> list[Line]:
    """Where the loss has ended far above what it had reached before."""
    all_series = [case.numbers("loss")] if case.metrics else [_told(case, mark) for mark in LOSSES]
    found = next((spike for series in all_series if (spike := _spike_of(series))), [])
    return found and [*found, *[event.line for event in case.events if event.cause == "loss_spike"]]


def _told(case: Case, mark: Mark) -> list[tuple[float, Line]]:
    """A log's losses of one form, since training began anew in it (a log that several runs were appended to)."""
    series: list[tuple[float, Line]] = []
    reached = 0.0
    for line in case.found(mark):
        loss, epoch = mark.search(line.text), EPOCH.search(line.text)
        if epoch and float(epoch[1]) < reached:
            series.clear()
        reached = float(epoch[1]) if epoch else reached
        series += [(float(loss[1]), line)] if loss else []
    return series


def _spike_of(series: list[tuple[float, Line]]) -> list[Line]:
    series = [(loss, line) for loss, line in series if math.isfinite(loss)]
    if len(series) < 2 * WINDOW:
        return []
    means = [
        statistics.fmean(loss for loss, _ in series[i : i + WINDOW]) for i in range(len(series) - WINDOW + 1)
    ]
    lowest = min(range(len(means) - WINDOW + 1), key=lambda i: means[i])
    if means[-1] < SPIKE * max(means[lowest], FLAT_LOSS):
        return []
    worst = max(range(lowest, len(series)), key=lambda i: series[i][0])
    return [series[lowest][1], series[worst][1]]


def _no_gradient(case: Case) -> list[Line]:
    """Steps at which nothing was learned although the rate was not 0."""
    norms = [
        (values["grad_norm"], values.get("learning_rate", 1.0), line)
        for values, line in case.metrics
        if isinstance(values.get("grad_norm"), (int, float))
    ]
    zero = [line for norm, rate, line in norms if norm == 0 and rate > 0]
    return zero[:2] if len(zero) >= 5 and len(zero) == len([1 for _, rate, _ in norms if rate > 0]) else []


RULES = (
    Rule(
        "nan_loss",
        "The loss is no number (NaN)",
        "Weights or activations have overflowed: too high a learning rate, fp16 without loss scale, or a damaged row or "
        "quantised weight. No later step recovers.",
        lower_rate,
        causes=("nan_loss",),
        reads=(*NAN_LOSS, *LOSSES),
        find=nan_steps,
        when="always",
        over=("loss_spike", "gradient_explosion", "nan_batch"),
        general_remedy="a tenth of the learning rate, warm-up and clipping, in a new run",
    ),
    Rule(
        "nan_batch",
        "Steps whose loss is no number (NaN) were left out",
        "A single one may be a row that is unlike all others; several come of too high a learning rate. The adapters have not "
        "moved in those steps (train.on_nan: skip).",
        lambda case: (
            f"`make data ARGS=check` on the rows; where it was more than a few steps, {lower_rate(case)}"
        ),
        causes=("nan_batch",),
        kind="symptom",
        when="always",
        general_remedy="`make data ARGS=check` on the rows; where it was more than a few steps, a lower learning rate in a new run",
    ),
    Rule(
        "loss_spike",
        "The loss has risen far above what it had reached",
        "Mostly too high a learning rate; a spike that does not come back has destroyed what was learned.",
        lower_rate,
        reads=LOSSES,
        find=spike,
        certainty="likely",
        when="always",
        general_remedy="a tenth of the learning rate, warm-up and clipping, in a new run",
    ),
    Rule(
        "gradient_explosion",
        "Gradients have exploded",
        "Their norm has grown by orders of magnitude: too high a learning rate, or a row that is unlike all others.",
        lower_rate,
        causes=("gradient_explosion",),
        certainty="likely",
        kind="symptom",
        general_remedy="a lower learning rate; --set train.max_grad_norm=1 clips",
    ),
    Rule(
        "no_gradient",
        "Nothing was learned: all gradients are 0",
        "No adapter is in the graph (reentrant checkpointing without input gradients), or no token is in the loss.",
        "model.enable_input_require_grads(), or use_reentrant=False; look at which tokens are in the loss",
        find=_no_gradient,
        when="always",
        certainty="likely",
    ),
    Rule(
        "fp16_masters",
        "Trained parameters are in fp16",
        "A gradient scaler needs fp32 parameters; those of fp16 lose small updates.",
        "load adapters in fp32 (autocast_adapter_dtype=True, the default of PEFT), or bf16=True without a scaler",
        marks=("Attempting to unscale FP16 gradients",),
    ),
)
