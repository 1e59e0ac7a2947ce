"""Task scores by lm-evaluation-harness on the model that `recipe eval` has loaded anyway, adapters on or off.

Without a network: `held_out` (the run's own held-out rows), `basics` (recipe/eval_tasks) and YAML files with local data.
Other names are the harness's own tasks, whose data lies on the model hub.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipe.container import require_network
from recipe.errors import UserError

BUILT_IN = Path(__file__).parent.parent / "eval_tasks"
HELD_OUT = "held_out"
MOST_CHOICES = 50  # each costs a forward pass per row
Pair = tuple[str, str]  # prompt as the model sees it, answer


@dataclass(frozen=True)
class Tasks:
    """Specifications that the harness's TaskManager can load, and that manager."""

    specifications: list[str | dict[str, Any]]
    manager: Any
    rows: int | None


def find(names: list[str], held_out: list[Pair], rows: int = 0) -> Tasks:
    """Raises UserError where a name is not known or a task's data cannot be had."""
    quiet()
    from lm_eval.tasks import TaskManager

    specifications: list[str | dict[str, Any]] = []
    elsewhere: list[str] = []
    for name in dict.fromkeys(names):
        if name == HELD_OUT:
            specifications.append(held_out_task(held_out))
        elif (BUILT_IN / f"{name}.yaml").exists():
            specifications.append(_from_file(BUILT_IN / f"{name}.yaml"))
        elif name.endswith((".yaml", ".yml")):
            specifications.append(_from_file(Path(name)))
        else:
            specifications.append(name)
            elsewhere.append(name)
    if elsewhere:
        require_network(
            f"--tasks {', '.join(elsewhere)}: lies on the model hub",
            f"use RUNTIME=host, or {', '.join(local_names())} and YAML files with local data",
        )
    manager = TaskManager(include_defaults=bool(elsewhere))  # to look through its 14,000 takes ten seconds
    for name in elsewhere:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*local_names(), *manager.all_tasks], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"--tasks {name}: no such task, expected {', '.join(local_names())}, a YAML file, or a name that "
                f"lm-evaluation-harness knows{hint}"
            )
    for specification in specifications:
        _load(manager, specification)
    return Tasks(specifications, manager, rows or None)


def local_names() -> list[str]:
    return [HELD_OUT, *sorted(path.stem for path in BUILT_IN.glob("*.yaml"))]


def scores(model: Any, tokenizer: Any, tasks: Tasks, batch_size: int) -> dict[str, dict[str, float]]:
    """By task: its metrics, and `rows`."""
    quiet()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # It sets a pad token.
    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    with no_bars():
        found = simple_evaluate(
            wrapped,
            tasks=copy.deepcopy(tasks.specifications),
            task_manager=tasks.manager,
            limit=tasks.rows,
            log_samples=False,
            bootstrap_iters=0,
        )
    assert found is not None  # it is None on other ranks than the first alone
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in metrics.items()
            if isinstance(value, (int, float))
            and "stderr" not in key
            and key not in ("sample_len", "sample_count")
        }
        | ({"rows": found["n-samples"][task]["effective"]} if task in found["n-samples"] else {})
        for task, metrics in found["results"].items()
    }


def held_out_task(pairs: list[Pair]) -> dict[str, Any]:
    """The held-out rows as a task: which of all answers that occur does the model find likeliest after each prompt?

    Raises UserError where there are none to choose between, or too many.
    """
    from datasets import Dataset

    choices = sorted({answer for _, answer in pairs})
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise UserError(
            f"--tasks {HELD_OUT}: the held-out rows have {len(choices)} different answers, expected 2 to {MOST_CHOICES} to "
            "choose between; eval.exact_match counts answers that are written out"
        )
    rows = [
        {"prompt": prompt, "choices": choices, "right": choices.index(answer)} for prompt, answer in pairs
    ]
    data = Dataset.from_list(rows)
    return {
        "task": HELD_OUT,
        "custom_dataset": lambda **_: {"test": data},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _from_file(path: Path) -> str | dict[str, Any]:
    """A task's YAML with the paths of its data made relative to its own place, as its author sees them."""
    if not path.is_file():
        raise UserError(f"--tasks {path}: no such file, expected a task's YAML of lm-evaluation-harness")
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError:
        return str(path)  # with !function or the like: the harness knows how
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--tasks {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str) or "include" in task:
        return str(path)
    options = task.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        task["dataset_kwargs"] = options | {"data_files": _beside(path, options["data_files"])}
    return task


def _beside(path: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(path, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(path, name) for name in files]
    found = path.parent / str(files)
    return str(found) if found.exists() else files


def _load(manager: Any, specification: str | dict[str, Any]) -> None:
    """Read the task and its data once, so that what is missing is told before the model answers anything."""
    name = specification if isinstance(specification, str) else specification["task"]
    try:
        with no_bars():
            manager.load([copy.deepcopy(specification)])
    except Exception as error:  # whatever a task's own code and data can raise
        said = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"--tasks {name}: cannot be loaded ({type(error).__name__}: {said}); tasks of the harness need the network "
            f"for their data, {', '.join(local_names())} and YAML files with local data need none"
        ) from None


def no_bars():
    """Where there is no terminal: TQDM_DISABLE does not reach those that the harness draws."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def quiet() -> None:
    """It says much while it works, and asks the hub for what lies here."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
