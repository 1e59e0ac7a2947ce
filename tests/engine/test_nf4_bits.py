"""NF4 bytes reach the arithmetic as they lie in the file: all 65,536 patterns of two bytes, absmax constants too.

Whatever dtype the file stores them in, however many ranks they are cut over, whether they lie on the host or not, and
whatever dtype the run computes in.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.checksums import sidecar
from recipe.engine.layout import MODULES
from recipe.engine.weights import LayerStore
from recipe.plan.placement import Placement
from tests.engine.steps import batch as packed
from tests.engine.steps import sharded_model, slices_of_gradients
from tests.models import run_ranks, tiny_nf4

# As 16-bit numbers: in order, backwards, and shifted by one, so that each stands in both halves of a 32-bit number.
PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
WEIGHTS = {"gate_proj": PATTERNS, "up_proj": PATTERNS.flip(0), "down_proj": PATTERNS.roll(1)}
ABSMAX = torch.arange(256).to(torch.uint8)  # every code, over and over
STORED = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
COMPUTED = [torch.bfloat16, torch.float16, torch.float32]
LAYERS = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By the dtype they are stored in: layers whose three large weights hold 131,072 packed bytes, each pattern once."""
    folder = tiny_nf4(
        tmp_path_factory.mktemp("patterns"), tied=True, intermediate_size=4096, num_hidden_layers=LAYERS
    )
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    made = {}
    for dtype in STORED:
        made[dtype] = tmp_path_factory.mktemp(str(dtype))
        for other in folder.iterdir():
            if other not in (file, sidecar(file)):
                (made[dtype] / other.name).write_bytes(other.read_bytes())
        save_file(patterned(tensors, dtype), made[dtype] / file.name, metadata={"format": "pt"})
    return made


def patterned(tensors, dtype):
    changed = dict(tensors)
    for layer in range(LAYERS):
        for name, bits in WEIGHTS.items():
            weight = f"model.layers.{layer}.{MODULES[name]}.weight"
            assert tensors[weight].nbytes == 2**17 and tensors[f"{weight}.absmax"].numel() % 256 == 0
            changed[weight] = bits.view(dtype).reshape(-1, 1).clone()
            changed[f"{weight}.absmax"] = ABSMAX.repeat(tensors[f"{weight}.absmax"].numel() // 256)
    return changed


def seen_by_the_layers(mesh, cases):
    """For each (folder, compute dtype, offloaded layers, kernels): bytes in the layers' forward and backward."""
    return [seen(mesh, *case) for case in cases]


def seen(mesh, folder, dtype, offload, kernels):
    model = sharded_model(mesh, folder, Placement(LAYERS, offload_layers=offload), kernels, dtype=dtype)
    arithmetic, noted = model.engine.arithmetic, {}

    def noting(way, position):
        original = getattr(arithmetic, way)

        def call(*args):
            layer = args[position]
            for name in WEIGHTS:
                weight = layer.weight(name)
                assert weight.packed.dtype == torch.uint8
                noted[way, layer.index, name] = (weight.packed.clone(), weight.absmax.clone())
            return original(*args)

        return call

    arithmetic.forward, arithmetic.backward = noting("forward", 1), noting("backward", 3)
    model.engine.loss(packed(0), training=True).backward()
    assert all(gradient.dtype == torch.float32 for gradient in slices_of_gradients(model).values())
    wrong = [
        key
        for key, (bits, absmax) in noted.items()
        if not torch.equal(bits, WEIGHTS[key[2]].view(torch.uint8))
        or not torch.equal(absmax, ABSMAX.repeat(len(absmax) // 256))
    ]
    changed = min(
        (bits.view(torch.int16) != WEIGHTS[key[2]]).float().mean() for key, (bits, _) in noted.items()
    )
    return SimpleNamespace(
        seen=set(noted),
        wrong=wrong,
        changed=changed.item(),
        sizes=[len(shard) for shard in model.engine.store.shards],
    )


EVERYWHERE = {
    (way, layer, name) for way in ("forward", "backward") for layer in range(LAYERS) for name in WEIGHTS
}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_patterns_survive_storage_slicing_offload_and_gather(folders, world):
    cases = [(folders[torch.uint8], dtype, 1, "fused") for dtype in COMPUTED]
    cases += [(folders[stored], torch.bfloat16, 1, "fused") for stored in STORED[1:]]
    cases += [(folders[torch.float32], torch.float16, LAYERS, "fused")]
    cases += [(folders[torch.float16], torch.float32, 0, "plain")]
    for rank in run_ranks(world, seen_by_the_layers, cases):
        for case, found in zip(cases, rank, strict=True):
            assert found.seen == EVERYWHERE, case
            assert found.wrong == [], case


def through_a_cast(mesh, folder):
    """What FSDP2 does where the stored dtype is not the computed one: the bits are taken for numbers and cast."""
    original = LayerStore._fill

    def fill(self, buffer, layer):
        original(self, buffer, layer)
        numbers = buffer.run.view(torch.bfloat16)
        numbers.copy_(numbers.to(torch.float16))

    with mock.patch.object(LayerStore, "_fill", fill):
        return seen(mesh, folder, torch.float32, 1, "fused")


def test_a_cast_destroys_them(folders):
    """Shows that the test above can fail."""
    for found in run_ranks(2, through_a_cast, folders[torch.uint8]):
        assert set(found.wrong) == EVERYWHERE
        assert found.changed > 0.5
