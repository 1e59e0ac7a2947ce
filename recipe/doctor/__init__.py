"""`recipe doctor`: what went wrong in a run or a log, how sure that is, and what to do. Nothing leaves the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recipe.doctor import bundle, show
from recipe.doctor.diagnose import all_marks, diagnose
from recipe.doctor.read import read_log, read_run
from recipe.train.run import Run


def doctor(run: Run | None, log: Path | None, as_json: bool, bundle_path: Path | None) -> int:
    """Diagnose a run or a log and print the answer. Raises UserError for a wrong request."""
    if run:
        case = read_run(run, all_marks())
        files = {path.name: path for path in (run.log, run.events, run.metrics)}
    else:
        assert log is not None
        case, files = read_log(log, all_marks()), {"log.txt": log}
    diagnoses = diagnose(case)
    answer = show.to_dict(case, diagnoses)
    if bundle_path:
        held = bundle.write(bundle_path, case, answer, files)
        print(
            "\n".join([f"{bundle_path} holds (look before you send it):", *(f"  {line}" for line in held)]),
            file=sys.stderr,
        )
    print(json.dumps(answer, indent=2, ensure_ascii=False) if as_json else show.render(case, diagnoses))
    return 0


def list_rules(as_json: bool, as_markdown: bool) -> int:
    """Print all failures that are known."""
    if as_json:
        print(json.dumps(show.list_rules(), indent=2, ensure_ascii=False))
    else:
        print(show.markdown() if as_markdown else show.render_list())
    return 0
