"""`recipe COMMAND`: reads the request, hands it to recipe/commands.py, turns its end into an exit code.

0 done; 1 the answer is no; 2 the request was wrong, in one line; 130 and 143 stopped by a signal, after saving.
Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from recipe import __version__, commands
from recipe.errors import Refused, UserError

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars that libraries draw, into a log file too
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries among themselves
    # It asks for an optional package that would fetch kernels from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        arguments = parser().parse_args(argv)
        return arguments.run_command(arguments)
    except (UserError, Refused) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="recipe", description="Fine-tune a 70B language model on the GPUs that you own.")
    top.add_argument("--version", action="version", version=f"recipe {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, help: str, run, config: bool = False, run_name: bool = False
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=help)
        sub.set_defaults(run_command=run)
        if config:
            sub.add_argument("--config", required=True, metavar="FILE", help="a YAML, as in recipe/configs/")
            sub.add_argument(
                "--data", metavar="PATH", help="training data in place of the config's data.path"
            )
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            dest="overrides",
            help="one setting, may be repeated",
        )
        if run_name:
            sub.add_argument("--run", metavar="NAME", help="a run in the runs folder")
        sub.add_argument("--json", action="store_true", help="one JSON document on standard output")
        return sub

    plan = add("plan", "does it fit, part by part; needs neither GPU nor weights", commands.plan, config=True)
    plan.add_argument("--gpus", type=int, metavar="N", help="plan for this many GPUs, 0 for a CPU")
    plan.add_argument("--vram-gib", metavar="G[,G…]", help="memory of each of them, or of one and the other")
    plan.add_argument(
        "--gpu", metavar="NAME[,NAME…]", help="which cards they are, such as 'RTX 4090' or '3090,4090'"
    )
    plan.add_argument("--ram-gib", type=float, metavar="R", help="memory of the host")
    plan.add_argument("--kwh-price", type=float, metavar="P", help="of energy, for what the run costs")
    plan.add_argument("--sweep", action="store_true", help="tokens/s over lengths and numbers of cards")
    plan.add_argument("--figure", metavar="FILE.svg", help="with --sweep: write a bar chart too")
    plan.add_argument("--calibrate", action="store_true", help="measure this machine's GPUs first, in 30 s")
    check = add("preflight", "is this machine able to do it", commands.preflight, config=True)
    check.add_argument("--quick", action="store_true", help="measure nothing: within 5 s")
    add("prepare", "find or download the model and quantise it to NF4", commands.prepare, config=True)
    data = add(
        "data",
        "the rows as the model sees them, what is wrong with them, or how many",
        commands.data,
        config=True,
    )
    data.add_argument(
        "what", nargs="?", choices=("show", "check", "stats"), default="show", help="(default: show)"
    )
    data.add_argument("--rows", type=int, default=5, metavar="N", help="how many to show (default: 5)")
    train = add("train", "train, or go on with an unfinished run", commands.train, config=True, run_name=True)
    train.add_argument(
        "--force", action="store_true", help="try it although the plan says that it cannot fit"
    )
    evaluate = add(
        "eval",
        "held-out loss, perplexity and samples, without and with the adapters",
        commands.evaluate,
        run_name=True,
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="prompts to answer in full")
    evaluate.add_argument(
        "--tasks",
        metavar="NAME[,NAME…]",
        help="score them with lm-evaluation-harness: held_out, basics, a task's YAML file, or a name that it knows",
    )
    evaluate.add_argument("--task-rows", type=int, metavar="N", help="of each task, the first ones; 0: all")
    _export_options(
        add(
            "export",
            "a PEFT folder, a merged model or a GGUF file, verified in a fresh process",
            commands.export,
            run_name=True,
        )
    )
    chat = add("chat", "talk to the trained model", commands.chat, run_name=True)
    chat.add_argument("--once", metavar="TEXT", help="answer this and end")
    chat.add_argument(
        "--system",
        metavar="TEXT",
        help="system message in place of the one that the training rows began with",
    )
    chat.add_argument("--base", action="store_true", help="begin with the adapters off")
    chat.add_argument("--both", action="store_true", help="an answer without the adapters and one with them")
    serve = add(
        "serve",
        "base and tuned model for OpenAI's clients, and a chat page, on this machine alone",
        commands.serve,
        run_name=True,
    )
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="(default: 8080)")
    serve.add_argument("--type", default="q8_0", metavar="TYPE", help="which GGUF export (default: q8_0)")
    report = add(
        "report",
        "one HTML file of a run: curves, plan, data, samples, events",
        commands.report,
        run_name=True,
    )
    report.add_argument("--output", metavar="FILE", help="in place of report.html in the run's folder")
    report.add_argument("--kwh-price", type=float, metavar="P", help="of energy, for what the run cost")
    report.add_argument("--watch", action="store_true", help="serve it on this machine while training runs")
    report.add_argument("--port", type=int, default=8765, metavar="N", help="with --watch (default: 8765)")
    compare = add("compare", "what differs between runs, and what came out", commands.compare)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="two runs or more")
    compare.add_argument("--output", metavar="FILE", help="an HTML file too, with the curves over each other")
    doctor = add(
        "doctor", "what went wrong in a run or a log, and what to do", commands.doctor, run_name=True
    )
    doctor.add_argument("--log", metavar="FILE", help="a log of accelerate or torchrun, of any program")
    doctor.add_argument(
        "--bundle", metavar="FILE.tar.gz", help="an archive for an issue report, without secrets and data"
    )
    doctor.add_argument("--list", action="store_true", help="all failures that are known")
    doctor.add_argument("--markdown", action="store_true", help="with --list: as in docs/troubleshooting.md")
    reproduce = add(
        "reproduce",
        "repeat a run from its manifest into NAME-again and compare the adapters",
        commands.reproduce,
        run_name=True,
    )
    reproduce.add_argument(
        "--anyway", action="store_true", help="although something differs that decides the result"
    )
    add(
        "demo", "the whole job, small and real: prepare, train, export, compare", commands.demo, run_name=True
    )
    _bench_options(
        add(
            "bench",
            "speed and memory at a model's true shapes, random weights, against other ways",
            commands.bench,
        )
    )
    return top


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "--merge", action="store_true", help="a whole model with the adapters merged in, in bf16"
    )
    export.add_argument(
        "--gguf", metavar="TYPE", help="a merged model for llama.cpp and Ollama: f16, bf16, q8_0 or q4_k_m"
    )
    export.add_argument(
        "--gguf-lora", action="store_true", help="the adapters for llama.cpp, with the base as a GGUF file"
    )
    export.add_argument(
        "--base",
        default="nf4",
        metavar="WHICH",
        help="merged into: nf4 (default), what the adapters were trained on; bf16, the unquantised base; or its folder",
    )
    export.add_argument(
        "--base-gguf", default="q8_0", metavar="TYPE", help="of the base beside --gguf-lora (default: q8_0)"
    )
    export.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="of these adapters (default: 1)"
    )
    export.add_argument(
        "--with",
        action="append",
        default=[],
        metavar="RUN[=W]",
        dest="others",
        help="merge another run's adapters in too, may be repeated",
    )
    export.add_argument("--replace", action="store_true", help="make an export that is there already anew")
    export.add_argument(
        "--ollama",
        nargs="?",
        const="",
        metavar="NAME",
        help="make it a model of Ollama's (default: the run's name)",
    )
    export.add_argument("--archive", metavar="FILE.tar", help="one file with checksums for sha256sum -c")
    export.add_argument("--publish", metavar="OWNER/NAME", help="upload it to the model hub, private")
    export.add_argument("--public", action="store_true", help="with --publish: for everybody; asks before")
    export.add_argument("--yes", action="store_true", help="with --public: do not ask")
    export.add_argument("--dry-run", action="store_true", help="with --publish: only show what would be sent")


def _bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--model-shape",
        default="llama-3.1-70b",
        metavar="NAME",
        help="a known model, tiny, or a folder with config.json (default: llama-3.1-70b)",
    )
    bench.add_argument(
        "--cap-gib", type=float, default=22.5, metavar="G", help="allocator limit per GPU (default: 22.5)"
    )
    bench.add_argument(
        "--gpus", type=int, metavar="N", help="0: two CPU ranks (default: 1 where there is a GPU)"
    )
    bench.add_argument(
        "--against",
        metavar="NAMES",
        help="other ways to measure beside ours, or none (default: article,fsdp_qlora,trl)",
    )
    bench.add_argument(
        "--only",
        metavar="NAMES",
        help="measure these alone, such as ours; none: leave none out",
    )
    bench.add_argument(
        "--tokens", metavar="LIST", help="tokens per micro-batch of ours and trl (default: 4096,8192)"
    )
    bench.add_argument(
        "--document-tokens", type=int, metavar="N", help="pack documents of this length (default: one a row)"
    )
    bench.add_argument("--layers", type=int, metavar="N", help="this many decoder layers of the shape")
    bench.add_argument(
        "--offload", default="auto", metavar="K", help="layers that ours keeps in host RAM, or auto (default)"
    )
    bench.add_argument(
        "--keep", default="auto", metavar="K", help="layers of ours that keep their activations, or auto"
    )
    bench.add_argument(
        "--ram-gib", type=float, metavar="R", help="host RAM that ours may plan with (default: any)"
    )
    bench.add_argument("--kernels", default="fused", metavar="KIND", help="of ours: fused (default) or plain")
    bench.add_argument(
        "--fake-ranks", type=int, metavar="N", help="memory of rank 0 of N on one GPU; the peers do not exist"
    )
    bench.add_argument("--dropout", type=float, default=0.05, metavar="P", help="of LoRA (default: 0.05)")
    bench.add_argument("--steps", type=int, metavar="S", help="timed steps, after 2 (default: 5)")
    bench.add_argument(
        "--micro-batches", type=int, default=1, metavar="M", help="of one sequence, per step (default: 1)"
    )
    bench.add_argument("--profile", action="store_true", help="one more step, kernel by kernel")
    bench.add_argument("--figure", metavar="FILE.svg", help="write a bar chart too")
    bench.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="ours loads this prepared checkpoint from a cold cache; made of random bytes where there is none",
    )
    bench.add_argument(
        "--suite",
        metavar="NAME",
        help="two-cards: all that is claimed of two GPUs, against what it must be; plan: what was foreseen against "
        "what real trainings take",
    )
    bench.add_argument(
        "--decode",
        action="store_true",
        help="tokens/s of answers in place of training, as chat and eval give them",
    )
    bench.add_argument("--output", metavar="FOLDER", help="for the results of a suite: JSON, figures, report")


if __name__ == "__main__":
    sys.exit(main())
