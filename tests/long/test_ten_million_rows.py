"""Sets larger than RAM: what a preparation of ten million rows takes, what a rank holds, how soon it is there again.

RECIPE_ROWS=1000000 for a tenth of it. Prints its numbers as JSON.
"""

import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest

from recipe.settings import from_dict
from tests.models import tiny_tokenizer

ROWS = int(os.environ.get("RECIPE_ROWS", 10_000_000))
LIMIT_GIB = 2.0
FIRST_STEP_SECONDS = 60
GIB = 2**30


def settings_of(place):
    return from_dict(
        {
            "data": {"path": str(place / "rows.jsonl"), "max_length": 1024, "eval_fraction": 0.001},
            "train": {"micro_batch_tokens": 4096},
            "paths": {"models": str(place / "models")},
        }
    )


def prepare(place, results):
    """In a process of its own, as `recipe train` is one; its children are looked at from outside."""
    from recipe.data.encode import load_tokenizer
    from recipe.data.prepare import prepared

    settings, started = settings_of(place), time.monotonic()
    with prepared(settings, load_tokenizer(place / "tokenizer", settings.data), place / "tokenizer") as data:
        data.link_into(place / "run")
        stats = data.stats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    results.put({"seconds": time.monotonic() - started, "peak_gib": peak, "stats": stats})


def read(place, results):
    """As a rank does: the worst micro-batch for the rehearsal, then a thousand steps of an epoch."""
    from recipe.data.pack import MicroBatches, PackedCollator, WholeBatches
    from recipe.train.rehearsal import worst_row

    started = time.monotonic()
    rows = MicroBatches.open(place / "run", "train")
    collate, order = PackedCollator(), iter(WholeBatches(len(rows), 16, seed=42))
    collate([rows[worst_row(rows)]])
    first = time.monotonic() - started
    for _ in range(1000):
        collate([rows[next(order)]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    results.put({"first_seconds": first, "peak_gib": peak, "micro_batches": len(rows)})


def elsewhere(function, place):
    """What a new process of `function` says, and the most that it or one of its children held."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(place, results))
    process.start()
    most, ended = [0.0], threading.Event()

    def look():
        while not ended.wait(0.5):
            largest = 0
            for member in [
                psutil.Process(process.pid),
                *psutil.Process(process.pid).children(recursive=True),
            ]:
                try:
                    largest = max(largest, member.memory_info().rss)
                except psutil.Error:
                    continue
            most[0] = max(most[0], largest / GIB)

    watch = threading.Thread(target=look)
    watch.start()
    found = results.get()
    ended.set()
    watch.join()
    process.join()
    return found | {"largest_process_gib": most[0]}


@pytest.fixture
def place(tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as file:
        for n in range(ROWS):
            file.write(f'{{"prompt": "hello {n}", "completion": "{" the answer" * (1 + n % 3)}"}}\n')
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_ten_million_rows_stream(place: Path):
    made, again = elsewhere(prepare, place), elsewhere(prepare, place)
    rank = elsewhere(read, place)
    size = sum(path.stat().st_size for path in (place / "run").iterdir()) / GIB
    print(json.dumps({"rows": ROWS, "made": made, "again": again, "rank": rank, "disk_gib": size}))
    assert made["stats"]["rows"] + made["stats"]["held_out_rows"] == ROWS
    assert made["stats"] == again["stats"]
    for found in (made, again, rank):
        assert max(found["peak_gib"], found["largest_process_gib"]) <= LIMIT_GIB
    # The rest of the way to the first step, loading the model, does not depend on the data.
    assert again["seconds"] + rank["first_seconds"] <= FIRST_STEP_SECONDS
    assert made["stats"]["fill"] >= 0.97
