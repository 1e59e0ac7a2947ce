"""Real ranks over gloo: they add up, gather and step together; one that cannot is told, with what NCCL said in a log."""

import os
import time
from pathlib import Path

import pytest

from recipe.preflight import link, program
from tests.preflight.situation import context

pytestmark = pytest.mark.slow

# Imported by every Python that starts with this folder on PYTHONPATH: breaks one thing on one rank.
PATCH = """
import os, sys
if os.environ.get("RANK_TO_BREAK") in sys.argv[-1:]:
    import torch
    from torch import distributed
    {body}
"""
BREAKS = {
    "a sum": (
        """
    plain = distributed.all_reduce
    def wrong(values, *rest, **named):
        plain(values, *rest, **named)
        if values.numel() > 100: values[7] += 1
    distributed.all_reduce = wrong
""",
        "all_reduce",
        "rank 1, turn 0: sums: 1 of",
    ),
    "a gather": (
        """
    plain = distributed.all_gather_into_tensor
    def wrong(whole, own, *rest, **named):
        plain(whole, own, *rest, **named)
        if len(whole) > 10000: whole[:1000] = whole[1000:2000]
    distributed.all_gather_into_tensor = wrong
""",
        "all_gather",
        "rank 1, turn 0: gathered values: 1000 of",
    ),
    "a gradient": (
        """
    plain = torch.optim.SGD.step
    def wrong(self, *rest):
        for group in self.param_groups:
            for parameter in group["params"]:
                if type(parameter).__name__ == "DTensor" or hasattr(parameter, "to_local"): parameter.grad.mul_(2)
        return plain(self, *rest)
    torch.optim.SGD.step = wrong
""",
        "shard_step",
        "loss after the sharded step",
    ),
}


def run(seconds: float = 90, **environment: str) -> dict:
    return program.run("ranks", "2", "--cpu", seconds=seconds, environment=environment)


def test_two_ranks_work_together():
    found = run()
    assert "error" not in found, found
    assert found["all_reduce"]["gib_per_second"] > 0 and found["all_gather"]["gib_per_second"] > 0
    step = found["shard_step"]
    assert step["loss_after"] < step["loss"] and step["difference"] < 1e-5


@pytest.mark.parametrize("name", BREAKS)
def test_what_one_rank_does_wrong_is_found(tmp_path, monkeypatch, name):
    body, stage, part = BREAKS[name]
    (tmp_path / "sitecustomize.py").write_text(PATCH.format(body=body.strip()))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = run(RANK_TO_BREAK="1")
    assert found["stage"] == stage and stage not in found, found
    assert "error" in found and part in found["log"]
    check = {"all_reduce": link.all_reduce, "all_gather": link.all_gather, "shard_step": link.shard_step}[
        stage
    ]
    result = check(context(ranks=found | {"settings": {}}))
    assert result.status == "fail" and result.remedy


def test_a_rank_that_hangs_is_given_up_and_none_stays(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\nif sys.argv[-2:] == ['--rank', '1'] or sys.orig_argv[-2:] == ['--rank', '1']:\n"
        "    open(os.environ['MARK'], 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    mark = tmp_path / "pid"
    started = time.monotonic()
    found = run(20, MARK=str(mark))
    assert found["error"].startswith("no answer within 20 s") and time.monotonic() - started < 40
    for _ in range(50):
        if not Path(f"/proc/{mark.read_text()}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_rank_that_does_not_start_is_the_answer():
    found = run(PYTHONHOME="/nowhere")
    assert "error" in found and found["log"]


def test_where_nccl_fails_the_line_names_a_log(tmp_path, monkeypatch):
    """No GPU can be seen, so NCCL's ranks fail for real; the second time with NCCL_DEBUG=INFO."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = context(paths={"runs": str(tmp_path / "runs")})
    del made.__dict__["ranks"]
    lines: list[str] = []
    object.__setattr__(made, "say", lines.append)
    check = link.all_reduce(made)
    assert check.status == "fail" and "ranks ended with" in check.found
    log = tmp_path / "runs" / "nccl-all-reduce.log"
    assert str(log) in check.remedy and log.stat().st_size
    assert lines[-1] == "preflight: that failed; again with NCCL_DEBUG=INFO"
    assert link.all_gather(made).status == link.shard_step(made).status == "skip"
