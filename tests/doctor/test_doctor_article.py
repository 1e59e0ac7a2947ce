"""README's table of the article's troubleshooting rows: each has a check, a guard and a rule, and all of them exist."""

import re

import pytest

from recipe import preflight
from recipe.doctor.rules import RULES
from tests.preflight.situation import context
from tests.train.tiny_run import ROOT

README = (ROOT / "README.md").read_text()
HEAD = "| its row | `make preflight` checks | while it trains: the plan, or the event's cause | `make doctor` names |"
# As the article's table has them.
ARTICLE = {
    "OOM before step 1",
    "model loads twice, then OOM",
    "8-bit Adam explodes",
    "machine gasping for RAM",
    "NCCL errors or hangs",
}
CELLS = [
    line.strip("| ").split(" | ") for line in README.partition(HEAD)[2].split("\n\n")[0].splitlines()[2:]
]
WRITTEN = "".join(path.read_text() for path in (ROOT / "recipe" / "train").glob("*.py"))
READ = "".join(path.read_text() for path in (ROOT / "recipe" / "doctor" / "rules").glob("*.py"))
LINK = re.compile(r"\[`(\w+)`\]\((docs/[\w.]+)#(\w+)\)")


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def checks():
    """Of a machine with GPUs, which has all of them."""
    return {check.name for check in preflight.run_checks(context())}


def test_every_row_of_the_article_is_there():
    assert {row for row, *_ in CELLS} == ARTICLE


@pytest.mark.parametrize(
    ("check", "guard", "rules"), [cells[1:] for cells in CELLS], ids=[c[0] for c in CELLS]
)
def test_its_check_its_guard_and_its_rule_exist(check, guard, rules, checks):
    assert named(check) and set(named(check)) <= checks
    causes = [name for name in named(guard) if re.fullmatch("[a-z_]+", name)]
    assert causes and all(f'"{cause}"' in WRITTEN and f'"{cause}"' in READ for cause in causes)
    links = LINK.findall(rules)
    assert links and len(links) == len(named(rules))
    for name, page, anchor in links:
        assert name == anchor and name in {rule.name for rule in RULES}
        assert (ROOT / page).read_text().count(f'<a id="{anchor}"></a>') == 1


def test_the_number_of_known_failures_is_right():
    assert f"[{len(RULES)} failures](docs/troubleshooting.md)" in README
