"""Makes the table of docs/preflight.md out of the tests that break things, so that it says what the checks do.

    python -m tests.preflight.page        # writes it anew

Each row is one check: its docstring's first line, what it expects on the good machine of tests/preflight/situation.py, what it
says to do in the first situation that breaks its subject, and the names of all of these situations.
"""

import re
import tempfile
from pathlib import Path

from recipe import preflight
from tests.preflight import (
    test_checks_data,
    test_checks_gpu,
    test_checks_host,
    test_checks_link,
    test_checks_software,
)
from tests.preflight.situation import found_broken

PAGE = Path(__file__).parents[2] / "docs/preflight.md"
BEGIN, END = "<!-- made by `python -m tests.preflight.page` -->\n", "<!-- end -->\n"
TABLES = [
    module.BROKEN
    for module in (
        test_checks_host,
        test_checks_gpu,
        test_checks_link,
        test_checks_software,
        test_checks_data,
    )
]


def situations_of(check) -> dict[str, tuple]:
    """The situations that break a check's subject, by name."""
    return {name: case for table in TABLES for name, case in table.items() if case[0] is check}


def table(folder: Path, monkeypatch) -> str:
    lines = [BEGIN.rstrip()]
    for group, checks in preflight.CHECKS.items():
        lines += ["", f"### {group}", "", "| check | what it looks at | expected | if not, for one | broken by the tests |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [
            _row(check, folder / f"{group}-{number}", monkeypatch) for number, check in enumerate(checks)
        ]
    return "\n".join([*lines, "", END])


def _row(check, folder: Path, monkeypatch) -> str:
    folder.mkdir()
    broken = situations_of(check)
    _, *first = next(iter(broken.values()))
    with monkeypatch.context() as apart:
        fine, result = found_broken(check, *first, folder, apart)
    statuses = " or ".join(sorted({case[2] for case in broken.values()}))
    remedy = f"{statuses}: {_general(result.remedy, folder)}"
    cells = (
        f"**{fine.name}**",
        check.__doc__.splitlines()[0],
        _general(fine.expected, folder),
        remedy,
        ", ".join(broken),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _general(text: str, folder: Path) -> str:
    """What is of one plan or one place is of no interest to others."""
    text = re.sub(r"biggest: .*", "biggest: …", text.replace(str(folder), "FOLDER"))
    return re.sub(r"\d+\.\d+( GiB| there)", r"N\1", text)


def renewed(text: str, table: str) -> str:
    """The page with this table in it."""
    before, rest = text.split(BEGIN)
    return before + table + rest.split(END)[1]


def main() -> None:
    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        PAGE.write_text(renewed(PAGE.read_text(), table(Path(folder), monkeypatch)))


if __name__ == "__main__":
    main()
