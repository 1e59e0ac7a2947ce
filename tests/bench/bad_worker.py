"""A worker that comes to a bad end; which one, the length tells. Takes the place of recipe.bench.worker in tests."""

import json
import os
import signal
import sys
import time
from pathlib import Path

CRASHES, RUNS_OUT, IS_KILLED = 11, 12, 13


def main(spec_file: str, result_file: str) -> int:
    tokens, rank = json.loads(Path(spec_file).read_text())["tokens"], int(os.environ["RANK"])
    path = Path(result_file)
    if tokens == CRASHES:
        path.write_text(json.dumps({"status": "failed", "note": "ValueError: so it is", "time": 1.0}))
        print("Traceback (most recent call last):\nValueError: so it is", file=sys.stderr, flush=True)
        return 1
    if tokens == RUNS_OUT:  # rank 1 does; rank 0 complains first, that it has lost its peer
        said = [
            {"status": "failed", "note": "RuntimeError: connection closed by peer", "time": 1.0},
            {"status": "out_of_memory", "note": "asked for 1.96 GiB", "time": 2.0},
        ]
        mine = path if rank == 0 else path.with_suffix(f".{rank}{path.suffix}")
        mine.write_text(json.dumps(said[rank]))
        time.sleep(0.5)  # the launcher ends the others when one is gone
        return 1
    assert tokens == IS_KILLED
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
