"""The one description of a run: dataclasses, read from YAML, checked with exact errors.

Every field carries its default, its range and a half-line on what it does to memory, speed or result. A config file
names only what differs. This module imports no torch, so that `recipe plan` answers at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe.configfile import parse_override, parse_yaml
from recipe.consistency import WITH_MINIMUM, check_together
from recipe.errors import UserError
from recipe.values import checked_value, expected, nearest, shown, suggest

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS
SCHEDULERS = ("linear", "cosine", "constant", "inverse_sqrt", *WITH_MINIMUM)


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its explanation and limits: `low`, `high` (inclusive), `above` (exclusive), `choices`, `words`.

    `words` are the texts that a number may be replaced by, such as `auto`; `refused` gives reasons by value.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    id: str | None = option(
        None, "hub id (org/name), local folder, or `demo` (SmolLM2-135M-Instruct from a package)"
    )
    revision: str | None = option(None, "hub commit, tag or branch; pin a commit to be reproducible")


@dataclass(frozen=True)
class Quantization:
    type: str = option("nf4", "4-bit data type of the frozen weights", choices=("nf4",))
    double_quant: bool = option(True, "quantise the absmax constants too: 1.1 GB instead of 4.3 GB for 70B")


@dataclass(frozen=True)
class Prepare:
    keep_source: bool = option(
        True,
        "keep the 16-bit files of a hub model; false: fetch, quantise and drop them one at a time, "
        "60 GB of disk instead of 185 GB for 70B (a local folder is never touched)",
    )


@dataclass(frozen=True)
class Lora:
    rank: int = option(
        16, "r; adapter parameters and optimizer state grow linearly with it", low=1, high=1024
    )
    alpha: float = option(16.0, "the update is scaled by alpha / rank", above=0.0, high=4096.0)
    dropout: float = option(0.05, "share of the adapter's inputs zeroed while training", low=0.0, high=0.9)
    target_modules: list[str] = option(
        list(PROJECTIONS), "linear layers of a decoder layer that get an adapter", choices=PROJECTIONS
    )
    rslora: bool = option(
        False, "scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small"
    )
    lr_ratio: float = option(
        1.0, "LoRA+: the learning rate of B is this many times that of A; 1 = the same", low=1.0, high=1024.0
    )
    new_tokens: list[str] = option(
        [],
        "tokens whose rows of embedding and head are trained too: new ones, which take free rows, or untrained ones of a base model",
    )
    start: str | None = option(
        None, "begin with these adapters: a PEFT folder, or the name of a run whose adapters were exported"
    )
    dora: bool = option(
        False,
        "not available",
        refused={
            True: "DoRA divides every output row by the norm of the whole W + BA, but here W is whole for one layer at a "
            "time only, in 4 bits, and BA is added to the product without ever being formed; use lora.rslora or a "
            "larger lora.rank"
        },
    )


# What a row may consist of: `messages`; `prompt` and `completion`; `text`; a pair; Alpaca's columns; ShareGPT's.
COLUMNS = (
    "messages",
    "prompt",
    "completion",
    "text",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "conversations",
    "system",
    "tools",
)


@dataclass(frozen=True)
class Source:
    """An entry of data.sources."""

    path: str | None = option(None, "file, pattern, hub id (org/name), or `demo`")
    weight: float = option(
        1.0, "share of its rows that an epoch has: 0.5 = half of them, 2 = each twice", above=0.0, high=1000.0
    )
    split: str = option("train", "split of a hub data set")
    revision: str | None = option(None, "hub commit, tag or branch of the data set")
    columns: dict[str, str] = option({}, "our names for its columns, where they differ", choices=COLUMNS)


@dataclass(frozen=True)
class Data:
    path: str | None = option(
        None,
        "JSONL, JSON, Parquet or CSV file, a pattern such as `rows/*.parquet`, a hub id (org/name), or `demo`; DATA= on the "
        "make line sets it",
    )
    sources: list[Source] = option(
        [], "several of them in place of `path`, each with `path`, `weight`, `split`, `revision`, `columns`"
    )
    columns: dict[str, str] = option(
        {},
        "our names for the columns of `path`, such as {prompt: question, completion: answer}",
        choices=COLUMNS,
    )
    split: str = option("train", "split of a hub data set")
    revision: str | None = option(None, "hub commit, tag or branch of the data set")
    eval_path: str | None = option(
        None, "held-out rows of their own (`demo` has some); else a share of `path` is held out"
    )
    eval_fraction: float = option(0.1, "share of rows held out where eval_path is not set", low=0.0, high=0.5)
    max_length: int = option(
        1024, "tokens per row; longer rows are counted and treated as `overlong` says", low=16, high=1_048_576
    )
    overlong: str = option(
        "error",
        "rows over max_length: stop and say so, leave them out, cut them, or split `text` rows into several documents",
        choices=("error", "drop", "truncate", "split"),
    )
    train_on: str = option(
        "completion",
        "tokens in the loss: the last answer, every assistant turn (but those of `weight: 0` or `train: false`), or all",
        choices=("completion", "assistant", "all"),
    )
    chat_template: str | None = option(
        None, "Jinja file for `messages` when the tokenizer has no chat template"
    )


@dataclass(frozen=True)
class Train:
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", above=0.0, high=1.0)
    scheduler: str = option(
        "linear", "learning-rate schedule after the warm-up, by transformers' names", choices=SCHEDULERS
    )
    min_lr_ratio: float = option(
        0.0,
        f"share of the peak learning rate at the end, with {', '.join(WITH_MINIMUM)}",
        low=0.0,
        high=0.99,
    )
    decay_steps: int | None = option(
        None, "last steps in which the rate falls, with warmup_stable_decay", low=1, high=10_000_000
    )
    warmup_steps: int = option(0, "steps from 0 to the peak learning rate", low=0, high=10_000_000)
    method: str = option(
        "sft",
        "sft: learn the answers, or `text` as it is (continued pretraining); dpo: learn from chosen and rejected answers",
        choices=("sft", "dpo"),
    )
    dpo_beta: float = option(
        0.1,
        "dpo: how strongly the model is held to what it was; smaller lets it go further",
        above=0.0,
        high=100.0,
    )
    neftune_alpha: float = option(
        0.0,
        "NEFTune: noise on the embeddings while training, 5 to 15 are usual; 0 = none",
        low=0.0,
        high=1000.0,
    )
    steps: int | None = option(100, "optimizer steps; null: as `epochs` says", low=1, high=10_000_000)
    epochs: float | None = option(
        None, "passes over the data; set `steps: null` with it", above=0.0, high=1000.0
    )
    global_batch_tokens: int = option(
        16_384, "tokens per optimizer step over all GPUs (16,384 = 16 x 1024)", low=16, high=2**30
    )
    micro_batch_tokens: int | str = option(
        "auto",
        "tokens per GPU and forward pass; rows are packed to it; auto: what the plan finds fastest, on a CPU max_length",
        low=16,
        high=2**24,
        words=("auto",),
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", low=0.0, high=1.0)
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm over all ranks; 0 = never", low=0.0
    )
    optimizer: str = option(
        "adamw",
        "32-bit AdamW",
        choices=("adamw",),
        refused={
            "adamw_8bit": "8-bit states are quantised in blocks that sharding cuts otherwise than one process would, "
            "so another number of GPUs would train another model, and a shard of a block can blow up; "
            "sharded 32-bit states take 1.5 GiB for 70B over all GPUs"
        },
    )
    seed: int = option(42, "data order, adapter initialisation and dropout", low=0, high=2**32 - 1)
    log_every: int = option(10, "steps between progress lines; metrics.jsonl has every step", low=1)
    eval_every: int = option(0, "steps between evaluations; 0 = only at the start and the end", low=0)
    early_stopping: int = option(
        0,
        "evaluations on the way without a lower held-out loss before training ends; 0 = never; needs eval_every",
        low=0,
        high=1_000_000,
    )
    deterministic: bool = option(
        False,
        "the same bits from the same run on GPUs too, by slower kernels (docs/evaluation.md); CPUs give them anyway",
    )
    rehearsal: bool = option(
        True, "before step 1: the longest micro-batch, an evaluation, a save and a reload, then all put back"
    )
    save_every: int = option(25, "steps between checkpoints; one is always written at the end", low=1)
    keep_checkpoints: int = option(
        2, "newest checkpoints kept; that of the lowest held-out loss is kept too", low=1
    )
    on_save_error: str = option(
        "continue",
        "a checkpoint cannot be written: go on with a warning and try again at the next, or stop (the one before stays)",
        choices=("continue", "stop"),
    )
    on_nan: str = option(
        "stop",
        "a step whose loss is no number: stop, or leave it out, count it and go on (ten in a row stop all the same)",
        choices=("stop", "skip"),
    )
    restarts: int = option(
        0,
        "times that a rank which died or hangs is started again, with all others, from the last checkpoint",
        low=0,
    )


@dataclass(frozen=True)
class Compute:
    dtype: str = option(
        "auto",
        "auto: bf16 where the hardware has it, else fp16; fp32 on CPUs",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    attention: str = option(
        "auto",
        "auto: variable-length (FlashAttention-2 inside torch, cuDNN where it is faster) if the GPU is able, "
        "else SDPA document by document",
        choices=("auto", "varlen", "sdpa"),
    )
    kernels: str = option(
        "fused",
        "fused: our layer with its own backward; plain: transformers' and PEFT's, slower, to compare with",
        choices=("fused", "plain"),
    )
    offload_layers: int | str = option(
        "auto",
        "layers whose weights lie in host RAM instead of the GPUs; auto: as few as fit",
        low=0,
        high=1000,
        words=("auto",),
    )
    keep_layers: int | str = option(
        "auto",
        "layers that keep their activations for the backward instead of computing them again; auto: as many as fit",
        low=0,
        high=1000,
        words=("auto",),
    )
    accumulate: str = option(
        "fp32",
        "sums inside matrix products; fp16 doubles a GeForce card's rate, needs dtype fp16, and rounds more",
        choices=("fp32", "fp16"),
    )
    processes: int | str = option(
        "auto", "ranks; auto: one per GPU, two on a CPU", low=1, high=64, words=("auto",)
    )


@dataclass(frozen=True)
class Eval:
    samples: int = option(
        3, "held-out prompts answered in full by `eval` where `prompts` is empty", low=0, high=1000
    )
    prompts: list[str] = option([], "questions of your own that `eval` answers in full, before and after")
    tasks: list[str] = option(
        [],
        "what `eval` scores by lm-evaluation-harness: held_out, basics, a task's YAML file, or a name that it knows",
    )
    task_rows: int = option(0, "rows of each task, the first ones; 0 = all", low=0)
    exact_match: int = option(
        0, "held-out prompts whose greedy answer is compared with the reference; 0 = none", low=0
    )
    max_new_tokens: int = option(128, "longest answer of a sample", low=1, high=8192)
    batch_size: int = option(8, "prompts answered at once", low=1, high=1024)


@dataclass(frozen=True)
class Track:
    """Tokens are never settings: they come from the environment, or from a file that it names (docs/watching.md)."""

    tensorboard: bool = option(True, "event files for TensorBoard in runs/NAME/tensorboard")
    wandb: str | None = option(
        None, "Weights & Biases project; written to runs/NAME/wandb, and sent where WANDB_API_KEY is set"
    )
    mlflow: str | None = option(None, "MLflow's tracking server (https://...), or a folder")
    prometheus: str | None = option(
        None, "textfile for Prometheus' node exporter, NAME.prom in its folder, rewritten each step"
    )


@dataclass(frozen=True)
class Paths:
    models: str = option("models", "folder for downloaded and prepared models")
    runs: str = option("runs", "folder of the runs")


@dataclass(frozen=True)
class Settings:
    model: Model = field(default_factory=Model)
    quantization: Quantization = field(default_factory=Quantization)
    prepare: Prepare = field(default_factory=Prepare)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    compute: Compute = field(default_factory=Compute)
    eval: Eval = field(default_factory=Eval)
    track: Track = field(default_factory=Track)
    paths: Paths = field(default_factory=Paths)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per rank and forward pass, with `auto` resolved."""
        tokens = self.train.micro_batch_tokens
        return self.longest_row if isinstance(tokens, str) else tokens

    @property
    def longest_row(self) -> int:
        """Tokens of what is never split over micro-batches: a document, or for DPO both answers with their prompts."""
        return self.data.max_length * (2 if self.train.method == "dpo" else 1)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises UserError where the global batch is no whole number of micro-batches on that many ranks.
        """
        per_pass = world_size * self.micro_batch_tokens
        if self.train.global_batch_tokens % per_pass:
            raise UserError(
                f"train.global_batch_tokens is {self.train.global_batch_tokens}, expected a multiple of {per_pass} "
                f"({world_size} ranks x {self.micro_batch_tokens} tokens per micro-batch); "
                f"set it to {self.nearest_global_batch(world_size)}"
            )
        return self.train.global_batch_tokens // per_pass

    def nearest_global_batch(self, world_size: int) -> int:
        """The whole number of micro-batches on that many ranks that is nearest to train.global_batch_tokens."""
        per_pass = world_size * self.micro_batch_tokens
        return max(1, round(self.train.global_batch_tokens / per_pass)) * per_pass

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read a config and apply `section.key=value` overrides.

    Raises UserError with file, line, key, what was found and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a YAML file (see recipe/configs/)")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in (Path(__file__).parent / "configs").glob("*.yaml"))
        raise UserError(
            f"{path}: no such config file; expected a YAML file such as recipe/configs/"
            f"{nearest(path.stem, known) or known[0]}.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}), expected a YAML file") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; make it readable (chmod a+r {path})") from None
    values, lines = parse_yaml(text, str(path))
    sources = {key: f"{path}:{line}: " for key, line in lines.items()}
    for override in overrides or []:
        key, value = parse_override(override)
        section, _, name = key.partition(".")
        if not isinstance(values.setdefault(section, {}), dict):
            values[section] = {}
        values[section][name] = value
        sources[key] = f"--set {override}: "
    return from_dict(values, sources)


def from_dict(values: dict[str, Any], sources: dict[str, str] | None = None) -> Settings:
    """Checked settings from plain values; `sources` gives each dotted key's place for the messages."""
    sources = sources or {}
    sections = {f.name: f for f in dataclasses.fields(Settings)}
    built: dict[str, Any] = {}
    for name, content in values.items():
        where = sources.get(name, sources.get(next((k for k in sources if k.startswith(f"{name}.")), ""), ""))
        if name not in sections:
            raise UserError(f"{where}unknown section `{name}`{suggest(str(name), list(sections))}")
        if name == "model" and isinstance(content, str):
            content = {"id": content}
        if content is None:
            continue
        if not isinstance(content, dict):
            raise UserError(f"{where}{name} is {shown(content)}, expected a section of `key: value` lines")
        built[name] = _section(name, content, sources)
    settings = Settings(**built)
    check_together(settings, sources)
    return settings


def _section(section: str, content: dict[str, Any], sources: dict[str, str]) -> Any:
    return _built(globals()[section.capitalize()], section, content, sources)


def _built(
    cls: Any, section: str, content: dict[str, Any], sources: dict[str, str], elsewhere: str = ""
) -> Any:
    """A dataclass of options from plain values; `elsewhere` is the place of keys that `sources` does not name."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    checked = {}
    for name, value in content.items():
        key = f"{section}.{name}"
        where = sources.get(key, elsewhere)
        if name not in fields:
            everywhere = [
                f"{s.name}.{f.name}"
                for s in dataclasses.fields(Settings)
                for f in dataclasses.fields(globals()[s.name.capitalize()])
            ]
            others = [k for k in everywhere if k.split(".")[1] == name and not elsewhere]
            hint = f"; did you mean `{others[0]}`?" if others else suggest(str(name), list(fields), section)
            raise UserError(f"{where}unknown key `{key}`{hint}")
        checked[name] = _value(key, value, hints[name], fields[name].metadata, where)
    return cls(**checked)


def _value(key: str, value: Any, hint: Any, limits: Any, where: str) -> Any:
    if hint != list[Source]:
        return checked_value(key, value, hint, limits, where)
    if not isinstance(value, list):
        raise UserError(
            f"{where}{key} is {shown(value)}, expected a list of sources, such as [{{path: a.jsonl, weight: 0.5}}, "
            "{path: b.jsonl}]"
        )
    return [_source(f"{key}[{number}]", item, where) for number, item in enumerate(value)]


def _source(key: str, item: Any, where: str) -> Source:
    if not isinstance(item, dict):
        raise UserError(
            f"{where}{key} is {shown(item)}, expected a mapping such as {{path: rows.jsonl, weight: 1}}"
        )
    source = _built(Source, key, item, {}, where)
    if source.path is None:
        raise UserError(f"{where}{key}.path is empty, expected {expected({str}, _limits(Source, 'path'))}")
    return source


def _limits(cls: Any, name: str) -> Any:
    return next(f.metadata for f in dataclasses.fields(cls) if f.name == name)
