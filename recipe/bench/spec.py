"""What is to be measured: the request of `recipe bench`, checked, as a list of specs, one for each process.

Plain Python without torch: a wrong request is refused at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.hardware import Machine
from recipe.plan.shapes import KNOWN, ModelShape, shape_of

GIB = 2**30
OURS = "ours"
# The lengths that these two were published with; the others are measured at --tokens.
FIXED_TOKENS = {"article": 1024, "fsdp_qlora": 4096}
EMULATIONS = ("article", "fsdp_qlora", "trl")
NAMES = (OURS, *EMULATIONS)
ONE_RANK = ("trl",)  # plain Trainer: no sharding, one device
TINY = ModelShape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512)
CPU_RANKS = 2
DEFAULT_TOKENS, DEFAULT_STEPS = "4096,8192", 5
# Forward, recomputed forward, input gradients: 2 N each. The frozen weights need no gradient.
FLOP_PER_PARAMETER_AND_TOKEN = 6
# NF4 in blocks of 64 with one byte of absmax, which share an fp32 constant in groups of 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LARGEST_ON_CPU = 2e9  # parameters; more would take hours


@dataclass(frozen=True)
class Spec:
    """One measurement: a variant at one length, in a fresh process. `shape` has the layers that were asked for."""

    variant: str
    model_shape: str
    shape: ModelShape
    tokens: int
    document_tokens: int | None  # None: each row is one document
    cap_gib: float
    gpus: int  # 0: ranks on the CPU
    ranks: int
    offload: int | str  # decoder layers whose shards live in host RAM, or "auto"; for ours
    dropout: float
    steps: int
    keep: int | str = "auto"  # layers that keep their activations; for ours
    ram_gib: float | None = None  # host RAM that the placement of ours may count on; None: any
    kernels: str = "fused"
    fake_ranks: int = 0  # rank 0 of so many, whose peers do not exist: true memory, wrong numbers
    profile: bool = False
    lora_rank: int = 16
    warm_up: int = 2
    micro_batches: int = 1
    seed: int = 0
    checkpoint: str | None = None  # that ours loads, in place of random weights
    cold: bool = True  # its pages dropped from the system's cache before
    dtype: str = "bf16"  # of the arithmetic of ours on a GPU, or fp32; a CPU has fp32 only
    p2p: bool | None = None  # GPUs write into each other's memory; None: as NCCL and its environment decide

    @property
    def name(self) -> str:
        """In the table, beside the tokens."""
        return f"{self.variant} p2p" if self.p2p else self.variant

    @property
    def processes(self) -> int:
        return 1 if self.fake_ranks else self.ranks

    @property
    def on_gpu(self) -> bool:
        return self.gpus > 0

    @property
    def total_steps(self) -> int:
        return self.warm_up + self.steps + self.profile

    @property
    def document_lengths(self) -> list[int]:
        """Of the documents packed into one row; the last may be shorter."""
        length = min(self.document_tokens or self.tokens, self.tokens)
        whole, rest = divmod(self.tokens, length)
        return [length] * whole + ([rest] if rest else [])

    @property
    def flop_per_token(self) -> float:
        return FLOP_PER_PARAMETER_AND_TOKEN * self.shape.parameters

    def skip_reason(self) -> str | None:
        """Why this needs no process to be known as impossible here, or None."""
        if self.variant not in ONE_RANK:
            return None
        if self.gpus > 1:
            return f"plain TRL trains on one GPU, asked for {self.gpus}"
        if importlib.util.find_spec("trl") is None:
            return "the package trl is not installed"
        needed = nf4_model_gib(self.shape)
        if needed > self.cap_gib:
            return f"the NF4 model alone takes {needed:.1f} GiB, the cap is {self.cap_gib:g} GiB"
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        return cls(**{**values, "shape": ModelShape(**values["shape"])})


def nf4_model_gib(shape: ModelShape) -> float:
    """The whole model on one device: NF4 linears, everything else in 16 bits."""
    linear = shape.layers * shape.layer_linear_parameters
    return (linear * NF4_BYTES + (shape.parameters - linear) * 2) / GIB


def specs_of(arguments: Namespace, machine: Machine) -> list[Spec]:
    """The measurements that were asked for, in order, ours first.

    Raises UserError where an option cannot be meant.
    """
    names = _variants(arguments.against or ",".join(EMULATIONS), arguments.only or "none")
    tokens = _lengths("--tokens", arguments.tokens or DEFAULT_TOKENS)
    base = base_spec(arguments, machine)
    if arguments.fake_ranks and names != [OURS]:
        raise UserError("--fake-ranks stands for the peers of one GPU, expected --gpus 1 --only ours with it")
    _check_figure(arguments.figure)
    return [
        dataclasses.replace(
            base,
            variant=name,
            tokens=length,
            ranks=1 if not base.gpus and name in ONE_RANK else base.ranks,
            checkpoint=base.checkpoint if name == OURS else None,
        )
        for name in names
        for length in ([FIXED_TOKENS[name]] if name in FIXED_TOKENS else tokens)
    ]


def base_spec(arguments: Namespace, machine: Machine) -> Spec:
    """What all measurements of a request share, as one of ours."""
    there = len(machine.gpus)
    count = min(there, 1) if arguments.gpus is None else arguments.gpus
    if not 0 <= count <= there:
        why = f" ({machine.gpu_error})" if machine.gpu_error else ""
        raise UserError(
            f"--gpus is `{count}`, expected 0 to {there}, which is what nvidia-smi lists{why}; "
            f"0 measures on {CPU_RANKS} CPU ranks"
        )
    shape = _shape(arguments.model_shape, arguments.layers)
    if count == 0 and shape.parameters > LARGEST_ON_CPU:
        raise UserError(
            f"--model-shape {arguments.model_shape}: {shape.parameters / 1e9:.1f} B parameters are too many for a CPU, "
            "expected --gpus 1 or more, or a small shape such as --model-shape tiny"
        )
    _at_least("--document-tokens", arguments.document_tokens, 2)
    _at_least("--steps", arguments.steps, 1)
    _at_least("--micro-batches", arguments.micro_batches, 1)
    if not 0 < arguments.cap_gib < float("inf"):
        raise UserError(f"--cap-gib is `{arguments.cap_gib:g}`, expected a number of GiB above 0")
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout is `{arguments.dropout:g}`, expected a number from 0 up to, but not, 1")
    offload = _layers("--offload", arguments.offload, shape)
    keep = _layers("--keep", arguments.keep, shape)
    _one_of("--kernels", arguments.kernels, ("fused", "plain"))
    _at_least("--fake-ranks", arguments.fake_ranks, 2)
    if arguments.fake_ranks and count != 1:
        raise UserError("--fake-ranks stands for the peers of one GPU, expected --gpus 1 with it")
    return Spec(
        variant=OURS,
        model_shape=arguments.model_shape,
        shape=shape,
        tokens=0,
        document_tokens=arguments.document_tokens,
        cap_gib=arguments.cap_gib,
        gpus=count,
        ranks=arguments.fake_ranks or count or CPU_RANKS,
        fake_ranks=arguments.fake_ranks or 0,
        keep=keep,
        ram_gib=arguments.ram_gib,
        kernels=arguments.kernels,
        offload=offload,
        dropout=arguments.dropout,
        steps=arguments.steps or DEFAULT_STEPS,
        profile=arguments.profile,
        micro_batches=arguments.micro_batches,
        checkpoint=arguments.checkpoint and str(Path(arguments.checkpoint).resolve()),
    )


def _shape(name: str, layers: int | None) -> ModelShape:
    try:
        shape = TINY if name == "tiny" else shape_of(name)
    except UserError as error:
        if not str(error).startswith("model.id"):
            raise  # a config.json that is wrong
        raise UserError(
            f"--model-shape is `{name}`, which is not known; expected one of tiny, {', '.join(KNOWN)}, "
            "or a folder with config.json"
        ) from None
    _at_least("--layers", layers, 1)
    return dataclasses.replace(shape, layers=layers) if layers else shape


def _variants(against: str, only: str) -> list[str]:
    """Ours and what it is measured against; `only` picks from all."""
    chosen = [] if against == "none" else _words("--against", against, (*EMULATIONS, "none"))
    if "none" in chosen:
        raise UserError(
            f"--against is `{against}`, expected none alone, or a list of {', '.join(EMULATIONS)}"
        )
    return [OURS, *chosen] if only == "none" else _words("--only", only, (*NAMES, "none"))


def _words(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """A comma-separated list without repetitions."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        _one_of(option, word, known)
    return words


def _one_of(option: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UserError(f"{option}: `{word}` is not known, expected one of {', '.join(known)}")


def _lengths(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise UserError(f"{option} is `{text}`, expected whole numbers of at least 2, such as 4096,8192")
    return list(dict.fromkeys(int(word) for word in words))


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{option} is `{value}`, expected a whole number of at least {least}")


def _layers(option: str, text: str, shape: ModelShape) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) > shape.layers:
        raise UserError(f"{option} is `{text}`, expected auto or a number of layers from 0 to {shape.layers}")
    return int(text)


def _check_figure(figure: str | None) -> None:
    """Before hours are spent on what it is to show."""
    if figure is None:
        return
    path = Path(figure)
    if path.suffix.lower() != ".svg" or path.is_dir():
        raise UserError(f"--figure is `{figure}`, expected the name of an .svg file")
    if not path.parent.is_dir():
        raise UserError(f"--figure is `{figure}`, but the folder {path.parent} does not exist; make it first")
