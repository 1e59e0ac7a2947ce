"""Every failure here has just happened, in a real program; the doctor must name its cause first."""

import pytest

from tests.doctor.provoked import EXPECTED, SHARE, first_rule, verdict

pytestmark = pytest.mark.slow
LEAST = 25


@pytest.mark.parametrize("name", EXPECTED)
def test_the_cause_is_named_first(name):
    answer = verdict(name)
    assert first_rule(answer) == EXPECTED[name], answer["diagnoses"]
    assert answer["state"] in ("failed", "finished")
    first = answer["diagnoses"][0]
    assert 1 <= len(first["evidence"]) <= 5 and all(line["text"] for line in first["evidence"])
    assert first["remedy"] and first["certainty"] in ("certain", "likely", "possible")


def test_the_share_of_causes_named_first():
    right = sum(first_rule(verdict(name)) == rule for name, rule in EXPECTED.items())
    assert len(EXPECTED) >= LEAST
    assert len(set(EXPECTED.values())) >= LEAST
    assert right / len(EXPECTED) >= SHARE, f"{right} of {len(EXPECTED)}"
