"""A full GPU ends in one line: what was asked for, what was allocated, and the setting that would fit."""

import dataclasses
import json

import pytest
import torch

from recipe.errors import UserError
from recipe.files import write_json
from recipe.plan import make_plan
from recipe.plan.memory import GIB, layer_bytes
from recipe.plan.placement import Placement
from recipe.plan.shapes import KNOWN
from recipe.settings import from_dict
from recipe.train import worker
from recipe.train.run import Run, begin_or_continue, first_difference
from recipe.train.worker import out_of_memory

SHAPE = KNOWN["llama-3.1-70b"]
SETTINGS = from_dict(
    {"model": "meta-llama/Llama-3.1-70B", "train": {"micro_batch_tokens": 4096, "global_batch_tokens": 16384}}
)
# As torch 2.11 words it.
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 55.90 GiB is "
    "free. Including non-PyTorch memory, this process has 23.23 GiB memory in use. 22.50 GiB allowed; Of the allocated "
    "memory 22.40 GiB is allocated by PyTorch, and 88.15 MiB is reserved by PyTorch but unallocated."
)


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def said(offload, text=CUDA_SAYS):
    return out_of_memory(torch.OutOfMemoryError(text), SETTINGS, Placement(80, offload), SHAPE)


def test_more_offloaded_layers_are_named_where_there_are_more():
    text = said(offload=3)
    assert "\n" not in text and text.startswith("GPU memory is full on rank 1: 0.88 GiB were asked for with ")
    assert "22.40 GiB allocated" in text
    # 0.875 GiB and half a GiB to spare, in slices of 0.2 GiB: 7 layers.
    freed = layer_bytes(SHAPE, SETTINGS) / 2 / GIB
    assert "--set compute.offload_layers=10 (now 3)" in text and 7 * freed > 0.875 + 0.5 > 6 * freed


def test_fewer_tokens_are_named_where_all_layers_are_away():
    assert "--set train.micro_batch_tokens=2048 (now 4096)" in said(offload=80)


def test_a_message_of_another_wording_still_makes_a_line():
    assert "1.00 GiB were asked for with nearly all allocated" in said(0, "out of memory")


def test_the_rank_ends_with_1_and_its_launcher_can_read_why(tmp_path, monkeypatch):
    run = Run(tmp_path / "begun")
    run.folder.mkdir()
    run.config.write_text(SETTINGS.to_yaml())
    write_json(run.manifest, {"model": {"folder": "llama-3.1-70b"}})

    def full(*arguments):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(worker, "train", full)
    placement = json.dumps(dataclasses.asdict(Placement(80, 3)))
    monkeypatch.setattr("sys.argv", ["worker", str(run.folder), "--placement", placement])
    assert worker.main() == 1
    event = json.loads(run.events.read_text().splitlines()[-1])
    assert (event["exit_code"], event["rank"]) == (1, 1)
    assert event["message"] == said(offload=3)


def test_what_is_named_can_be_set_on_an_unfinished_run(tmp_path):
    """Where a layer lies changes no result; everything else must be as the run was begun."""
    settings = from_dict({**SETTINGS.to_dict(), "paths": {"runs": str(tmp_path)}})
    run = Run(tmp_path / "begun")
    run.folder.mkdir()
    run.config.write_text(settings.to_yaml())

    def with_(**compute):
        return dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, **compute))

    _, goes_on = begin_or_continue(with_(offload_layers=10, keep_layers=2), "begun")
    assert goes_on
    assert first_difference(settings.to_dict(), with_(kernels="plain").to_dict())
    with pytest.raises(UserError, match=r"compute\.kernels was fused, is plain"):
        begin_or_continue(with_(kernels="plain"), "begun")


def test_the_plan_takes_the_setting():
    settings = dataclasses.replace(SETTINGS, compute=dataclasses.replace(SETTINGS.compute, offload_layers=10))
    plan = make_plan(settings, gpus=2, vram_gib=24.0, ram_gib=64.0)
    assert plan.fits and plan.placement.offload_layers == 10
