"""How each failure is provoked afresh, and the rule that must be the doctor's first diagnosis of it.

STOCK: programs of stock libraries (failing.py), alone or as two ranks under torchrun; their output is the log.
OURS: real `recipe train`, whose folder or output is what the doctor reads.

    python -m tests.doctor.provoked      provokes all, and prints for each what the doctor said, and the figure
"""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file, save_file

from recipe.cli import main
from tests.models import tiny_checkpoint
from tests.train.faults import put_fault
from tests.train.tiny_run import ROOT, end, make_place, ranks, start_training, train, wait_for_step

FAILING = Path(__file__).parent / "failing.py"
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "localhost",
    "--nproc_per_node",
    "2",
)
SHARE = 0.95  # of the failures, whose cause must be named first
PATIENCE_SECONDS = 120
STEPS = 20
STOPPED_SECONDS = 3  # in place of 20, which nothing would be learned from
ONE_RANK = ("--set", "compute.processes=1", "--set", "train.rehearsal=false")
UNDISTURBED = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Stock:
    """A program of failing.py. `argument`: the name of a function below that makes it; `environment` likewise."""

    rule: str
    program: str
    world: int = 1
    argument: str = ""
    environment: str = ""


STOCK = {
    "FSDP1, LoRA in fp32 beside bf16": Stock("mixed_dtypes", "mixed_dtypes", world=2),
    "FSDP, 4-bit weights as uint8": Stock("uint8_storage", "uint8_storage", world=2),
    "8-bit AdamW on DTensors": Stock("optimizer_8bit", "optimizer_8bit", world=2),
    "a rank that has fewer batches": Stock("rank_left_early", "rank_leaves", world=2),
    "a rank with a segmentation fault": Stock("rank_crashed", "rank_crashes", world=2),
    "an endpoint where nobody listens": Stock("hub_unreachable", "hub", environment="nobody"),
    "a hub that answers 403": Stock("gated_model", "hub", environment="gated"),
    "a hub that answers 401": Stock("no_token", "hub", environment="unauthorised"),
    "a peer that never comes": Stock("never_met", "rendezvous", environment="alone"),
    "a name that does not resolve": Stock("host_not_resolved", "rendezvous", environment="unknown_host"),
    "a port that is taken": Stock("port_in_use", "rendezvous", environment="taken_port"),
    "reentrant checkpointing": Stock("no_input_gradients", "no_input_gradients"),
    "another layer the second time": Stock("recomputed_otherwise", "recomputed_otherwise"),
    "a token beyond the embedding": Stock("token_out_of_range", "token_out_of_range"),
    "a label beyond the head": Stock("label_out_of_range", "label_out_of_range"),
    "CUDA of a CPU build": Stock("cpu_build_of_torch", "asks_for_cuda"),
    "RLIMIT_AS": Stock("host_memory", "host_memory"),
    "RLIMIT_NOFILE": Stock("too_many_open_files", "too_many_files"),
    "RLIMIT_FSIZE": Stock("disk_full", "file_limit", argument="folder"),
    "/dev/full": Stock("disk_full", "disk_full"),
    "a package that is not there": Stock("missing_package", "missing_package"),
    "a name of another version": Stock("version_mismatch", "old_package"),
    "fp16 weights with a scaler": Stock("fp16_masters", "fp16_gradients"),
    "weights on the meta device": Stock("meta_weights", "meta_weights"),
    "a layer class of another family": Stock("unknown_layer_class", "missing_layer_class"),
    "a tokenizer without padding": Stock("no_pad_token", "pad", argument="model"),
    "a tokenizer without template": Stock("no_chat_template", "template", argument="model"),
    "a file of weights cut short": Stock("checkpoint_damaged", "damaged_checkpoint", argument="cut_model"),
    "a row that is no JSON": Stock("malformed_row", "json_rows", argument="broken_rows"),
    "a token, under a progress bar": Stock("token_out_of_range", "under_a_bar"),
    "a package, after other troubles": Stock("missing_package", "wrong_module"),
}


@functools.cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="doctor-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _started() -> dict[str, Future]:
    """All stock programs, some at a time.

    Those that need nothing of their own are forks of one process.
    """
    made = {name: (stock, *_prepared(stock)) for name, stock in STOCK.items()}
    alone = [name for name, (stock, _, environment) in made.items() if stock.world == 1 and not environment]
    pool = ThreadPoolExecutor(3)  # one of them only waits, for a hub that does not answer
    words = ["=".join([STOCK[name].program, *made[name][1]]) for name in alone]
    forks = pool.submit(run_forks, FAILING, words)
    others = {name: pool.submit(_run, name, *made[name]) for name in made if name not in alone}
    return {name: forks for name in alone} | others


def stock_log(name: str) -> Path:
    """The log of a stock program, which has failed."""
    done = _started()[name].result(timeout=600)
    if isinstance(done, Path):
        return done
    program = STOCK[name].program
    assert done[program] != 0, f"{name} did not fail"
    return scratch() / f"{program}.log"


def run_forks(programs: Path, words: list[str]) -> dict[str, int]:
    """Exit codes of programs that run as forks of one process (forked.py); their logs are in `scratch`."""
    done = subprocess.run(
        [sys.executable, str(programs), "--each", str(scratch()), *words],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _prepared(stock: Stock) -> tuple[list[str], dict[str, str]]:
    argument = [str(globals()[f"_{stock.argument}"]())] if stock.argument else []
    return argument, globals()[f"_{stock.environment}"]() if stock.environment else {}


def _run(name: str, stock: Stock, argument: list[str], environment: dict[str, str]) -> Path:
    launcher = TORCHRUN if stock.world > 1 else ()
    log_name = f"{stock.program}-{list(STOCK).index(name)}"
    code, log = run_program([*launcher, str(FAILING), stock.program, *argument], log_name, environment)
    assert code != 0, f"{name} did not fail"
    return log


def run_program(
    words: list[str], log_name: str, environment: dict[str, str] | None = None
) -> tuple[int, Path]:
    """Exit code and log of what Python is started with."""
    log = scratch() / f"{log_name}.log"
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, *words],
            stdout=file,
            stderr=file,
            env=_environment() | (environment or {}),
            timeout=PATIENCE_SECONDS,
        )
    return done.returncode, log


def _environment() -> dict[str, str]:
    return os.environ | UNDISTURBED | {"HF_HOME": str(scratch() / "hub")}


# --- what stock programs are given --------------------------------------------------------------------------


@functools.cache
def _model() -> Path:
    return tiny_checkpoint(scratch() / "model")


def _cut_model() -> Path:
    folder = Path(shutil.copytree(_model(), scratch() / "cut"))
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


def _broken_rows() -> Path:
    path = scratch() / "broken.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two\n{"text": "three"}\n')
    return path


def _folder() -> Path:
    return scratch()


def _nobody() -> dict[str, str]:
    return {"HF_ENDPOINT": f"http://127.0.0.1:{_free_port()}"}


def _gated() -> dict[str, str]:
    message = "Access to model meta-llama/Llama-3.1-70B is restricted and you are not in the authorized list."
    return {"HF_ENDPOINT": _refusing(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})}


def _unauthorised() -> dict[str, str]:
    return {"HF_ENDPOINT": _refusing(401, {"X-Error-Message": "Invalid username or password."})}


def _refusing(status: int, headers: dict[str, str]) -> str:
    """The address of a hub that refuses everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def _alone() -> dict[str, str]:
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}


def _unknown_host() -> dict[str, str]:
    return {"MASTER_ADDR": "node-two.invalid", "MASTER_PORT": str(_free_port()), "AS_RANK": "1"}


def _taken_port() -> dict[str, str]:
    listening = socket.create_server(("0.0.0.0", 0))
    atexit.register(listening.close)
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(listening.getsockname()[1])}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# --- real `recipe train` ------------------------------------------------------------------------------------


@functools.cache
def place() -> Path:
    """The config of the tiny model, with steps enough to be disturbed in."""
    return make_place(scratch() / "place", STEPS)


def runs() -> Path:
    return place().parent / "runs"


def killed_rank() -> list[str]:
    process = start_training(place(), "killed")
    wait_for_step(runs() / "killed", 2, process)
    ranks(process)[1].kill()
    assert end(process)[0] == 1
    return ["--run", "killed"]


def killed_rank_by_its_log() -> list[str]:
    """The same from the launcher's log alone, as of somebody else's program."""
    _answer("a rank that is killed")
    return ["--log", str(runs() / "killed" / "train.log")]


def stopped_rank() -> list[str]:
    code = (
        f"from recipe.train import guard; guard.STOPPED_SECONDS = {STOPPED_SECONDS}\n"
        "import sys; from recipe.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--config", str(place()), "--run", "stopped"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(runs() / "stopped", 2, process)
    ranks(process)[1].suspend()
    assert end(process)[0] == 1
    return ["--run", "stopped"]


def weight_of_nan() -> list[str]:
    """One weight of the base model is NaN, which `prepare` sees."""
    return _with_norm("nan", float("nan"))


def weights_too_large() -> list[str]:
    """Weights that are numbers, and whose products are none: the loss is NaN from the first step on."""
    _with_norm("overflow", 3e38)
    return ["--run", "overflow"]


def _with_norm(name: str, value: float) -> list[str]:
    """A run of one rank on the tiny model with that value for every weight of its last norm."""
    model = Path(shutil.copytree(place().parent / "tiny", scratch() / name))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return _refused(name, name, *ONE_RANK, "--set", f"model.id={model}")


def file_limit() -> list[str]:
    """No file may grow over 16 KiB (bash counts in KiB): a checkpoint's must."""
    return _console("no_room", *ONE_RANK, shell="ulimit -f 16; exec ")


# A disk that is dying, as its file system tells the program.
IO_ERROR = """
import errno
def written_aside(folder):
    raise OSError(errno.EIO, "Input/output error", str(folder))
"""


def dying_disk() -> list[str]:
    """No checkpoint can be written, and the training is told to end then."""
    fault = put_fault(scratch() / "fault", "recipe.train.saver", IO_ERROR)["PYTHONPATH"]
    more = ("--set", "train.on_save_error=stop")
    _console("dying_disk", *ONE_RANK, *more, shell=f"PYTHONPATH={fault} exec ")
    return ["--run", "dying_disk"]


def other_settings() -> list[str]:
    _answer("a rank that is killed")
    return _refused("other", "killed", "--set", "train.learning_rate=1e-3")


def broken_row() -> list[str]:
    return _with_rows("broken_row", '{"messages": [{"role": "user", "content": "hello"}]}\n')


def long_row() -> list[str]:
    row = {"prompt": "hello", "completion": "yes " * 200}
    return _with_rows("long_row", (json.dumps(row) + "\n") * 9)


def masked_rows() -> list[str]:
    row = {"prompt": "hello " * 100, "completion": "yes"}
    return _with_rows("masked", (json.dumps(row) + "\n") * 9, "--set", "data.overlong=truncate")


def folder_of_another() -> list[str]:
    """A runs folder that may not be written; root may write everywhere, so it gives up that right first."""
    folder = scratch() / "closed"
    folder.mkdir(mode=0o555)
    without = "setpriv --bounding-set=-dac_override --inh-caps=-dac_override " if os.geteuid() == 0 else ""
    return _console("closed", "--set", f"paths.runs={folder}", shell=f"exec {without}")


OURS = {
    "a rank that is killed": ("rank_killed", killed_rank),
    "a killed rank, by its log": ("rank_killed", killed_rank_by_its_log),
    "a rank that is stopped": ("rank_stopped", stopped_rank),
    "a weight that is NaN": ("checkpoint_damaged", weight_of_nan),
    "weights that overflow": ("nan_loss", weights_too_large),
    "no file over 16 KiB": ("disk_full", file_limit),
    "a disk that does not write": ("save_failed", dying_disk),
    "other settings on resume": ("settings_differ", other_settings),
    "a row without an answer": ("malformed_row", broken_row),
    "a row that is too long": ("rows_too_long", long_row),
    "rows whose answers are cut off": ("all_labels_masked", masked_rows),
    "a folder of another user": ("permission_denied", folder_of_another),
}


def _with_rows(name: str, rows: str, *more: str) -> list[str]:
    path = scratch() / f"{name}.jsonl"
    path.write_text(rows)
    return _refused(name, name, "--data", str(path), *more)


def _refused(name: str, run: str, *more: str) -> list[str]:
    """What `recipe train` says on the terminal where it fails; the doctor's arguments for it."""
    code, out, err = train(place(), run, *more)
    assert code in (1, 2), f"{name}: {code}, {err}"
    log = scratch() / f"console-{name}.log"
    log.write_text(err + out)
    return ["--log", str(log)]


def _console(name: str, *more: str, shell: str) -> list[str]:
    """The same in a process of its own, whose rights a shell takes away before."""
    log = scratch() / f"console-{name}.log"
    words = [sys.executable, "-m", "recipe", "train", "--config", str(place()), "--run", name, *more]
    with open(log, "w") as file:
        code = subprocess.run(
            ["bash", "-c", f'{shell}"$@"', "bash", *words],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            timeout=PATIENCE_SECONDS,
        ).returncode
    assert code in (1, 2), f"{name}: {code}, {log.read_text()}"
    return ["--log", str(log)]


# --- the doctor ---------------------------------------------------------------------------------------------

UNANSWERED = "an endpoint where nobody listens"  # comes last, since its program tries again for half a minute
EXPECTED = {name: stock.rule for name, stock in STOCK.items() if name != UNANSWERED}
EXPECTED |= {name: rule for name, (rule, _) in OURS.items()} | {UNANSWERED: STOCK[UNANSWERED].rule}


@functools.cache
def _answer(name: str) -> tuple[str, ...]:
    """The doctor's arguments for a failure, which is provoked once."""
    return ("--log", str(stock_log(name))) if name in STOCK else tuple(OURS[name][1]())


@functools.cache
def verdict(name: str) -> dict:
    """What `recipe doctor --json` says of a failure that was provoked."""
    return ask(*_answer(name))


def ask(*arguments: str) -> dict:
    where = ["--set", f"paths.runs={runs()}"] if "--run" in arguments else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["doctor", *arguments, *where, "--json"])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue())


def first_rule(answer: dict) -> str | None:
    with contextlib.suppress(IndexError):
        return answer["diagnoses"][0]["rule"]
    return None


def print_table() -> int:
    """A line for each failure, and the share whose cause was named first."""
    right = 0
    for name, rule in EXPECTED.items():
        first = first_rule(verdict(name))
        right += first == rule
        print(f"{'right' if first == rule else 'WRONG':5}  {name:36} {first}", flush=True)
    print(f"{right} of {len(EXPECTED)} causes named first: {right / len(EXPECTED):.0%}")
    return 0 if right / len(EXPECTED) >= SHARE else 1


if __name__ == "__main__":
    sys.exit(print_table())
