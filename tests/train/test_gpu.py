"""On an NVIDIA GPU: the same commands, through `accelerate launch`, in bf16 and fp16, with the attention of GPUs.

make test ARGS="-m gpu"        (passes with fewer cards than the recipe is made for: one is enough)
"""

import json

import pytest
import torch
from safetensors.torch import load_file

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


def test_new_tokens_are_trained_and_exported(tmp_path, capsys):
    """One that the tokenizer has and one that it lacks."""
    config = make_place(tmp_path, STEPS, save_every=6)
    code, _, err = train(config, "run", "--set", 'lora.new_tokens=["<|im_end|>", "<|tool|>"]')
    assert code == 0, err
    run = tmp_path / "runs" / "run"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 2
    capsys.readouterr()
    assert main(["export", "--run", "run", "--set", f"paths.runs={run.parent}"]) == 0
    tensors = load_file(run / "adapters" / "adapter_model.safetensors")
    assert [name for name in tensors if "token_adapter" in name]


def test_each_kernel_that_is_compiled_is_a_mark(tmp_path, monkeypatch):
    """The first pass compiles all of them within one layer, longer than a rank may be silent."""
    from triton import knobs

    from recipe.engine import kernels
    from recipe.train.pulse import Pulse
    from recipe.train.run import Run

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    pulse = Pulse(Run(tmp_path), 0)
    pulse.follow(torch.device("cuda"))
    x = torch.ones(4, 96, device="cuda", dtype=torch.bfloat16)
    out = kernels.rms_norm(x, torch.ones(96, device="cuda", dtype=torch.bfloat16), 1e-5)
    assert (pulse.alone, pulse.doing) == (1, "compile _rms_norm_kernel")
    assert torch.allclose(out, x), "and it was compiled"


@pytest.mark.parametrize("kind", ["varlen", "cudnn"])
def test_attention_is_that_of_each_document_alone(kind, monkeypatch):
    """Forward and backward of each kernel against SDPA in fp32; a window only where the kernel has one."""
    from recipe.engine import attention
    from recipe.engine.attention import Attention, Documents

    if kind == "cudnn":
        monkeypatch.setattr(attention.Attention, "way", lambda self, q, documents, window: self.kind)
    documents = Documents.of([0, 5, 22, 64], torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads):
        return torch.randn(64, heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v, grad = random(8), random(2), random(2), random(8)
    wide = [tensor.float() for tensor in (q, k, v)]
    for window in (None, 7) if kind == "varlen" else (None,):
        ours, theirs = Attention(kind, 0.125), Attention("sdpa", 0.125)
        attended = ours.forward(q, k, v, documents, window)
        expected = theirs.forward(*wide, documents, window)
        torch.testing.assert_close(attended.out.float(), expected.out, atol=2e-2, rtol=2e-2)
        gradients = ours.backward(grad, q, k, v, attended, documents, window)
        for found, wanted in zip(
            gradients, theirs.backward(grad.float(), *wide, expected, documents, window), strict=True
        ):
            assert (found.float() - wanted).norm() < 2e-2 * wanted.norm()
