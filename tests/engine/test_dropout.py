"""LoRA's dropout: masks are not stored but drawn again, and are the same wherever a plan puts things.

The reference is plain transformers + PEFT whose dropout modules are replaced by the documented masks: adapters that
read the same input share one, each place is drawn anew for every layer and forward.
"""

import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from recipe.engine import kernels
from recipe.engine.layer import _dropout
from recipe.engine.layout import MODULES
from recipe.engine.lora import GROUPS
from recipe.plan.placement import Placement
from recipe.settings import Lora
from tests.engine.steps import (
    LABELS,
    LAYERS,
    LONGEST,
    ROWS,
    TOLERANCE,
    batch,
    error,
    packed_row,
    plain_loss,
    plain_model,
    set_adapters,
    sharded_model,
    slices_of_gradients,
    trained,
    whole,
)
from tests.models import run_ranks

RATE = 0.3
LORA = Lora(rank=4, alpha=8, dropout=RATE)
SEED = 11
PLACEMENTS: dict[str, dict[str, int]] = {
    "resident": {},
    "one offloaded": {"offload_layers": 1},
    "all offloaded": {"offload_layers": 4, "away_layers": 4, "slots": 1},
    "all kept": {"keep_layers": 4},
    "kept away, chunks": {"offload_layers": 2, "away_layers": 2, "keep_layers": 3, "mlp_chunk": 7},
    "chunk of one": {"mlp_chunk": 1, "slots": 2},
}


@pytest.fixture(scope="module")
def folder(nf4_model):
    return nf4_model(num_hidden_layers=LAYERS)


def step(mesh, folder, placement, kernels="fused", lora=LORA, shift=None):
    """Loss and gradients of this rank's rows from one seed per rank; `shift` moves the adapters by so much of it."""
    model = sharded_model(mesh, folder, Placement(LAYERS, **placement), kernels, lora)
    set_adapters(model, mesh)
    if shift is not None:
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.to_local().add_(shift[name])
    torch.manual_seed(SEED + mesh.get_local_rank())
    loss = 0.0
    for number in range(mesh.get_local_rank(), len(ROWS), mesh.size()):
        part = model.engine.loss(batch(number), training=True) * mesh.size() / LABELS
        part.backward()
        loss += part.item()
    return loss, slices_of_gradients(model)


def steps(mesh, folder, kernels):
    return {name: step(mesh, folder, placement, kernels) for name, placement in PLACEMENTS.items()}


# -- the same masks wherever things lie ---------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_no_placement_changes_the_masks(folder, kernels, world):
    ranks = run_ranks(world, steps, folder, kernels)
    expected = whole([rank["resident"][1] for rank in ranks])
    for name in PLACEMENTS:
        for rank in ranks:
            assert rank[name][0] == pytest.approx(rank["resident"][0], abs=TOLERANCE)
        assert error(whole([rank[name][1] for rank in ranks]), expected) < TOLERANCE


# -- against autograd with the masks written out --------------------------------------------------------------------


def mask_of(layer, group, draw, rate, rows, columns):
    """The documented mask: True where an element of the input of a layer's group of adapters stays."""
    view: Any = SimpleNamespace(index=layer)
    step: Any = SimpleNamespace(dropout=rate, draw=draw)
    drop = _dropout(view, group, step)
    assert drop is not None and drop.probability == rate
    return kernels.dropout_mask(rows, columns, drop, 0, "cpu")


class Masked(nn.Module):
    """In place of PEFT's dropout of one adapter: the documented mask of its input, at this document's tokens."""

    def __init__(self, layer, group, now):
        super().__init__()
        self.layer, self.group, self.now = layer, group, now

    def forward(self, x):
        mask = mask_of(self.layer, self.group, self.now.draw, RATE, LONGEST, x.shape[-1])
        rows = mask[self.now.start : self.now.start + x.shape[-2]]
        return x * rows / (1 - RATE)


def masked_reference(folder):
    """Loss and gradients of the step by plain transformers + PEFT with these masks, on one rank."""
    model = plain_model(folder, LORA)
    now = SimpleNamespace(draw=0, start=0)
    group_of = {MODULES[module]: group for group, modules in GROUPS.items() for module in modules}
    for index, layer in enumerate(model.get_base_model().model.layers):
        for place, group in group_of.items():
            layer.get_submodule(place).lora_dropout["default"] = Masked(index, group, now)
    torch.manual_seed(SEED)
    total = 0.0
    for number, lengths in enumerate(ROWS):
        now.draw = int(torch.randint(2**40, ()))
        starts = iter(itertools.accumulate([0, *lengths]))
        # Each document is one forward: before it, tell the masks where in the row it lies.
        hook = model.register_forward_pre_hook(lambda *_, starts=starts: setattr(now, "start", next(starts)))
        loss = plain_loss(model, number) / LABELS
        hook.remove()
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in trained(model).items()}


def test_loss_and_gradients_are_those_of_autograd_with_the_masks(folder):
    loss, gradients = masked_reference(folder)
    ours = run_ranks(1, steps, folder, "fused")[0]
    for name in PLACEMENTS:
        assert ours[name][0] == pytest.approx(loss, abs=TOLERANCE)
        assert error(ours[name][1], gradients) < TOLERANCE


def forgotten_in_the_backward(mesh, folder):
    """A backward that drops nothing, though the forward did."""
    original = kernels.lora_down_input_grad_

    def forget(dx, dxa, a, dropout=None, row0=0):
        return original(dx, dxa, a, None, row0)

    with mock.patch.object(kernels, "lora_down_input_grad_", forget):
        return step(mesh, folder, {})


def test_a_mask_forgotten_shows(folder):
    loss, gradients = masked_reference(folder)
    ours, wrong = run_ranks(1, forgotten_in_the_backward, folder)[0]
    assert ours == pytest.approx(loss, abs=TOLERANCE)
    assert error(wrong, gradients) > 100 * TOLERANCE


# -- the plain way: its masks are torch's, so what can be asked is whether gradient and loss belong together ----------


SHIFT = 1e-3


def along_the_gradient(mesh, folder, kernels):
    """The derivative of the loss along its gradient, by the gradient and by two losses with the same masks."""
    _, gradients = step(mesh, folder, {}, kernels)
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    direction = {name: gradient / norm for name, gradient in gradients.items()}
    losses = []
    for sign in (1, -1):
        shift = {name: sign * SHIFT * way for name, way in direction.items()}
        losses.append(step(mesh, folder, {}, kernels, shift=shift)[0])
    return norm.item(), (losses[0] - losses[1]) / (2 * SHIFT)


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_the_gradient_is_that_of_the_loss_with_the_same_masks(folder, kernels):
    by_gradient, by_losses = run_ranks(1, along_the_gradient, folder, kernels)[0]
    assert by_losses == pytest.approx(by_gradient, rel=0.01)


# -- rate ---------------------------------------------------------------------------------------------------------


def dropouts_of(mesh, folder):
    """What the kernels were asked to drop: (forward or backward, probability, key, columns) by micro-batch."""
    noted: list[list] = []
    original = kernels.lora_down

    def note(x, a, dropout=None, row0=0):
        noted[-1].append(None if dropout is None else (dropout.probability, dropout.key))
        return original(x, a, dropout, row0)

    model = sharded_model(mesh, folder, Placement(LAYERS), lora=LORA)
    set_adapters(model, mesh)
    torch.manual_seed(SEED + mesh.get_local_rank())
    losses = []
    with mock.patch.object(kernels, "lora_down", note):
        for number in (0, 0, 1):
            noted.append([])
            loss = model.engine.loss(batch(number), training=True)
            noted.append([])
            loss.backward()
            losses.append(loss.item())
        state = torch.get_rng_state()
        noted.append([])
        with torch.no_grad():
            evaluated = model.engine.loss(batch(0), training=False).item()
        assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing
    return noted, losses, evaluated


@pytest.fixture(scope="module")
def noted(folder):
    return run_ranks(2, dropouts_of, folder)


def test_every_layer_group_micro_batch_and_rank_has_its_own_mask(noted):
    keys = set()
    for passes, losses, _ in noted:
        for forward, backward in zip(passes[0:6:2], passes[1:6:2], strict=True):
            assert len(set(forward)) == LAYERS * len(GROUPS)
            assert set(backward) == set(forward)  # the same masks again
            assert {probability for probability, _ in forward} == {RATE}
            keys |= {key for _, key in forward}
        assert losses[0] != losses[1]  # the same row, dropped otherwise
    assert len(keys) == 2 * 3 * LAYERS * len(GROUPS)


def test_evaluation_drops_nothing(noted, folder):
    model = plain_model(folder).eval()
    with torch.no_grad():
        expected = plain_loss(model, 0).item()
    for passes, _, evaluated in noted:
        assert set(passes[6]) == {None}
        assert evaluated == pytest.approx(expected, abs=TOLERANCE * len(packed_row(0)["labels"]))


def evaluated_by_plain_layers(mesh, folder):
    model = sharded_model(mesh, folder, Placement(LAYERS), "plain", LORA)
    set_adapters(model, mesh)
    model.engine.loss(batch(1), training=True).backward()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = model.engine.loss(batch(0), training=False).item()
    return found, torch.equal(torch.get_rng_state(), state)


def test_evaluation_by_plain_layers_drops_nothing_either(noted, folder):
    """PEFT's own dropout, which goes by its module's mode."""
    found, drew_nothing = run_ranks(1, evaluated_by_plain_layers, folder)[0]
    assert drew_nothing and found == pytest.approx(noted[0][2], abs=TOLERANCE)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_the_share_that_is_dropped_is_the_rate(rate):
    """Within four standard deviations, over all elements, and for rows and columns; masks of neighbours are unlike."""
    rows, columns = 256, 512
    masks = []
    for index, group in itertools.product(range(3), GROUPS):
        masks.append(~mask_of(index, group, 12345, rate, rows, columns))
    deviation = (rate * (1 - rate)) ** 0.5
    for mask in masks:
        assert abs(mask.float().mean() - rate) < 4 * deviation / (rows * columns) ** 0.5
        assert (mask.float().mean(0) - rate).abs().max() < 6 * deviation / rows**0.5
        assert (mask.float().mean(1) - rate).abs().max() < 6 * deviation / columns**0.5
    for one, other in itertools.combinations(masks, 2):
        assert abs((one & other).float().mean() - rate**2) < 6 * rate / (rows * columns) ** 0.5
