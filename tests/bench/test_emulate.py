"""The emulations train: sharded, offloaded and checkpointed on two real ranks, they compute what a plain model does."""

import pytest
import torch

from tests.bench.test_bench import a_spec
from tests.models import run_ranks

ROW = torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(1))


def trained(mesh, plain):
    """Two steps on one row: losses, the adapters' gradients of the second, and losses of its parts."""
    from recipe.bench import emulate

    if plain:
        emulate.fully_shard = lambda *args, **options: None
        emulate.PreTrainedModel.gradient_checkpointing_enable = lambda *args, **options: None
    spec = a_spec(variant="article", gpus=0, ranks=mesh.size(), tokens=32, dropout=0.0)
    program = emulate.Offloaded(spec, torch.device("cpu"), mesh)
    parts = {docs: program.step(ROW[rows], list(docs)).item() for docs, rows in PARTS.items()}
    program.optimizer.zero_grad()
    losses = [program.step(ROW, [32]).item()]
    program.optimizer_step()
    losses.append(program.step(ROW, [32]).item())
    gradients = {name: p.grad for name, p in program.model.named_parameters() if p.requires_grad}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    frozen = [p for p in program.model.parameters() if not p.requires_grad and p.grad is not None]
    return losses, whole, parts, len(frozen)


PARTS = {(20, 12): slice(None), (20,): slice(20), (12,): slice(20, 32)}


def test_two_ranks_train_what_one_plain_model_does():
    (plain,) = run_ranks(1, trained, True)
    for losses, gradients, parts, frozen_gradients in run_ranks(2, trained, False):
        assert losses == pytest.approx(plain[0], rel=1e-5) and losses[1] < losses[0]
        assert set(gradients) == set(plain[1]) and len(gradients) == 2 * 2 * 7
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, plain[1][name], rtol=1e-3, atol=1e-6)
        assert frozen_gradients == 0
        # Documents of one row do not see each other, and none predicts the next one's first token.
        together = (parts[20,] * 19 + parts[12,] * 11) / 30
        assert parts[20, 12] == pytest.approx(together, rel=1e-5)
