"""Twenty runs and logs that are in order, warnings, stops and overcome failures included: no diagnosis of any."""

import functools
import shutil
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from recipe.train import checkpoint
from tests.doctor import healthy
from tests.doctor.provoked import (
    ONE_RANK,
    PATIENCE_SECONDS,
    TORCHRUN,
    ask,
    place,
    run_forks,
    run_program,
    runs,
    scratch,
    verdict,
)
from tests.train.tiny_run import (
    end,
    flip_a_byte,
    jsonl,
    start_training,
    train,
    wait_for,
    wait_for_step,
    words_below,
)

pytestmark = pytest.mark.slow
HEALTHY = Path(healthy.__file__)
SHORT = ("--set", "train.steps=3", "--set", "train.save_every=3")
ALONE = (
    "caught",
    "warnings_of_libraries",
    "overflow_once",
    "data_with_such_words",
    "noisy_loss",
    "failed_before",
    "eight_bit_overflow_once",
    "begun_again",
)
OPTIONS = {
    "plain kernels": ("--set", "compute.kernels=plain"),
    "layers elsewhere": ("--set", "compute.offload_layers=2", "--set", "compute.keep_layers=0"),
    "evaluated on the way": ("--set", "train.eval_every=1", "--set", "train.scheduler=constant"),
    "rows left out": ("--set", "data.overlong=drop", "--set", "data.train_on=all", "--set", "lora.dropout=0"),
}


@functools.cache
def begun() -> dict[str, Future]:
    """What can run beside the other cases: the forks, and short runs of one rank with each of these options."""
    pool, config = ThreadPoolExecutor(2), place()

    def run(option: str) -> str:
        name = option.replace(" ", "_")
        code, err = end(start_training(config, name, *SHORT, *ONE_RANK, *OPTIONS[option]))
        assert code == 0, err
        return name

    forks = {"forks": pool.submit(run_forks, HEALTHY, [*ALONE])}
    return forks | {option: pool.submit(run, option) for option in OPTIONS}


def run_with(option: str) -> list[str]:
    return ["--run", begun()[option].result(timeout=4 * PATIENCE_SECONDS)]


def log_with(option: str) -> list[str]:
    """train.log alone, without the events that would say that all is well."""
    return ["--log", str(runs() / run_with(option)[1] / "train.log")]


@functools.cache
def two_ranks() -> list[str]:
    """A short run to its end, with a rehearsal; its output is kept for the doctor too."""
    code, out, err = train(place(), "two", *SHORT)
    assert code == 0, err
    (scratch() / "two.txt").write_text(err + out)
    return ["--run", "two"]


@functools.cache
def goes_on_and_is_stopped() -> dict:
    """The doctor's answer while the run goes on; then Ctrl-C ends it."""
    process = start_training(place(), "ctrl_c", "--set", "train.steps=200", "--set", "train.rehearsal=false")
    wait_for_step(runs() / "ctrl_c", 2, process)
    answer = ask("--run", "ctrl_c")
    process.send_signal(signal.SIGINT)
    code, err = end(process)
    assert code == 130, err
    (scratch() / "ctrl_c.txt").write_text(err)
    return answer


def stopped(*arguments: str) -> list[str]:
    goes_on_and_is_stopped()
    return [*arguments]


def early_stop() -> list[str]:
    process = start_training(place(), "early")
    wait_for(lambda: "torch.distributed.run" in words_below(process), process)
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    assert [event["kind"] for event in jsonl(runs() / "early" / "events.jsonl")] == ["stopped"]
    return ["--run", "early"]


@functools.cache
def overcome() -> list[str]:
    """A rank was killed, the newest checkpoint damaged; the same command went on to the end."""
    assert verdict("a rank that is killed")["diagnoses"], "before it went on, there was something to say"
    shutil.copytree(runs() / "killed", runs() / "overcome")
    newest = checkpoint.checkpoints(runs() / "overcome")[-1]
    flip_a_byte(newest / "optimizer.safetensors")
    code, out, err = train(place(), "overcome")
    assert code == 0 and "is damaged; the checkpoint before it is used" in err
    (scratch() / "overcome.txt").write_text(err + out)
    return ["--run", "overcome"]


def alone(program: str) -> list[str]:
    assert begun()["forks"].result(timeout=4 * PATIENCE_SECONDS)[program] == 0
    return ["--log", str(scratch() / f"{program}.log")]


def stock_ranks() -> list[str]:
    code, log = run_program([*TORCHRUN, str(HEALTHY), "two_ranks"], "two_ranks")
    assert code == 0, log.read_text()
    return ["--log", str(log)]


CASES = {
    **{f"stock, {program}": functools.partial(alone, program) for program in ALONE},
    "stock, two ranks": stock_ranks,
    "two ranks": two_ranks,
    "two ranks, its terminal": lambda: two_ranks() and ["--log", str(scratch() / "two.txt")],
    "two ranks, its train.log": lambda: two_ranks() and ["--log", str(runs() / "two" / "train.log")],
    "stopped by Ctrl-C": lambda: stopped("--run", "ctrl_c"),
    "stopped by Ctrl-C, its terminal": lambda: stopped("--log", str(scratch() / "ctrl_c.txt")),
    "stopped before it was loaded": early_stop,
    "killed, damaged, and went on": overcome,
    "killed, damaged, its terminal": lambda: overcome() and ["--log", str(scratch() / "overcome.txt")],
    **{option: functools.partial(run_with, option) for option in OPTIONS},
    "one rank, its train.log": lambda: log_with("evaluated on the way"),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_found_wrong(name):
    answer = ask(*CASES[name]())
    assert answer["diagnoses"] == []
    assert answer["state"] in ("finished", "stopped", "open")
    assert answer["looked_at"]


def test_there_are_twenty():
    assert len(CASES) >= 20


def test_a_run_that_goes_on_is_said_to():
    answer = goes_on_and_is_stopped()
    assert (answer["state"], answer["diagnoses"]) == ("running", [])
