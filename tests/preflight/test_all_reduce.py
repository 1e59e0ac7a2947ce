"""The all-reduce of preflight: two real ranks add up; one that cannot is told, with what NCCL said in a log."""

import pytest

from recipe.plan import make_plan
from recipe.preflight import link, run_checks
from tests.preflight.test_preflight_checks import GOOD, context


def test_two_ranks_add_up():
    found = link.run(2, {}, cpu=True)
    assert "error" not in found, found
    assert found["seconds"] > 0 and found["gib_per_second"] > 0


def test_a_rank_that_fails_is_the_answer():
    found = link.run(2, {"PYTHONHOME": "/nowhere"}, cpu=True)
    assert "error" in found and found["log"]


def test_where_nccl_fails_the_line_names_a_log(tmp_path, monkeypatch):
    """No GPU can be seen, so NCCL's ranks fail for real; the second time with NCCL_DEBUG=INFO."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = link.all_reduce(context(paths={"runs": str(tmp_path / "runs")}))
    assert check.status == "fail"
    assert "ranks ended with" in check.found
    assert str(tmp_path / "runs" / link.LOG) in check.remedy
    assert (
        "rank" in (tmp_path / "runs" / link.LOG).read_text().lower()
        or (tmp_path / "runs" / link.LOG).stat().st_size
    )


@pytest.mark.parametrize("gpus, asked", [(2, True), (1, False)])
def test_it_is_asked_for_where_nccl_is_used(monkeypatch, gpus, asked):
    """One GPU has nobody to add up with."""
    called = []
    monkeypatch.setattr(link, "WITH_NCCL", [lambda context: called.append(context.plan.world_size)])
    monkeypatch.setattr("recipe.preflight.failed", lambda checks: False)
    made = context({"gpus": GOOD.gpus[:gpus]})
    run_checks(made.settings, made.machine, make_plan(made.settings, made.machine))
    assert called == ([2] if asked else [])
