"""NF4 bytes reach the matmul as they lie in the file: all 65,536 patterns, whatever dtype FSDP2 gathers in."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.engine.attention import attention_name
from recipe.engine.load import Checkpoint, build, fill, shard
from recipe.engine.nf4 import NF4Linear
from recipe.settings import Lora
from tests.models import run_ranks, tiny_nf4

# As 16-bit numbers: in order, backwards, and shifted by one, so that each stands in both halves of a 32-bit number.
PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
WEIGHTS = {
    "model.layers.0.mlp.gate_proj": PATTERNS,
    "model.layers.0.mlp.up_proj": PATTERNS.flip(0),
    "model.layers.0.mlp.down_proj": PATTERNS.roll(1),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A layer whose three large weights hold 131,072 packed bytes each: every 16-bit pattern once."""
    folder = tiny_nf4(
        tmp_path_factory.mktemp("patterns"), tied=True, intermediate_size=4096, num_hidden_layers=1
    )
    change_weights(folder, {f"{name}.weight": bits.view(torch.uint8) for name, bits in WEIGHTS.items()})
    return folder


def change_weights(folder, new):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    for name, value in new.items():
        assert value.nbytes == tensors[name].nbytes
        tensors[name] = value.reshape(-1, 1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def bytes_of(tensor):
    return tensor.detach().clone().contiguous().view(torch.uint8).flatten()


def seen_by_the_layers(mesh, folder, stored, gathered):
    """A step on real ranks: the bytes of each NF4 weight in its layer's forward and backward, and of this rank's slice."""
    with Checkpoint(folder) as checkpoint:
        model = build(folder, Lora(dropout=0), stored, attention_name("sdpa"), checkpoint)
        shard(model, mesh, gathered)
        fill(model, checkpoint, mesh, torch.device("cpu"), seed=0)
    forward, backward, slices = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            key = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            slices[key] = bytes_of(module.weight.to_local())
            module.register_forward_pre_hook(
                lambda m, inputs, key=key: forward.update({key: bytes_of(m.weight)})
            )
            module.register_full_backward_pre_hook(
                lambda m, grads, key=key: backward.update({key: bytes_of(m.weight)})
            )
    model(input_ids=torch.arange(8)[None], use_cache=False).logits.float().sum().backward()
    return {name: (slices[name], forward[name], backward[name]) for name in WEIGHTS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_patterns_survive_storage_sharding_and_gather(folder, dtype):
    ranks = run_ranks(2, seen_by_the_layers, folder, dtype, dtype)
    for name, bits in WEIGHTS.items():
        expected = bits.view(torch.uint8)
        assert torch.equal(torch.cat([seen[name][0] for seen in ranks]), expected)
        for seen in ranks:
            own, forward, backward = seen[name]
            assert len(own) == len(expected) // 2
            assert torch.equal(forward, expected)
            assert torch.equal(backward, expected)


def test_a_cast_destroys_them(folder):
    """Shows that the test above can fail: bf16 storage gathered as fp16."""
    ranks = run_ranks(2, seen_by_the_layers, folder, torch.bfloat16, torch.float16)
    for name, bits in WEIGHTS.items():
        own = torch.cat([seen[name][0] for seen in ranks])
        assert torch.equal(own, bits.view(torch.uint8))  # the slices are sound, only the gather is not
        for seen in ranks:
            changed = seen[name][1].view(torch.int16) != bits
            assert changed.float().mean() > 0.9


def packed_slices(mesh, folders, name):
    """What read_packed gives this rank of each checkpoint, by the dtype that the parameter has."""
    slices = {}
    for folder in folders:
        with Checkpoint(folder) as checkpoint:
            for dtype in DTYPES:
                parameter = torch.empty(2**17 // dtype.itemsize, 1, dtype=dtype, device="meta")
                local = checkpoint.read_packed(name, parameter, mesh)
                assert local.dtype == dtype
                slices[folder, dtype] = bytes_of(local)
    return slices


@pytest.mark.parametrize("world", [1, 3, 5])
def test_the_slice_of_a_rank_does_not_depend_on_the_stored_dtype(tmp_path, world):
    folders = [tmp_path / str(stored) for stored in (torch.uint8, *DTYPES)]
    for folder, stored in zip(folders, (torch.uint8, *DTYPES), strict=True):
        folder.mkdir()
        save_file({"weight": PATTERNS.view(stored).reshape(-1, 1)}, folder / "model.safetensors")
    ranks = run_ranks(world, packed_slices, folders, "weight")
    for dtype in DTYPES:
        expected = PATTERNS.view(dtype).chunk(world)  # the rule by which FSDP2 shards
        assert len(expected) == world
        for rank, mine in enumerate(expected):
            for folder in folders:
                assert torch.equal(ranks[rank][folder, dtype], mine.view(torch.uint8))
