"""What `recipe export` was asked for, checked; and where an export goes once it is made: Ollama, an archive, a hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipe.errors import UserError
from recipe.export import archive, card, ollama, publish, targets
from recipe.export.gguf_types import KINDS
from recipe.train.run import Run, check_name


def export(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each export that was made or, where it is only to be sent on, was there.

    Raises UserError where the request is wrong, before anything is written.
    """
    order = order_of(arguments)
    _check(arguments, order)
    results = targets.export(run, order)
    # Of several the last is what was asked for: the others are what it stands on.
    last = results[-1]
    folder = Path(last["folder"])
    if arguments.ollama is not None:
        name = arguments.ollama or run.name.lower()
        created = ollama.create(name, folder)
        last["ollama"] = {"name": name, "created": created, "command": " ".join(ollama.command(name))}
    if arguments.archive or arguments.publish:
        card.refresh(run, folder, last["kind"])  # an evaluation may have come later
    if arguments.archive:
        last["archive"] = archive.archive(folder, Path(arguments.archive))
    if arguments.publish:
        last["published"] = publish.publish(
            folder, arguments.publish, arguments.public, arguments.dry_run, arguments.yes
        )
    return results


def order_of(arguments: argparse.Namespace) -> targets.Order:
    return targets.Order(
        merge=arguments.merge,
        gguf=arguments.gguf,
        gguf_lora=arguments.gguf_lora,
        base=arguments.base,
        base_gguf=arguments.base_gguf,
        weight=arguments.weight,
        others=tuple(_weighted(text) for text in arguments.others),
        replace=arguments.replace,
        reuse=arguments.ollama is not None or bool(arguments.archive or arguments.publish),
    )


def render(results: list[dict[str, Any]]) -> str:
    lines = [targets.render(results)]
    last = results[-1]
    lines += [_ollama_line(last["folder"], **last["ollama"])] if "ollama" in last else []
    lines += [archive.render(last["archive"])] if "archive" in last else []
    lines += [publish.render(last["published"])] if "published" in last else []
    return "\n".join(lines)


def _ollama_line(folder: str, name: str, created: bool, command: str) -> str:
    if created:
        return f"Ollama has it: ollama run {name}"
    return f"there is no `ollama` here; where it is: (cd {folder} && {command})"


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    check_name(name)
    try:
        return name, float(weight or 1)
    except ValueError:
        raise UserError(f"--with {text}: `{weight}` is no number, expected RUN or RUN=WEIGHT") from None


def _check(arguments: argparse.Namespace, order: targets.Order) -> None:
    for option, kind in (("--gguf", order.gguf), ("--base-gguf", order.base_gguf)):
        if kind is not None and kind not in KINDS:
            raise UserError(f"{option} {kind}: unknown quantisation, expected one of {', '.join(KINDS)}")
    mixed = order.weight != 1 or order.others or order.base != "nf4"
    if mixed and not (order.merge or order.gguf):
        raise UserError("--base, --weight and --with: expected with --merge or --gguf, which merge adapters")
    if order.gguf_lora and (order.weight != 1 or order.others):
        raise UserError(
            "--gguf-lora: holds one run's adapters as they are, expected without --with and --weight"
        )
    if arguments.ollama is not None and not (order.gguf or order.gguf_lora):
        raise UserError("--ollama: expected with --gguf TYPE or --gguf-lora, since Ollama runs GGUF files")
    if arguments.ollama:
        ollama.check_name(arguments.ollama)
    if arguments.public and not arguments.publish:
        raise UserError("--public: expected with --publish OWNER/NAME")
    if arguments.dry_run and not arguments.publish:
        raise UserError("--dry-run: expected with --publish OWNER/NAME")
