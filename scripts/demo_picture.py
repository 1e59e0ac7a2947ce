"""Draw docs/demo.svg from what `make demo` printed.

    make demo 2>&1 | tee demo.log
    .venv/bin/python scripts/demo_picture.py demo.log docs/demo.svg

Every line of the picture is a line of the log; where a stage prints more than a few, the middle is left out.
"""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104
TITLE = "QLoRA on two CPU processes: the code that trains 70B on two GPUs"
FIRST, LAST = 2, 4  # lines kept of a longer stage
STAGE = re.compile(r"^\[\d/\d\]")
PAID = re.compile(r"^ {6}[\d.]+ s, peak RAM")


def shortened(log: str) -> list[str]:
    """The log without the set-up and without the middle of long stages."""
    lines = [line.rstrip() for line in log.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("the whole job"))
    end = next(i for i, line in enumerate(lines) if line.startswith("talk to it"))
    kept: list[str] = ["$ make demo", lines[start]]
    stage: list[str] = []
    for line in lines[start + 1 : end + 1]:
        if STAGE.match(line):
            kept += ["", line]
        elif PAID.match(line):
            body = [text for text in stage if text.strip()]
            kept += body if len(body) <= FIRST + LAST else [*body[:FIRST], "  …", *body[-LAST:]]
            kept.append(line)
            stage = []
        else:
            stage.append(line)
    return kept + stage


def styled(line: str) -> Text:
    text = line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    if line.startswith("$") or STAGE.match(line):
        return Text(text, style="bold cyan")
    if PAID.match(line) or line == "  …":
        return Text(text, style="bright_black")
    return Text(text, style="bold green" if line.startswith(("right answers", "exact answers")) else "")


def main(log: str, picture: str) -> None:
    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    for line in shortened(Path(log).read_text(encoding="utf-8")):
        console.print(styled(line), highlight=False)
    svg = console.export_svg(title=TITLE, unique_id="demo")
    # The fonts that rich would fetch from a web site; any monospace one will do.
    Path(picture).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
