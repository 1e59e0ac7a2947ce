"""The one description of a run: dataclasses, read from YAML, checked with exact errors.

Every field carries its default, its range and a half-line on what it does to memory, speed or result. A config file
names only what differs. This module imports no torch, so that `recipe plan` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipe.errors import UserError

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its explanation and limits: `low`, `high` (inclusive), `above` (exclusive), `choices`, `words`.

    `words` are the texts that a number may be replaced by, such as `auto`.
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


@dataclass(frozen=True)
class Data:
    path: str | None = option(
        None, "JSONL file, hub id (org/name), or `demo`; DATA= on the make line sets it"
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
        "rows over max_length: stop and say so, leave them out, or cut them",
        choices=("error", "drop", "truncate"),
    )
    train_on: str = option(
        "completion",
        "tokens in the loss: the last answer, every assistant turn, or all",
        choices=("completion", "assistant", "all"),
    )
    chat_template: str | None = option(
        None, "Jinja file for `messages` when the tokenizer has no chat template"
    )


@dataclass(frozen=True)
class Train:
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", above=0.0, high=1.0)
    scheduler: str = option(
        "linear", "learning-rate schedule after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = option(0, "steps from 0 to the peak learning rate", low=0, high=10_000_000)
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
    rehearsal: bool = option(
        True, "before step 1: the longest micro-batch, an evaluation, a save and a reload, then all put back"
    )
    save_every: int = option(25, "steps between checkpoints; one is always written at the end", low=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept", low=1)


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
    samples: int = option(3, "held-out prompts answered in full by `eval`", low=0, high=1000)
    exact_match: int = option(
        0, "held-out prompts whose greedy answer is compared with the reference; 0 = none", low=0
    )
    max_new_tokens: int = option(128, "longest answer of a sample", low=1, high=8192)
    batch_size: int = option(8, "prompts answered at once", low=1, high=1024)


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
    paths: Paths = field(default_factory=Paths)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per rank and forward pass, with `auto` resolved."""
        tokens = self.train.micro_batch_tokens
        return self.data.max_length if isinstance(tokens, str) else tokens

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
            f"{_nearest(path.stem, known) or known[0]}.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}), expected a YAML file") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; make it readable (chmod a+r {path})") from None
    values, lines = _parse_yaml(text, str(path))
    sources = {key: f"{path}:{line}: " for key, line in lines.items()}
    for override in overrides or []:
        key, value = _parse_override(override)
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
            raise UserError(f"{where}unknown section `{name}`{_suggest(str(name), list(sections))}")
        if name == "model" and isinstance(content, str):
            content = {"id": content}
        if content is None:
            continue
        if not isinstance(content, dict):
            raise UserError(f"{where}{name} is {_shown(content)}, expected a section of `key: value` lines")
        built[name] = _section(name, content, sources)
    settings = Settings(**built)
    _cross_checks(settings, sources)
    return settings


def _section(section: str, content: dict[str, Any], sources: dict[str, str]) -> Any:
    cls = globals()[section.capitalize()]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    checked = {}
    for name, value in content.items():
        key = f"{section}.{name}"
        where = sources.get(key, "")
        if name not in fields:
            everywhere = [
                f"{s.name}.{f.name}"
                for s in dataclasses.fields(Settings)
                for f in dataclasses.fields(globals()[s.name.capitalize()])
            ]
            elsewhere = [k for k in everywhere if k.split(".")[1] == name]
            hint = (
                f"; did you mean `{elsewhere[0]}`?"
                if elsewhere
                else _suggest(str(name), list(fields), section)
            )
            raise UserError(f"{where}unknown key `{key}`{hint}")
        checked[name] = _value(key, value, hints[name], fields[name].metadata, where)
    return cls(**checked)


def _value(key: str, value: Any, hint: Any, limits: Any, where: str) -> Any:
    """One value, converted where that loses nothing (1e-4 is text to YAML), or UserError."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    fail = UserError(f"{where}{key} is {_shown(value)}, expected {_expected(kinds, limits)}")
    if isinstance(value, str) and value in limits.get("refused", {}):
        raise UserError(f"{fail}; {limits['refused'][value]}")
    if value is None:
        if type(None) in kinds:
            return None
        raise fail
    if list[str] in kinds:
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise fail
        for item in value:
            if limits.get("choices") and item not in limits["choices"]:
                raise UserError(
                    f"{where}{key} has {_shown(item)}, expected some of {', '.join(limits['choices'])}"
                )
        if len(set(value)) != len(value):
            raise UserError(
                f"{where}{key} names {_shown(max(value, key=value.count))} twice, expected each one once"
            )
        return list(value)
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise fail
    if isinstance(value, bool):
        raise fail
    if int in kinds or float in kinds:
        if isinstance(value, str) and value in limits.get("words", ()):
            return value
        number = _number(value)
        if number is None or (int in kinds and float not in kinds and number != int(number)):
            raise fail
        if not (limits.get("low", -math.inf) <= number <= limits.get("high", math.inf)) or (
            "above" in limits and number <= limits["above"]
        ):
            raise fail
        return float(number) if float in kinds else int(number)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise fail
    if limits.get("choices") and value not in limits["choices"]:
        raise UserError(f"{fail}{_suggest(value, limits['choices'])}")
    return value


def _cross_checks(settings: Settings, sources: dict[str, str]) -> None:
    """What no single value can tell."""
    data, train = settings.data, settings.train
    if (train.steps is None) == (train.epochs is None):
        raise UserError(
            f"{sources.get('train.epochs', sources.get('train.steps', ''))}train.steps is {_shown(train.steps)} and "
            f"train.epochs is {_shown(train.epochs)}, expected exactly one of them (the other one: null)"
        )
    if settings.micro_batch_tokens < data.max_length:
        raise UserError(
            f"{sources.get('train.micro_batch_tokens', '')}train.micro_batch_tokens is {settings.micro_batch_tokens}, "
            f"expected at least data.max_length ({data.max_length}), since a row is never split over micro-batches"
        )
    if train.steps is not None and train.warmup_steps > train.steps:
        raise UserError(
            f"{sources.get('train.warmup_steps', '')}train.warmup_steps is {train.warmup_steps}, "
            f"expected at most train.steps ({train.steps})"
        )
    if train.global_batch_tokens < settings.micro_batch_tokens:
        raise UserError(
            f"{sources.get('train.global_batch_tokens', '')}train.global_batch_tokens is {train.global_batch_tokens}, "
            f"expected at least one micro-batch ({settings.micro_batch_tokens} tokens)"
        )


def _parse_yaml(text: str, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values, and for each dotted key the line that it stands on."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-45
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"{path}{line}: not valid YAML ({problem}), expected `section:` and `  key: value`"
        ) from None
    if values is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: is {_shown(values)}, expected sections such as `model:` and `train:`")
    lines: dict[str, int] = {}

    def walk(mapping: yaml.MappingNode, prefix: str) -> None:
        for key, value in mapping.value:
            name = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(
                    f"{path}:{line}: `{name}` is set twice (first on line {lines[name]}), expected once"
                )
            lines[name] = line
            if isinstance(value, yaml.MappingNode) and not prefix:
                walk(value, f"{name}.")

    walk(node, "")
    return values, lines


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]+\.[A-Za-z_0-9]+", key.strip()):
        raise UserError(f"--set {text}: expected section.key=value, such as train.steps=50")
    try:
        return key.strip(), yaml.safe_load(raw) if raw.strip() else None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {text}: the value is not valid YAML, expected section.key=value") from None


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _expected(kinds: set[Any], limits: Any) -> str:
    if list[str] in kinds:
        return f"a list of {', '.join(limits.get('choices', ['texts']))}"
    if bool in kinds:
        return "true or false"
    if limits.get("choices"):
        text = "one of " + ", ".join(limits["choices"])
    elif int in kinds or float in kinds:
        text = "a number" if float in kinds else "a whole number"
        low, high, above = (limits.get(name) for name in ("low", "high", "above"))
        if above is not None:
            text += f" above {above:g}"
        if low is not None and high is not None:
            text += f" from {low:g} to {high:,}"
        elif low is not None:
            text += f" of at least {low:g}"
        elif high is not None:
            text += f" and at most {high:g}"
        text += "".join(f" or `{word}`" for word in limits.get("words", ()))
    else:
        text = f"text: {limits['help']}"
    return text + (" or null" if type(None) in kinds else "")


def _shown(value: Any) -> str:
    text = str(value).replace("\n", " ")
    text = text if len(text) <= 40 else text[:37] + "..."
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"`{text.lower()}`"
    return f"{value:g}" if isinstance(value, float) else f"`{text}`"


def _nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None


def _suggest(word: str, known: list[str] | tuple[str, ...], section: str = "") -> str:
    near = _nearest(word, known)
    prefix = f"{section}." if section else ""
    return f"; did you mean `{prefix}{near}`?" if near else f"; known: {', '.join(known)}"
