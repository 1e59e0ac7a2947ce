"""What `recipe COMMAND` does: each takes the parsed request, calls the room that does the work, prints, gives the exit code.

Imports stand where they are needed: to refuse a request or to plan must not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from recipe.errors import Refused, UserError
from recipe.settings import Settings, load


def _settings(arguments: argparse.Namespace) -> Settings:
    overrides = list(arguments.overrides)
    if arguments.data:
        overrides.append(f"data.path={json.dumps(arguments.data, ensure_ascii=False)}")
    return load(arguments.config, overrides)


def machine_here(settings: Settings):
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


def plan(arguments: argparse.Namespace) -> int:
    from recipe import plan
    from recipe.plan import calibrate
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    if arguments.figure and not arguments.sweep:
        raise UserError("--figure: expected with --sweep, whose rates it shows")
    models = settings.paths.models
    cards = calibrate.calibrate(models) if arguments.calibrate else calibrate.read(models)
    target = plan.target_of(
        machine_here(settings),
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


def preflight(arguments: argparse.Namespace) -> int:
    from recipe import hostenv, preflight
    from recipe.plan import calibrate, make_plan
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    machine = machine_here(settings)
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


def prepare(arguments: argparse.Namespace) -> int:
    from recipe.prepare import prepare
    from recipe.prepare.rates import render

    settings = _settings(arguments)
    machine_here(settings)
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


def data(arguments: argparse.Namespace) -> int:
    from recipe.data import command
    from recipe.prepare import prepared_folder

    settings = _settings(arguments)
    return command.data(arguments.what, settings, prepared_folder(settings), arguments.rows, arguments.json)


def train(arguments: argparse.Namespace) -> int:
    return _trained(
        _settings(arguments), arguments.config, arguments.run, arguments.force, as_json=arguments.json
    )


def _trained(settings: Settings, config: str, name: str | None, force: bool, as_json: bool) -> int:
    from recipe.plan import calibrate, plan_for, render, target_of, ways_out
    from recipe.plan.budget import with_tokens
    from recipe.prepare import prepare, prepared_folder
    from recipe.train import launch
    from recipe.train.run import begin_or_continue

    machine = machine_here(settings)
    run, goes_on = begin_or_continue(settings, name)
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
        if not force:
            raise Refused(f"{config}: does not fit on this machine; see above, or try with --force")
        print("trying all the same (--force)", file=sys.stderr)
    prepared = prepare(settings)
    try:
        run = launch.start(settings, name, prepared, machine, plan)
    except launch.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    summary = json.loads(run.summary.read_text())
    if as_json:
        _print({"run": run.name, **summary})
    else:
        loss = summary["held_out_loss"]
        print(
            f"run {run.name}: {summary['steps']} steps, held-out loss {'not measured' if loss is None else f'{loss:.4f}'}; "
            f"next: make export-adapters RUN={run.name}"
        )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from recipe.export import evaluate

    if arguments.samples is not None and arguments.samples < 0:
        raise UserError(f"--samples is {arguments.samples}, expected at least 0")
    if arguments.task_rows is not None and arguments.task_rows < 0:
        raise UserError(f"--task-rows is {arguments.task_rows}, expected at least 0 (0: all)")
    tasks = None if arguments.tasks is None else [name for name in arguments.tasks.split(",") if name]
    report = evaluate.evaluate(_existing_run(arguments), arguments.samples, tasks, arguments.task_rows)
    _print(report) if arguments.json else print(evaluate.render(report))
    return 0


def export(arguments: argparse.Namespace) -> int:
    from recipe.export import deliver

    results = deliver.export(_existing_run(arguments), arguments)
    _print(results[0] if len(results) == 1 else results) if arguments.json else print(deliver.render(results))
    return 0


def chat(arguments: argparse.Namespace) -> int:
    from recipe.export import chat

    if arguments.base and arguments.both:
        raise UserError("--base and --both: expected one of them")
    mode = "/base" if arguments.base else "/both" if arguments.both else "/tuned"
    names = chat.MODES[mode]
    return chat.chat(_existing_run(arguments), arguments.once, names, arguments.system, arguments.json)


def serve(arguments: argparse.Namespace) -> int:
    from recipe.serve import command

    if arguments.json:
        raise UserError("--json: serve prints no document, expected without it")
    command.serve_run(_existing_run(arguments), arguments.port, arguments.type)
    return 0


def report(arguments: argparse.Namespace) -> int:
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


def compare(arguments: argparse.Namespace) -> int:
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


def doctor(arguments: argparse.Namespace) -> int:
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


def reproduce(arguments: argparse.Namespace) -> int:
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
        machine = machine_here(settings)
        target = target_of(machine, measured=calibrate.read(settings.paths.models))
        ranks = plan_for(settings, target, prepared_folder(settings)).world_size
        found = reproduce.differences(then, reproduce.present(settings, machine, ranks, then))
        print(reproduce.table(found), file=sys.stderr)
        reproduce.require_same(run, found, arguments.anyway)
        again = load(run.config, [f"paths.runs={json.dumps(str(run.folder.parent))}"])
        with contextlib.redirect_stdout(sys.stderr):  # what is printed at the end is the comparison
            code = _trained(again, str(run.config), repeated.name, force=False, as_json=False)
        if code:
            return code
    else:
        print(f"run {repeated.name} is finished: compared as it is", file=sys.stderr)
    result = reproduce.compare(run, repeated)
    _print(result) if arguments.json else print(reproduce.render(result))
    return 0 if result["as_expected"] else 1


def demo(arguments: argparse.Namespace) -> int:
    from recipe import showcase

    return showcase.demo(load_runs_folder(arguments.overrides), arguments.run, arguments.json)


def bench(arguments: argparse.Namespace) -> int:
    from recipe import bench

    if arguments.overrides:
        raise UserError(
            f"--set {arguments.overrides[0]}: bench reads no config, expected its own options; "
            "see `recipe bench --help`"
        )
    return bench.run(arguments)
