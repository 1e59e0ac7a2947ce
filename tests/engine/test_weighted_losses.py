"""What other methods than SFT ask of the engine: a weight for each token's loss, the reference, noise on embeddings."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.neftune import neftune_post_forward_hook

from recipe.data.encode import IGNORED
from recipe.engine import engine as engine_module
from recipe.engine.attention import Documents
from recipe.plan.placement import Placement
from tests.engine.steps import (
    CPU,
    LAYERS,
    TOLERANCE,
    batch,
    documents,
    error,
    plain_model,
    set_adapters,
    sharded_model,
    slices_of_gradients,
    trained,
    whole,
)
from tests.models import run_ranks

ROWS = (0, 2)  # a packed row for each of two ranks, of three and four documents
ALPHA = 5.0
ONE_DOCUMENT = 1


def weights_of(number: int, count: int) -> torch.Tensor:
    """Of each token's loss; of either sign and 100 times apart, as pairs weigh their answers."""
    return torch.randn(count, generator=torch.Generator().manual_seed(number)) * 10.0 ** (
        -2 * (number % 3 > 0)
    )


def plain_token_losses(model, number: int) -> torch.Tensor:
    parts = []
    for _, ids, labels in documents(number):
        logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1].cpu()
        losses = F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="none")
        parts.append(losses[labels[1:] != IGNORED])
    return torch.cat(parts)


@pytest.fixture(scope="module")
def folder(nf4_model):
    return nf4_model(num_hidden_layers=LAYERS, family="qwen2")  # biases too


@pytest.fixture(scope="module")
def plain(folder):
    model = plain_model(folder)
    found = [plain_token_losses(model, number) for number in ROWS]
    sum((weights_of(n, len(f)) * f).sum() for n, f in zip(ROWS, found, strict=True)).backward()
    with torch.no_grad(), model.disable_adapter():
        off = [plain_token_losses(model, number) for number in ROWS]
    model.get_input_embeddings().neftune_noise_alpha = ALPHA
    hook = model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(3)
    noisy = plain_token_losses(model, ONE_DOCUMENT).detach()
    hook.remove()
    return {
        "losses": [f.detach() for f in found],
        "gradients": {name: p.grad.clone() for name, p in trained(model).items()},
        "off": off,
        "noisy": noisy,
    }


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(2, sharded, folder)


def sharded(mesh, folder):
    found = {}
    mine = batch(ROWS[mesh.get_local_rank()])
    for kernels in ("fused", "plain"):
        model = sharded_model(mesh, folder, Placement(LAYERS, 1, 0, 2, 16, 3), kernels)
        set_adapters(model, mesh)
        engine = model.engine
        reference = engine.reference_losses(mine)
        losses = engine.losses(mine, training=True)
        (losses * weights_of(ROWS[mesh.get_local_rank()], len(losses)) * mesh.size()).sum().backward()
        gradients = copy.deepcopy(slices_of_gradients(model))
        # Frozen as they are, then trained on: the reference stays what it was.
        engine.adapters.freeze()
        with torch.no_grad():
            engine.adapters.masters.mul_(1.5)
            frozen, moved = engine.reference_losses(mine), engine.losses(mine, training=False)
            engine.adapters.masters.div_(1.5)
            engine.neftune_alpha = ALPHA
            torch.manual_seed(3)
            noisy = engine.losses(batch(ONE_DOCUMENT), training=True)
            still = engine.losses(batch(ONE_DOCUMENT), training=False)
            engine.neftune_alpha = 0.0
            quiet = engine.losses(batch(ONE_DOCUMENT), training=True)
        found[kernels] = {
            "losses": losses.detach(),
            "gradients": gradients,
            "off": reference,
            "frozen": frozen,
            "moved": moved,
            "noisy": noisy,
            "still": still,
            "quiet": quiet,
        }
    return found


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_a_weight_for_each_token_gives_the_gradients_of_autograd(ranks, plain, kernels):
    for rank, expected in zip(ranks, plain["losses"], strict=True):
        assert (rank[kernels]["losses"] - expected).abs().max() < TOLERANCE
    assert error(whole([rank[kernels]["gradients"] for rank in ranks]), plain["gradients"]) < TOLERANCE


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_the_reference_is_the_model_with_its_adapters_off(ranks, plain, kernels):
    for rank, off, on in zip(ranks, plain["off"], plain["losses"], strict=True):
        assert (rank[kernels]["off"] - off).abs().max() < TOLERANCE
        assert (off - on).abs().max() > 0.1  # they do something


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_frozen_adapters_are_the_reference_whatever_is_trained_after(ranks, plain, kernels):
    for rank, on in zip(ranks, plain["losses"], strict=True):
        assert (rank[kernels]["frozen"] - on).abs().max() < TOLERANCE
        assert (rank[kernels]["moved"] - on).abs().max() > 0.1


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_noise_is_neftunes_own_and_only_in_training(ranks, plain, kernels):
    for rank in ranks:
        got = rank[kernels]
        assert (got["noisy"] - plain["noisy"]).abs().max() < TOLERANCE
        assert (got["noisy"] - got["quiet"]).abs().max() > 0.01
        assert torch.equal(got["still"], got["quiet"])


def test_noise_goes_by_the_length_of_each_document_not_of_the_packed_row():
    lengths = [40, 250, 700]
    x = torch.zeros(sum(lengths), 64)
    starts = [0, 40, 290, 990]
    engine_module._add_noise(x, Documents.of(starts, CPU), ALPHA)
    for length, part in zip(lengths, x.split(lengths), strict=True):
        bound = ALPHA / math.sqrt(length * 64)
        assert 0.98 * bound < part.abs().max() <= bound
        assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(part.mean()) < 5 * bound / math.sqrt(3 * part.numel())
