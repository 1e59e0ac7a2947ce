"""The measuring programs in their own processes: load, disk, reading. On real cards: test_preflight_gpu.py."""

import json
import shutil
import sys

import pytest

from recipe.preflight import health, inputs, program
from recipe.preflight.reading import hashes, main
from recipe.prepare import RECORD
from recipe.settings import from_dict
from tests.models import tiny_tokenizer
from tests.preflight.situation import context


def test_a_program_that_dies_keeps_what_it_had_said(tmp_path, monkeypatch):
    """Also where it hangs, or writes what is no JSON."""
    monkeypatch.setattr(program, "REPOSITORY", tmp_path)
    folder = tmp_path / "recipe/preflight"
    folder.mkdir(parents=True)
    body = "import sys, os, time, json\nprint(json.dumps({'first': 1}), flush=True)\nprint('no json', flush=True)\n"
    (folder / "dies.py").write_text(body + "sys.stderr.write('Segmentation\\n'); os.abort()")
    (folder / "hangs.py").write_text(body + "time.sleep(60)")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    died = program.run("dies", seconds=30)
    assert died["first"] == 1 and died["error"] == "the test process ended with -6: Segmentation"
    hung = program.run("hangs", seconds=2)
    assert hung["first"] == 1 and hung["error"] == "no answer within 2 s"


def test_two_devices_are_loaded_in_step():
    found = program.run("load", "cpu,cpu", "1", seconds=60)
    assert found["bursts"] >= 1 and found["tflops_together"] > 0
    assert found["damaged"] == [0, 0] and found["unlike"] == []
    assert [card["name"] for card in found["cards"]] == ["cpu", "cpu"]


def test_a_device_that_computes_differently_is_found(tmp_path, monkeypatch):
    """Every third product on the way is wrong in one place: what an undervolted card does."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[1:2] == ['cpu,cpu'] or '-m' in sys.orig_argv and 'recipe.preflight.load' in sys.orig_argv:\n"
        "    import torch\n    plain, turns = torch.matmul, [0]\n"
        "    def wrong(a, b, out=None):\n        plain(a, b, out=out); turns[0] += 1\n        out[3, 3] += turns[0]\n"
        "    torch.matmul = wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = program.run("load", "cpu,cpu", "1", seconds=60)
    assert sum(found["damaged"]) > 0
    result = health.loaded(context(load=found | {"log": ""}))
    assert result.status == "fail" and "computed wrongly" in result.found


def test_the_disk_is_measured_and_left_as_it_was(tmp_path):
    found = program.run("disk_speed", str(tmp_path / "not" / "yet"), "16", seconds=60)
    assert found["read_gib_per_second"] > 0 and found["write_gib_per_second"] > 0, found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_and_leaves_nothing(tmp_path):
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); sys.argv = ['x', {str(tmp_path)!r}, '16']; runpy.run_module('recipe.preflight.disk_speed', run_name='__main__')"
    import subprocess

    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + limited
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=program.REPOSITORY, capture_output=True, text=True
    )
    assert "error" in json.loads(done.stdout.splitlines()[-1]), done.stderr
    assert list(tmp_path.iterdir()) == []


# --- reading ----------------------------------------------------------------------------------------------


def read(prepared=None, **data) -> dict:
    settings = from_dict({"model": "demo", "data": data})
    request = {
        "settings": settings.to_dict(),
        "prepared": str(prepared) if prepared else None,
        "hash_seconds": 20,
    }
    return program.run("reading", seconds=120, given=json.dumps(request))


def rows(path, count, text="hello world"):
    conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}
    path.write_text((json.dumps(conversation) + "\n") * count)
    return str(path)


def test_rows_are_read_to_the_end_and_their_lengths_estimated(tmp_path):
    path = rows(tmp_path / "rows.jsonl", 300)
    found = read(path=path)
    assert found["rows"] == {"count": 300, "held_out": 0} and "tokenizer" not in found
    assert found["lengths"]["by"] == "characters / 4" and found["lengths"]["over"] == 0
    with open(path, "a") as file:
        file.write("{broken\n")
    assert f"{path}:301: not valid JSON" in read(path=path)["rows"]["problem"]
    long = read(path=rows(tmp_path / "long.jsonl", 10, "word " * 2000))
    assert long["lengths"]["over"] == long["lengths"]["sample"] == 10


@pytest.mark.slow
def test_a_prepared_model_is_read_with_its_own_tokenizer(tmp_path, nf4_model):
    """Then its bytes are damaged where sizes and headers say nothing, and then its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(nf4_model(), folder)
    path = rows(tmp_path / "rows.jsonl", 20)
    found = read(folder, path=path)
    assert found["tokenizer"]["template"] and found["lengths"]["by"] == "the tokenizer"
    assert found["hashes"]["wrong"] == [] and found["hashes"]["verified"] == found["hashes"]["files"] > 0
    made = context(reading=found)
    assert {inputs.hashes(made).status, inputs.tokenizer(made).status, inputs.lengths(made).status} == {"ok"}

    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inputs.model(context(prepared=folder)).status == "ok", "sizes alone do not show it"
    (folder / "tokenizer.json").write_text("{")
    broken = context(reading=read(folder, path=path), prepared=folder)
    assert inputs.hashes(broken).status == "fail" and weights.name in inputs.hashes(broken).found
    assert inputs.tokenizer(broken).status == "fail"


def test_hashing_stops_when_its_time_is_over(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / RECORD).write_text(json.dumps({"files": {"a": {"bytes": 1, "sha256": "0"}}}))
    assert hashes(tmp_path, 20) == {"files": 1, "verified": 1, "wrong": ["a"]}
    assert hashes(tmp_path, -1) == {"files": 1, "verified": 0, "wrong": []}
    (tmp_path / "a").unlink()
    assert hashes(tmp_path, 20)["wrong"] == ["a"]


def test_the_data_are_read_while_the_cards_are_loaded(tmp_path, monkeypatch):
    """There is no card here, so the load ends at once; what was read meanwhile is kept, and no mark stays."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = context(data={"path": rows(tmp_path / "rows.jsonl", 30)}, paths={"runs": str(tmp_path / "runs")})
    del made.__dict__["load"], made.__dict__["reading"]
    lines: list[str] = []
    object.__setattr__(made, "say", lines.append)
    assert "error" in made.load
    assert made.__dict__["reading"]["rows"]["count"] == 30 and inputs.data(made).measured == 30
    assert len(lines) == 2 and list((tmp_path / "runs").iterdir()) == []


def test_a_load_that_is_broken_off_leaves_no_reader(tmp_path, monkeypatch):
    """Ctrl-C in the middle: what reads the data ends too."""

    def ctrl_c(*arguments, **options):
        raise KeyboardInterrupt

    begun = []
    begin = program.begin
    monkeypatch.setattr(program, "run", ctrl_c)
    monkeypatch.setattr(program, "begin", lambda *a, **o: begun.append(begin(*a, **o)) or begun[0])
    made = context(paths={"runs": str(tmp_path)})
    del made.__dict__["load"], made.__dict__["reading"]
    with pytest.raises(KeyboardInterrupt):
        _ = made.load
    assert begun[0].process.wait(10) == -9


@pytest.mark.parametrize(
    ("row", "options", "longest"),
    [
        ({"prompt": "hello", "chosen": " yes", "rejected": " no" * 9}, {"train": {"method": "dpo"}}, 12),
        ({"text": "hello world " * 90}, {"data": {"max_length": 64, "overlong": "split"}}, 64),
    ],
)
def test_rows_are_measured_as_training_has_them(row, options, longest, tmp_path, capsys):
    """A pair by its longer answer, a long text by its pieces."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = options | {"data": {**options.get("data", {}), "path": str(tmp_path / "rows.jsonl")}}
    main({"settings": settings, "prepared": str(tmp_path / "model"), "hash_seconds": 1})
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (lengths,) = (line["lengths"] for line in said if "lengths" in line)
    assert (lengths["longest"], lengths["over"]) == (longest, 0), said
