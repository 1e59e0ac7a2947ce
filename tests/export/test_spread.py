"""Where a model's parts go on which machine; and that layers in host RAM change no bit of what is computed."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from recipe.bench.decode import RandomBytes
from recipe.engine.random import random_config
from recipe.errors import Refused
from recipe.export import plain
from recipe.export.plain import _from_pretrained, adapters_off, load_plain
from recipe.export.spread import GIB, HOST, MARGIN_BYTES, Room, Sizes, Spread, Work, place, rooms
from recipe.export.streamed import assemble, load_streamed
from recipe.plan.placement import spread
from recipe.plan.shapes import KNOWN, read_config, shape_from_config

LLAMA_70B = Sizes.of(KNOWN["llama-3.1-70b"], True, torch.bfloat16, Work(), adapter_bytes=828_000_000)
LLAMA_8B = Sizes.of(KNOWN["llama-3.1-8b"], True, torch.bfloat16, Work())


def cards(*gib):
    return [Room(f"cuda:{i}", int(g * GIB)) for i, g in enumerate(gib)]


def taken(sizes, found):
    """Bytes on each device of a spread, its buffers with them."""
    on = dict.fromkeys([*found.devices, found.embedding, found.head], 0)
    for device, streamed in zip(found.devices, found.streamed, strict=True):
        on[device] += sizes.beside + (0 if streamed else sizes.run)
    for device in set(found.devices):
        of_it = [s for at, s in zip(found.devices, found.streamed, strict=True) if at == device]
        on[device] += sizes.work + min(2, sum(of_it)) * sizes.run
    on[found.embedding] += sizes.embedding
    on[found.head] += sizes.head
    return on


def test_a_model_that_fits_one_gpu_lies_there():
    for gpus in (cards(24), cards(5, 24)):
        found = place(LLAMA_8B, gpus)
        assert found.plain and found.device_map == {"": gpus[-1].device}


def test_two_cards_of_24_gib_share_a_70b_in_blocks():
    found = place(LLAMA_70B, cards(22.5, 22.5))
    assert found.plain and found.embedding == "cuda:0" and found.head == "cuda:1"
    assert found.devices == tuple(sorted(found.devices))
    assert 36 <= found.devices.count("cuda:0") <= 44
    assert max(taken(LLAMA_70B, found).values()) <= 22.5 * GIB
    where = found.device_map
    assert where["model.layers.0"] == "cuda:0" and where["model.layers.79"] == "cuda:1"
    assert len(where) == 80 + 4


def test_unequal_cards_take_layers_by_their_room():
    found = place(LLAMA_70B, cards(12, 36))
    assert found.plain and found.devices.count("cuda:1") > 2 * found.devices.count("cuda:0")
    assert all(taken(LLAMA_70B, found)[gpu.device] <= gpu.bytes for gpu in cards(12, 36))


@pytest.mark.parametrize(
    ("gib", "fewest", "most"), [((22.5,), 34, 46), ((12.0,), 60, 74), ((16.0, 16.0), 15, 25)]
)
def test_what_fits_on_no_gpu_stays_in_host_ram(gib, fewest, most):
    gpus = cards(*gib)
    found = place(LLAMA_70B, gpus, host_free=64 * GIB)
    away = sum(found.streamed)
    assert fewest <= away <= most and found.host_bytes == away * LLAMA_70B.run
    assert not found.plain and found.embedding == HOST
    used = taken(LLAMA_70B, found)
    # Full but for less than one layer, and no fuller.
    assert all(gpu.bytes - LLAMA_70B.whole < used[gpu.device] <= gpu.bytes for gpu in gpus)
    for device in dict.fromkeys(found.devices):
        mine = [s for at, s in zip(found.devices, found.streamed, strict=True) if at == device]
        assert tuple(mine) == spread(len(mine), sum(mine))


@pytest.mark.parametrize(
    ("gib", "host_gib", "said"),
    [
        ((22.5,), 12, "host RAM: .* layers that fit on no GPU, 12.0 GiB are available; end other programs"),
        (
            (4.0,),
            64,
            "GPU memory: cuda:0 4.0 GiB are free for the model, about .* even with all layers in host RAM",
        ),
        ((), 30, "host RAM: .* to compute on the CPU, there is no GPU, 30.0 GiB are available"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(gib, host_gib, said):
    with pytest.raises(Refused, match=said) as refused:
        place(LLAMA_70B, cards(*gib), host_free=host_gib * GIB)
    assert "\n" not in str(refused.value)


MODELS = {
    "llama": {"family": "llama", "num_hidden_layers": 9},
    "qwen2": {"family": "qwen2", "num_hidden_layers": 8, "tied": True},
    "qwen3": {"family": "qwen3", "num_hidden_layers": 8},
}
# They are listed everywhere, so that a run on one GPU says what it left out.
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
ON = [
    *((family, "cpu") for family in MODELS),
    *(pytest.param((family, "cuda:0"), marks=pytest.mark.gpu) for family in MODELS),
]
ON += [pytest.param((family, "cuda:0", "cuda:1"), marks=TWO_GPUS) for family in MODELS]


def all_but_one(options, devices):
    """A spread with one layer resident on each device, the others in host RAM."""
    layers, tied = options["num_hidden_layers"], options.get("tied", False)
    blocks = [layers // len(devices)] * len(devices)
    blocks[-1] += layers - sum(blocks)
    return Spread(
        tuple(device for device, count in zip(devices, blocks, strict=True) for _ in range(count)),
        tuple(flag for count in blocks for flag in spread(count, count - 1)),
        devices[0] if tied else HOST,
        devices[0] if tied else devices[-1],
    )


@pytest.fixture(scope="module", params=ON, ids=str)
def two(request, nf4_model, tmp_path_factory):
    """A model whole in memory, the same one with layers that pass through the buffers, and the adapters of both."""
    family, *devices = request.param
    options = MODELS[family]
    dtype = torch.float32 if devices == ["cpu"] else torch.bfloat16
    folder, adapters = nf4_model(**options), tmp_path_factory.mktemp("adapters")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    get_peft_model(load_plain(folder, dtype, None), config).save_pretrained(adapters)
    whole = load_plain(folder, dtype, adapters)
    base = load_streamed(folder, dtype, all_but_one(options, devices))
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return whole, PeftModel.from_pretrained(base, str(adapters)).eval()


def batch_of_eight():
    ids = torch.randint(1, 512, (8, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, :row] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def one_sequence():
    return {name: value[:1, 8:] for name, value in batch_of_eight().items()}


@pytest.mark.parametrize("off", [True, False], ids=["base", "tuned"])
@pytest.mark.parametrize("asked", [one_sequence, batch_of_eight])
def test_layers_in_host_ram_change_no_bit(two, off, asked):
    whole, streamed = two
    inputs = {name: value.to(whole.device) for name, value in asked().items()}
    assert streamed.device == whole.device
    with torch.no_grad(), adapters_off(whole, off), adapters_off(streamed, off):
        expected = whole(**inputs).logits
        assert torch.equal(streamed(**inputs).logits.to(expected.device), expected)
        options = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0}
        answers = [
            model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
            for model in (whole, streamed)
        ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert all(
        torch.equal(a.cpu(), b.cpu()) for a, b in zip(answers[0].logits, answers[1].logits, strict=True)
    )


def test_adapters_matter_and_an_interrupted_pass_leaves_nothing_behind(two):
    whole, streamed = two
    inputs = {name: value.to(whole.device) for name, value in batch_of_eight().items()}
    with torch.no_grad():
        expected = whole(**inputs).logits
        with adapters_off(streamed, True):
            assert not torch.allclose(streamed(**inputs).logits.to(expected.device), expected, atol=1e-2)

        def interrupt(*_):
            raise KeyboardInterrupt

        last = streamed.get_base_model().model.layers[-2]
        handle = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            streamed(**inputs)
        handle.remove()
        assert torch.equal(streamed(**inputs).logits.to(expected.device), expected)


def test_each_layer_crosses_once_a_pass_and_two_at_most_are_there(two, monkeypatch):
    streamed = two[1]
    streams = streamed.get_base_model().streams
    copied = {stream: [] for stream in streams}
    inputs = {name: value.to(streamed.device) for name, value in one_sequence().items()}
    with torch.no_grad():
        streamed(**inputs)  # the first pass finds the buffers empty
    for stream in streams:
        assert len(stream.slots) == 2 and len(stream.runs) == stream.count > 2
        assert stream.bytes_per_pass == stream.count * stream.layout.size
        places = [(s.run.data_ptr(), s.run.data_ptr() + stream.layout.size) for s in stream.slots]
        for slot in stream.slots:
            for layer in slot.bound:
                for _, weight in layer:
                    assert any(low <= weight.data_ptr() < high for low, high in places)
        fill = stream._fill

        def spied(slot, turn, of=stream, fill=fill):
            (other,) = [one for one in of.slots if one is not slot]
            copied[of].append((turn, other.holds))
            fill(slot, turn)

        monkeypatch.setattr(stream, "_fill", spied)
    streamed.generate(**inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    for stream, fills in copied.items():
        turns = [turn for turn, _ in fills]
        assert len(turns) == 4 * stream.count  # one pass for the prompt, three for tokens
        assert all((before + 1) % stream.count == after for before, after in pairwise(turns))
        # While one is brought the one before it is there to be computed.
        assert all(other == (turn - 1) % stream.count for turn, other in fills)


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_seen_by_loading_itself(nf4_model, capsys, monkeypatch):
    """The bytes of three layers are left for nine; a second GPU would take the others."""
    monkeypatch.setattr(plain, "rooms", lambda cap: rooms(cap)[:1])
    folder = nf4_model(**MODELS["llama"])
    whole = load_plain(folder, torch.bfloat16, None)
    shape = shape_from_config(read_config(folder / "config.json"), "config.json")
    sizes = Sizes.of(shape, True, torch.bfloat16, Work(1, 64, 64))
    room = sizes.work + sizes.head + 9 * sizes.beside + 3 * sizes.run
    cap = torch.cuda.memory_allocated() + MARGIN_BYTES + room
    small = load_plain(folder, torch.bfloat16, None, Work(1, 64, 64), cap_bytes=cap)
    assert "8 of them from host RAM" in capsys.readouterr().err
    ids = one_sequence()["input_ids"].cuda()
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, small(ids).logits)


@pytest.mark.gpu
@TWO_GPUS[1]
def test_a_model_over_two_gpus_gives_the_numbers_of_one(nf4_model):
    folder = nf4_model(**MODELS["llama"])
    whole = load_plain(folder, torch.bfloat16, None)
    shape = shape_from_config(read_config(folder / "config.json"), "config.json")
    sizes = Sizes.of(shape, True, torch.bfloat16, Work(1, 64, 64))
    room = sizes.work + sizes.head + 6 * sizes.whole
    both = _from_pretrained(
        folder, torch.bfloat16, place(sizes, [Room("cuda:0", room), Room("cuda:1", room)])
    )
    assert {str(weight.device) for weight in both.parameters()} == {"cuda:0", "cuda:1"}
    ids = one_sequence()["input_ids"].cuda()
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, both(ids).logits.to("cuda:0"))


@pytest.mark.gpu
def test_layers_of_a_70bs_true_shape_change_no_bit():
    """Larger copies than small models need: 421 MiB each."""
    shape = dataclasses.replace(KNOWN["llama-3.1-70b"], layers=5, vocab=8192)
    config = random_config(shape)
    logits = []
    ids = torch.randint(0, shape.vocab, (2, 40), device="cuda")
    for away in (0, 4):
        placed = Spread(("cuda:0",) * 5, spread(5, away), "cuda:0", "cuda:0")
        torch.manual_seed(3)  # of all that is random
        model = assemble(config, shape, torch.bfloat16, placed, RandomBytes(shape, deviation=0.002))
        with torch.no_grad():
            logits.append([model(ids).logits, model(ids[:1, :1]).logits])
    for whole, streamed in zip(*logits, strict=True):
        assert torch.equal(whole, streamed) and whole.isfinite().all()
