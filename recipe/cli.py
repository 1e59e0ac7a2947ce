"""`recipe COMMAND`: reads the request, calls the room that does the work, turns its end into an exit code.

0 done; 1 the answer is no; 2 the request was wrong, in one line; 130 and 143 stopped by a signal, after saving.
Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from recipe import __version__
from recipe.errors import Refused, UserError
from recipe.settings import Settings, load

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
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, help: str, run, config: bool = False, run_name: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
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

    plan = add("plan", "does it fit, part by part; needs neither GPU nor weights", _plan, config=True)
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
    check = add("preflight", "is this machine able to do it", _preflight, config=True)
    check.add_argument("--quick", action="store_true", help="measure nothing: within 5 s")
    add("prepare", "find or download the model and quantise it to NF4", _prepare, config=True)
    data = add(
        "data", "the rows as the model sees them, what is wrong with them, or how many", _data, config=True
    )
    data.add_argument(
        "what", nargs="?", choices=("show", "check", "stats"), default="show", help="(default: show)"
    )
    data.add_argument("--rows", type=int, default=5, metavar="N", help="how many to show (default: 5)")
    train = add("train", "train, or go on with an unfinished run", _train, config=True, run_name=True)
    train.add_argument(
        "--force", action="store_true", help="try it although the plan says that it cannot fit"
    )
    evaluate = add(
        "eval", "held-out loss, perplexity and samples, without and with the adapters", _eval, run_name=True
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="prompts to answer in full")
    evaluate.add_argument(
        "--tasks",
        metavar="NAME[,NAME…]",
        help="score them with lm-evaluation-harness: held_out, basics, a task's YAML file, or a name that it knows",
    )
    evaluate.add_argument("--task-rows", type=int, metavar="N", help="of each task, the first ones; 0: all")
    add("export", "a PEFT folder, verified in a fresh process", _export, run_name=True)
    chat = add("chat", "talk to the trained model", _chat, run_name=True)
    chat.add_argument("--once", metavar="TEXT", help="answer this and end")
    chat.add_argument(
        "--system",
        metavar="TEXT",
        help="system message in place of the one that the training rows began with",
    )
    chat.add_argument("--base", action="store_true", help="begin with the adapters off")
    report = add(
        "report", "one HTML file of a run: curves, plan, data, samples, events", _report, run_name=True
    )
    report.add_argument("--output", metavar="FILE", help="in place of report.html in the run's folder")
    report.add_argument("--kwh-price", type=float, metavar="P", help="of energy, for what the run cost")
    report.add_argument("--watch", action="store_true", help="serve it on this machine while training runs")
    report.add_argument("--port", type=int, default=8765, metavar="N", help="with --watch (default: 8765)")
    compare = add("compare", "what differs between runs, and what came out", _compare)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="two runs or more")
    compare.add_argument("--output", metavar="FILE", help="an HTML file too, with the curves over each other")
    doctor = add("doctor", "what went wrong in a run or a log, and what to do", _doctor, run_name=True)
    doctor.add_argument("--log", metavar="FILE", help="a log of accelerate or torchrun, of any program")
    doctor.add_argument(
        "--bundle", metavar="FILE.tar.gz", help="an archive for an issue report, without secrets and data"
    )
    doctor.add_argument("--list", action="store_true", help="all failures that are known")
    doctor.add_argument("--markdown", action="store_true", help="with --list: as in docs/troubleshooting.md")
    reproduce = add(
        "reproduce",
        "repeat a run from its manifest into NAME-again and compare the adapters",
        _reproduce,
        run_name=True,
    )
    reproduce.add_argument(
        "--anyway", action="store_true", help="although something differs that decides the result"
    )
    add("demo", "the whole job, small and real: prepare, train, export, compare", _demo, run_name=True)
    _bench_options(
        add("bench", "speed and memory at a model's true shapes, random weights, against other ways", _bench)
    )
    return top


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
    bench.add_argument("--output", metavar="FOLDER", help="for the results of a suite: JSON, figures, report")


def _settings(arguments: argparse.Namespace) -> Settings:
    overrides = list(arguments.overrides)
    if arguments.data:
        overrides.append(f"data.path={json.dumps(arguments.data, ensure_ascii=False)}")
    return load(arguments.config, overrides)


def _machine(settings: Settings):
    from recipe import hardware

    if refused := hardware.refuse_unsupported():
        raise UserError(refused)
    return hardware.probe(settings.paths.models)


def _existing_run(arguments: argparse.Namespace):
    from recipe.train.run import find_run

    runs = load_runs_folder(arguments.overrides)
    return find_run(runs, arguments.run)


def load_runs_folder(overrides: list[str]) -> str:
    from recipe.configfile import parse_override
    from recipe.settings import Paths, from_dict

    for text in overrides:
        key, value = parse_override(text)
        if key == "paths.runs":
            return from_dict({"paths": {"runs": value}}, {"paths.runs": f"--set {text}: "}).paths.runs
        raise UserError(
            f"--set {text}: expected paths.runs=FOLDER here; a run's settings stand in its config.yaml"
        )
    return Paths().runs


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _plan(arguments: argparse.Namespace) -> int:
    from recipe import plan
    from recipe.plan import calibrate
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    if arguments.figure and not arguments.sweep:
        raise UserError("--figure: expected with --sweep, whose rates it shows")
    models = settings.paths.models
    cards = calibrate.calibrate(models) if arguments.calibrate else calibrate.read(models)
    target = plan.target_of(
        _machine(settings),
        gpus=arguments.gpus,
        vram_gib=_sizes("--vram-gib", arguments.vram_gib),
        card_names=arguments.gpu.split(",") if arguments.gpu else None,
        ram_gib=arguments.ram_gib,
        measured=cards,
    )
    folder = prepared_folder(settings)
    if arguments.sweep:
        return _sweep(arguments, settings, target, folder)
    found = plan.plan_for(settings, target, folder)
    ways = [] if found.fits else plan.ways_out(settings, target, folder)
    if arguments.json:
        _print(found.to_dict() | {"ways": [{"change": way.change, **way.plan.to_dict()} for way in ways]})
    else:
        print(plan.render(found, ways, arguments.kwh_price))
    return 0 if found.fits else 1


def _sweep(arguments: argparse.Namespace, settings: Settings, target: Any, folder: Path) -> int:
    import dataclasses

    from recipe.files import write_text
    from recipe.plan import sweep

    if not target.gpus or target.cards[0] is None:
        raise UserError("--sweep: the card's rate is not known here, expected --gpu NAME as well")
    found = sweep.sweep(settings, target, folder)
    if arguments.figure:
        write_text(Path(arguments.figure), sweep.figure(found))
    _print(dataclasses.asdict(found)) if arguments.json else print(sweep.render(found))
    return 0


def _sizes(option: str, text: str | None) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{option} is `{text}`, expected GiB, such as 24, or 24,16 for two cards") from None


def _preflight(arguments: argparse.Namespace) -> int:
    from recipe import hostenv, preflight
    from recipe.plan import calibrate, make_plan
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    machine = _machine(settings)
    folder = prepared_folder(settings)
    context = preflight.Context(
        settings,
        machine,
        # As `recipe train` will plan it, which goes by a calibration too.
        make_plan(settings, machine, prepared=folder, measured=calibrate.read(settings.paths.models)),
        folder,
        quick=arguments.quick,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    checks = preflight.run_checks(context)
    _print(preflight.to_dict(checks)) if arguments.json else print(preflight.render(checks))
    if line := hostenv.write(".", machine, *preflight.measured_copies(context)):
        print(line, file=sys.stderr)
    return 1 if preflight.failed(checks) else 0


def _prepare(arguments: argparse.Namespace) -> int:
    from recipe.prepare import prepare
    from recipe.prepare.rates import render

    settings = _settings(arguments)
    _machine(settings)
    prepared = prepare(settings)
    size = sum(path.stat().st_size for path in prepared.folder.glob("*.safetensors"))
    if arguments.json:
        _print(
            {
                "folder": str(prepared.folder),
                "name": prepared.name,
                "bytes": size,
                "fresh": prepared.fresh,
                "rates": prepared.rates,
            }
        )
    else:
        done = "quantised" if prepared.fresh else "was there already"
        print(f"{prepared.name}: {done}, {size / 2**30:.2f} GiB of NF4 in {prepared.folder}")
        if prepared.rates:
            print(render(prepared.rates))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from recipe.data import command
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    return command.data(arguments.what, settings, prepared_folder(settings), arguments.rows, arguments.json)


def _train(arguments: argparse.Namespace) -> int:
    from recipe.plan import calibrate, plan_for, render, target_of, ways_out
    from recipe.plan.budget import with_tokens
    from recipe.prepare import prepare, prepared_folder
    from recipe.train import launch
    from recipe.train.run import begin_or_continue

    settings = _settings(arguments)
    machine = _machine(settings)
    run, goes_on = begin_or_continue(settings, arguments.run)
    if goes_on:  # with what a plan has decided once for all
        settings = with_tokens(settings, run.settings().micro_batch_tokens)
    target, folder = (
        target_of(machine, measured=calibrate.read(settings.paths.models)),
        prepared_folder(settings),
    )
    plan = plan_for(settings, target, folder)
    settings = plan.decided(settings)
    if not goes_on:
        launch.check(settings, plan.world_size)
    if not plan.fits:
        print(render(plan, ways_out(settings, target, folder)), file=sys.stderr)
        if not arguments.force:
            raise Refused(f"{arguments.config}: does not fit on this machine; see above, or try with --force")
        print("trying all the same (--force)", file=sys.stderr)
    prepared = prepare(settings)
    try:
        run = launch.start(settings, arguments.run, prepared, machine, plan)
    except launch.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    summary = json.loads(run.summary.read_text())
    if arguments.json:
        _print({"run": run.name, **summary})
    else:
        loss = summary["held_out_loss"]
        print(
            f"run {run.name}: {summary['steps']} steps, held-out loss {'not measured' if loss is None else f'{loss:.4f}'}; "
            f"next: make export-adapters RUN={run.name}"
        )
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from recipe.export import evaluate

    if arguments.samples is not None and arguments.samples < 0:
        raise UserError(f"--samples is {arguments.samples}, expected at least 0")
    if arguments.task_rows is not None and arguments.task_rows < 0:
        raise UserError(f"--task-rows is {arguments.task_rows}, expected at least 0 (0: all)")
    tasks = None if arguments.tasks is None else [name for name in arguments.tasks.split(",") if name]
    report = evaluate.evaluate(_existing_run(arguments), arguments.samples, tasks, arguments.task_rows)
    _print(report) if arguments.json else print(evaluate.render(report))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from recipe.export import adapters

    result = adapters.export(_existing_run(arguments))
    _print(result) if arguments.json else print(adapters.render(result))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from recipe.export import chat

    return chat.chat(
        _existing_run(arguments), arguments.once, adapters=not arguments.base, system=arguments.system
    )


def _report(arguments: argparse.Namespace) -> int:
    from recipe.report import make, serve

    run = _existing_run(arguments)
    if arguments.watch:
        if arguments.output or arguments.json:
            raise UserError("--watch: expected without --output and --json, since it writes no file")
        serve.watch(run, arguments.port, arguments.kwh_price)
        return 0
    result = make.report(run, arguments.output, arguments.kwh_price)
    if arguments.json:
        _print(result)
    else:
        print(f"{result['file']}: run {run.name} ({result['state']}), {result['bytes'] / 2**20:.1f} MiB")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from recipe.report import compare
    from recipe.report.read import read
    from recipe.train.run import find_run

    runs = load_runs_folder(arguments.overrides)
    names = list(dict.fromkeys(arguments.runs))
    if len(names) < 2:
        raise UserError(
            f"compare {' '.join(arguments.runs)}: expected the names of two different runs or more"
        )
    records = [read(find_run(runs, name)) for name in names]
    found = compare.compare(records)
    if arguments.output:
        compare.write_html(records, found, arguments.output)
    _print(found) if arguments.json else print(compare.render(found))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from recipe import doctor

    asked = [name for name in ("list", "log", "run") if getattr(arguments, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]}: expected one of --run NAME, --log FILE and --list")
    if arguments.markdown and not arguments.list:
        raise UserError("--markdown: expected only with --list")
    if arguments.list:
        return doctor.list_rules(arguments.json, arguments.markdown)
    bundle = Path(arguments.bundle) if arguments.bundle else None
    if arguments.log:
        return doctor.doctor(None, Path(arguments.log), arguments.json, bundle)
    return doctor.doctor(_existing_run(arguments), None, arguments.json, bundle)


def _reproduce(arguments: argparse.Namespace) -> int:
    from recipe import reproduce
    from recipe.export.plain import finished_checkpoint
    from recipe.files import read_json
    from recipe.plan import calibrate, plan_for, target_of
    from recipe.prepare import prepared_folder

    run = _existing_run(arguments)
    finished_checkpoint(run)
    repeated = reproduce.again(run)
    if not repeated.finished:
        settings, then = run.settings(), read_json(run.manifest)
        machine = _machine(settings)
        target = target_of(machine, measured=calibrate.read(settings.paths.models))
        ranks = plan_for(settings, target, prepared_folder(settings)).world_size
        found = reproduce.differences(then, reproduce.present(settings, machine, ranks, then))
        print(reproduce.table(found), file=sys.stderr)
        reproduce.require_same(run, found, arguments.anyway)
        again = ["train", "--config", str(run.config), "--run", repeated.name]
        with contextlib.redirect_stdout(sys.stderr):  # what is printed at the end is the comparison
            code = _train(
                parser().parse_args([*again, "--set", f"paths.runs={json.dumps(str(run.folder.parent))}"])
            )
        if code:
            return code
    else:
        print(f"run {repeated.name} is finished: compared as it is", file=sys.stderr)
    result = reproduce.compare(run, repeated)
    _print(result) if arguments.json else print(reproduce.render(result))
    return 0 if result["as_expected"] else 1


def _demo(arguments: argparse.Namespace) -> int:
    from recipe import showcase

    return showcase.demo(load_runs_folder(arguments.overrides), arguments.run, arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from recipe import bench

    if arguments.overrides:
        raise UserError(
            f"--set {arguments.overrides[0]}: bench reads no config, expected its own options; "
            "see `recipe bench --help`"
        )
    return bench.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
