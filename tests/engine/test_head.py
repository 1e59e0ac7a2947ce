"""The loss of a head that no rank holds whole is cross-entropy, and so is its gradient."""

import pytest
import torch
import torch.nn.functional as F

from recipe.engine.head import VocabularyHead
from recipe.engine.rows import rows_of_rank
from tests.models import run_ranks

HIDDEN = 24
WORLDS = [1, 2, 3]
# Vocabulary, tokens of each rank (as many as there are ranks are taken), tokens of a chunk (None: as in training).
CASES = {
    "even": (60, (16, 16, 16), 8),
    "one chunk": (60, (10, 10, 10), None),
    "vocabulary not divisible": (61, (9, 9, 9), None),
    "chunk does not divide": (61, (17, 23, 5), 7),
    "one token at a time": (61, (2, 3, 1), 1),
    "a rank without tokens": (64, (0, 11, 6), 4),
    "only the last has tokens": (64, (0, 0, 5), 4),
    "no tokens": (64, (0, 0, 0), 4),
    "a rank without words": (4, (7, 7, 7), 3),  # three ranks hold 2, 2 and 0 of them
    "extreme logits": (61, (12, 5, 9), 5),
}
LARGEST_LOGIT = 1e4


def data(name, rank, world):
    """weight (vocab, hidden), hidden (tokens, hidden), targets (tokens,): border words of every slice among them."""
    vocab, tokens, _ = CASES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = torch.randn(vocab, HIDDEN, generator=generator)
    generator.manual_seed(rank + 1)
    hidden = torch.randn(tokens[rank], HIDDEN, generator=generator)
    if name == "extreme logits":
        hidden *= LARGEST_LOGIT / (hidden @ weight.t()).abs().max()
    targets = torch.randint(vocab, (tokens[rank],), generator=generator)
    slices = [rows_of_rank(vocab, world, place) for place in range(world)]
    borders = [word for first, last in slices for word in (first, last - 1) if first < last]
    count = min(len(borders), len(targets))
    targets[:count] = torch.tensor(borders[:count], dtype=targets.dtype)
    return weight, hidden, targets


def losses_and_gradients(mesh, dtype):
    rank, world = mesh.get_local_rank(), mesh.size()
    found = {}
    for name, (vocab, _, chunk) in CASES.items():
        weight, hidden, targets = data(name, rank, world)
        first, last = rows_of_rank(vocab, world, rank)
        head = VocabularyHead(weight[first:last].to(dtype), vocab, mesh, chunk)
        losses, gradient = head.loss(hidden.to(dtype), targets, backward=True)
        alone, nothing = head.loss(hidden.to(dtype), targets, backward=False)
        assert nothing is None and torch.equal(alone, losses)
        found[name] = (losses, gradient)
    return found


def reference(name, rank, world, dtype=torch.float32):
    weight, hidden, targets = data(name, rank, world)
    hidden = hidden.to(dtype).double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight.to(dtype).double().t(), targets, reduction="none")
    losses.sum().backward()
    return losses.detach(), hidden.grad


@pytest.fixture(scope="module")
def ranks():
    return {world: run_ranks(world, losses_and_gradients, torch.float32) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_cross_entropy(ranks, name, world):
    for rank, found in enumerate(ranks[world]):
        losses, gradient = found[name]
        expected_losses, expected = reference(name, rank, world)
        assert losses.dtype == torch.float32 and losses.shape == expected_losses.shape
        assert gradient.shape == expected.shape
        assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()
        if not len(losses):
            continue
        # fp32 logits of 1e4 are exact to 1e-3.
        scale = LARGEST_LOGIT if name == "extreme logits" else 1.0
        assert (losses - expected_losses).abs().max() < 1e-5 * max(1.0, scale / 10)
        if name != "extreme logits":
            assert (gradient - expected).norm() / expected.norm() < 1e-5
        else:
            # Softmax is 0 or 1 there but for ties; a logit's rounding moves it by as much.
            assert (gradient - expected).norm() / expected.norm() < 1e-3


def test_extreme_logits_are_extreme():
    weight, hidden, _ = data("extreme logits", 0, 1)
    assert (hidden @ weight.t()).abs().max() > 0.99 * LARGEST_LOGIT
    assert torch.isinf((hidden @ weight.t()).exp()).any()  # without its largest taken off, it would overflow


def test_bf16_is_off_by_its_rounding():
    """Logits of up to 18 are 1/8 apart in bf16, which is what a CPU's product gives."""
    for rank, found in enumerate(run_ranks(2, losses_and_gradients, torch.bfloat16)):
        for name in ("even", "vocabulary not divisible", "a rank without tokens"):
            losses, gradient = found[name]
            if len(losses):
                expected_losses, expected = reference(name, rank, 2, torch.bfloat16)
                assert gradient.dtype == torch.bfloat16
                assert (losses - expected_losses).abs().max() < 1 / 8
                assert (gradient - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(("vocab", "world"), [(1, 1), (5, 3), (4, 3), (128256, 7), (2, 5)])
def test_slices_cover_the_vocabulary_once(vocab, world):
    slices = [rows_of_rank(vocab, world, rank) for rank in range(world)]
    assert [word for first, last in slices for word in range(first, last)] == list(range(vocab))


def test_the_chunk_of_a_70b_head_bounds_the_logits():
    """However many ranks: the fp32 logits that one holds at once stay within the bound."""
    from types import SimpleNamespace

    from recipe.engine.head import LOGITS_BYTES

    for world in (1, 2, 4, 8):
        mesh = SimpleNamespace(size=lambda w=world: w, get_group=lambda: None, get_local_rank=lambda: 0)
        first, last = rows_of_rank(128256, world, 0)
        head = VocabularyHead(torch.empty(last - first, 1), 128256, mesh)
        assert head.chunk >= 16
        assert head.chunk * world * (last - first) * 4 <= LOGITS_BYTES
