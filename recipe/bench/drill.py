"""What happens when something breaks: a real run of `recipe train` on all cards, hurt twice, resumed and exported.

    python -m recipe.bench.drill FOLDER RESULT.json

One rank is killed, then one is stopped (SIGSTOP, as a debugger or a frozen container does); each time the run must end
by itself with its reason, and the same command must go on from the last checkpoint. The model is small and random: how
a fault is noticed does not depend on its size.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from recipe.files import write_json
from recipe.plan.shapes import ModelShape
from recipe.train.checkpoint import checkpoints
from recipe.train.launch import ranks_of
from recipe.train.run import Run, read_jsonl

SHAPE = ModelShape(hidden=512, intermediate=1408, layers=4, heads=8, kv_heads=4, head_dim=64, vocab=512)
STEPS, SAVE_EVERY = 60, 5
KILL_AT, STOP_AT = 12, 32
PATIENCE_SECONDS = 240.0
END = "<end>"


def main(folder: str, result: str) -> int:
    config = make_place(Path(folder))
    run = Run(Path(folder) / "runs" / "drill")
    found: dict[str, Any] = {"steps": STEPS, "shape": "4 layers of 512", "save_every": SAVE_EVERY}
    say("training, to kill a rank")
    found["killed"] = hurt(config, run, KILL_AT, signal.SIGKILL)
    say(f"noticed after {found['killed']['noticed_seconds']:.1f} s; going on, to stop a rank")
    if found["killed"]["of"] > 1:  # with nobody waiting for it, a rank may stand still
        found["stopped"] = hurt(config, run, STOP_AT, signal.SIGSTOP)
    say("going on, to the end")
    found["resumed"] = finish(config, run)
    say("export")
    found["export"] = export(run)
    write_json(Path(result), found)
    return 0


def say(text: str) -> None:
    print(f"progress: {text}", file=sys.stderr, flush=True)


def make_place(folder: Path) -> Path:
    """A config with its model, tokenizer and rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipe.engine.random import random_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(random_config(SHAPE), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"number {n}:", "completion": " the answer is yes"} for n in range(2000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"id": str(folder / "model")},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 64},
        "train": {
            "steps": STEPS,
            "global_batch_tokens": 512,
            "micro_batch_tokens": 128,
            "save_every": SAVE_EVERY,
        },
        "compute": {"offload_layers": 1},
        "paths": {"models": str(folder / "models"), "runs": str(folder / "runs")},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def byte_tokenizer():
    """Every byte is a token; knows every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def start(config: Path, run: Run) -> subprocess.Popen:
    command = ["train", "--config", str(config), "--run", run.name]
    return subprocess.Popen(
        [sys.executable, "-m", "recipe", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> str:
    """The last line that it said."""
    try:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    except BaseException:
        process.terminate()  # which ends its ranks
        raise
    return (said.strip().splitlines() or [""])[-1]


def hurt(config: Path, run: Run, step: int, number: signal.Signals) -> dict[str, Any]:
    """Send a signal to the last rank once `step` steps are done; what came of it."""
    process = start(config, run)
    limit = time.monotonic() + PATIENCE_SECONDS
    while len(read_jsonl(run.metrics)) < step:
        if process.poll() is not None or time.monotonic() > limit:
            process.terminate()
            raise RuntimeError(f"training did not get to step {step}: {ended(process)}")
        time.sleep(0.05)
    ranks = {rank: psutil.Process(pid) for pid, rank in ranks_of(process)}
    rank = max(ranks)
    ranks[rank].send_signal(number)
    began = time.monotonic()
    message = ended(process)
    seconds = time.monotonic() - began
    return {
        "rank": rank,
        "of": len(ranks),
        "noticed_seconds": seconds,
        "exit_code": process.returncode,
        "message": message,
        "steps_done": len(read_jsonl(run.metrics)),
        "last_checkpoint": checkpoints(run.folder)[-1].name,
        "ranks_left": sum(map(alive, ranks.values())),
    }


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def finish(config: Path, run: Run) -> dict[str, Any]:
    process = start(config, run)
    message = ended(process)
    steps = [line["step"] for line in read_jsonl(run.metrics)]
    losses = [line["loss"] for line in read_jsonl(run.metrics)]
    return {
        "exit_code": process.returncode,
        "message": message,
        "each_step_once": steps == list(range(1, STEPS + 1)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def export(run: Run) -> dict[str, Any]:
    """The exported adapters in plain PEFT, in a fresh process, against the trainer."""
    command = ["export", "--run", run.name, "--set", f"paths.runs={run.folder.parent}", "--json"]
    done = subprocess.run([sys.executable, "-m", "recipe", *command], capture_output=True, text=True)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    loss = json.loads(done.stdout)["held_out_loss"] if done.returncode == 0 else None
    return {"exit_code": done.returncode, "message": said, "held_out_loss": loss}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
