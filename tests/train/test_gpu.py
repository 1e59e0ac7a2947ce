"""On an NVIDIA GPU: the same commands, through `accelerate launch`, in bf16 and fp16, with the attention of GPUs.

make test ARGS="-m gpu"        (passes with fewer cards than the recipe is made for: one is enough)
"""

import json

import pytest
import torch

from recipe.cli import main
from tests.train.tiny_run import make_place, train

pytestmark = pytest.mark.gpu
STEPS = 12


@pytest.mark.parametrize(
    ("dtype", "attention"), [("bf16", "varlen"), ("bf16", "sdpa"), ("fp16", "varlen"), ("fp32", "sdpa")]
)
def test_it_trains_and_the_export_is_verified(dtype, attention, tmp_path, capsys):
    config = make_place(tmp_path, STEPS, save_every=6)
    settings = ["--set", f"compute.dtype={dtype}", "--set", f"compute.attention={attention}"]
    code, _, err = train(config, "run", *settings)
    assert code == 0, err
    assert f"attention {attention}" in err
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    assert all(line["vram_reserved_gib"] >= line["vram_allocated_gib"] > 0 for line in lines)
    assert all(len(line["power_watts"]) == torch.cuda.device_count() for line in lines)
    capsys.readouterr()
    assert main(["export", "--run", "run", "--set", f"paths.runs={run.parent}", "--json"]) == 0
    out, _ = capsys.readouterr()
    loss = json.loads(out)["held_out_loss"]
    with (
        capsys.disabled()
    ):  # how far two ways of computing the same lie apart: what TOLERANCE in export is set by
        apart = abs(loss["plain_peft"] - loss["trainer"])
        print(f" {dtype} {attention}: {loss['trainer']:.6f}, apart by {apart:.1e} ", end="", flush=True)


def test_variable_length_attention_is_that_of_each_document_alone():
    from recipe.engine.attention import sdpa_by_document, varlen

    bounds = torch.tensor([0, 5, 22, 64], dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads):
        return torch.randn(1, heads, 64, 32, generator=generator, device="cuda", dtype=torch.bfloat16)

    query, key, value = random(8), random(2), random(2)
    for window in (None, 7):
        told = {"cu_seq_lens_q": bounds, "max_length_q": 42, "sliding_window": window}
        ours, _ = varlen(None, query, key, value, None, **told)
        theirs, _ = sdpa_by_document(None, query.float(), key.float(), value.float(), None, **told)
        torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)
