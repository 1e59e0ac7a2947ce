"""Each check is seen to fail: none without a situation that breaks its subject, and docs/preflight.md lists all of them."""

from recipe import preflight
from tests.preflight import page


def test_every_check_has_a_situation_that_breaks_its_subject():
    """The tables' own tests see each situation fail or warn; here none may be left out, and none be of another thing."""
    checks = [check for group in preflight.CHECKS.values() for check in group]
    names = [name for table in page.TABLES for name in table]
    cases = [case for table in page.TABLES for case in table.values()]
    assert {check.__name__ for check in checks if not page.situations_of(check)} == set()
    assert {check for check, *_ in cases} == set(checks)
    assert {status for _, _, status, *_ in cases} == {"warn", "fail"}
    assert len(names) == len(set(names)) and len(checks) == len(set(checks)) >= 55


def test_the_page_in_docs_says_what_the_checks_do(tmp_path, monkeypatch):
    """Its rows are made of the checks' own answers: the first situation of each is tried once more on the way."""
    found = page.PAGE.read_text()
    assert found == page.renewed(found, page.table(tmp_path, monkeypatch)), (
        "make it anew: .venv/bin/python -m tests.preflight.page"
    )
