"""The emulations train as a plain model does; whatever happens to a rank, it says so in its result."""

import json
from pathlib import Path

import pytest
import torch

from recipe.bench.spec import TINY
from tests.bench.rows import a_spec
from tests.models import run_ranks

ROW = torch.randint(0, TINY.vocab, (32,), generator=torch.Generator().manual_seed(1))
# Two documents packed into one row, and each of them alone.
DOCUMENTS = {(20, 12): slice(None), (20,): slice(20), (12,): slice(20, 32)}


def trained(mesh, plain=False):
    """Two steps on one row: losses, the adapters' gradients of the second step, and the losses of the documents."""
    from recipe.bench import emulate

    if plain:
        emulate.fully_shard = lambda *args, **options: None
        emulate.PreTrainedModel.gradient_checkpointing_enable = lambda *args, **options: None
    spec = a_spec(variant="article", gpus=0, ranks=mesh.size(), tokens=32, dropout=0.0)
    program = emulate.Offloaded(spec, torch.device("cpu"), mesh)
    parts = {
        documents: program.step(ROW[rows], list(documents)).item() for documents, rows in DOCUMENTS.items()
    }
    program.optimizer.zero_grad()
    losses = [program.step(ROW, [32]).item()]
    program.optimizer_step()
    losses.append(program.step(ROW, [32]).item())
    gradients = {name: p.grad for name, p in program.model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return losses, whole, parts


class Ours:
    """The least that ours must have."""

    def __init__(self, spec, device, mesh):
        self.weight = torch.zeros((), requires_grad=True)
        self.seen = []

    def step(self, input_ids_row, document_lengths):
        assert input_ids_row.dtype == torch.int64
        self.seen.append([len(input_ids_row), document_lengths])
        return self.weight + 6.5

    def optimizer_step(self):
        self.seen.append("step")

    def describe(self):
        return {"seen": self.seen}


def ends_badly(error):
    def build(spec, device, mesh):
        raise error

    return build


def no_number(spec, device, mesh):
    program = Ours(spec, device, mesh)
    program.step = lambda row, documents: torch.tensor(float("nan"))
    return program


def results_of_ours(mesh, folder):
    """What the worker writes for each of these in the registry's slot."""
    from recipe.bench import emulate, worker

    worker.join = lambda spec: (torch.device("cpu"), mesh)
    asked = "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79 GiB"
    endings = {
        "measured": Ours,
        "gpu": ends_badly(torch.OutOfMemoryError(asked)),
        "driver": ends_badly(RuntimeError("CUDA error: out of memory")),
        "host": ends_badly(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        ),
        "bug": ends_badly(ValueError("so it is\nsecond line")),
        "nan": no_number,
    }
    spec = a_spec(variant="ours", gpus=0, tokens=32, document_tokens=20, micro_batches=2)
    (folder / "spec.json").write_text(json.dumps(spec.to_dict()))
    results = {}
    for name, build in endings.items():
        emulate.VARIANTS["ours"] = build
        code = worker.main([str(folder / "spec.json"), str(folder / "result.json")])
        results[name] = (code, json.loads((folder / "result.json").read_text()))
    return results


def alone(mesh, folder):
    """In one process, which imports everything once."""
    return results_of_ours(mesh, folder), trained(mesh, plain=True)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(1, alone, tmp_path_factory.mktemp("worker"))[0]


def test_two_ranks_train_what_one_plain_model_does(one_rank):
    """Sharded, offloaded and checkpointed, against none of these."""
    plain_losses, plain_gradients, _ = one_rank[1]
    for losses, gradients, parts in run_ranks(2, trained):
        assert losses == pytest.approx(plain_losses, rel=1e-5) and losses[1] < losses[0]
        assert set(gradients) == set(plain_gradients)
        assert len(gradients) == 2 * 7 * TINY.layers and all("lora_" in name for name in gradients)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-6)
        # Documents of one row do not see each other, and none predicts the next one's first token.
        assert parts[20, 12] == pytest.approx((parts[20,] * 19 + parts[12,] * 11) / 30, rel=1e-5)


def test_the_slot_of_ours_is_driven_and_timed(one_rank):
    code, result = one_rank[0]["measured"]
    assert (code, result["status"], result["losses"]) == (0, "measured", [6.5] * 3)
    assert result["details"]["seen"] == [[32, [20, 12]], [32, [20, 12]], "step"] * 3
    assert len(result["step_seconds"]) == 1 and result["timed_from"] < result["timed_to"]


@pytest.mark.parametrize(
    ("name", "status", "note"),
    [
        ("gpu", "out_of_memory", "asked for 1.96 GiB"),
        ("driver", "out_of_memory", "CUDA error: out of memory"),
        ("host", "out_of_memory", "asked for 8 bytes"),
        ("bug", "failed", "ValueError: so it is"),
        ("nan", "failed", "FloatingPointError: loss is nan in step 1"),
    ],
)
def test_a_rank_says_how_it_ended(one_rank, name, status, note):
    code, result = one_rank[0][name]
    assert (code, result["status"], result["note"]) == (1, status, note)
    assert Path("/proc").exists() and result["time"] > 0
