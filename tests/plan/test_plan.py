"""What a plan promises: numbers near the measured ones, and reasons that say what would help."""

import dataclasses
import json

import pytest

from recipe.errors import UserError
from recipe.hardware import Gpu, probe
from recipe.plan import make_plan, render, target_of, ways_out
from recipe.plan.budget import KEEP_SHARE
from recipe.plan.cards import card_with, slowest_card
from recipe.plan.choose import TIE, UNKNOWN
from recipe.plan.memory import device_parts
from recipe.plan.placement import Placement
from recipe.plan.seconds import micro_batch_seconds
from recipe.plan.shapes import shape_of
from recipe.settings import from_dict, load

LLAMA_70B = "meta-llama/Llama-3.1-70B"


def settings(model=LLAMA_70B, **sections):
    return from_dict({"model": model, **sections})


def gib(plan, *names):
    return sum(part.gib for part in plan.device_parts if part.name in names)


def host(plan, *names):
    return sum(part.gib for part in plan.host_parts if part.name in names)


def on_paper(gpus=2, vram_gib=24.0, ram_gib=64.0, model=LLAMA_70B, **sections):
    return make_plan(
        settings(model, **sections), gpus=gpus, vram_gib=vram_gib, ram_gib=ram_gib, disk_gib=500.0
    )


def machine(**changes):
    """This machine, with other parts."""
    return dataclasses.replace(probe(), **changes)


def card(name, memory_gib=24.0):
    return Gpu(0, name, memory_gib, memory_gib - 0.3, (8, 6), "580.95")


def test_70b_fits_two_24_gib_cards_with_no_weight_in_host_ram():
    plan = on_paper(train={"micro_batch_tokens": 4096})
    assert plan.fits and plan.placement.offload_layers == 0
    # 31.9 GiB of NF4 in 80 layers, 1.0 GiB of constants, 1.96 GiB of lm_head, LoRA with gradients and AdamW: all halved.
    assert gib(plan, "NF4 weights") * 2 == pytest.approx(31.875)
    assert gib(plan, "NF4 constants") * 2 == pytest.approx(1.0117, abs=1e-3)
    assert gib(plan, "lm_head") * 2 == pytest.approx(1.957, abs=1e-3)
    lora = gib(plan, "LoRA weights", "LoRA gradients", "AdamW state")
    assert lora * 2 == pytest.approx(207_093_760 * 16 / 2**30)


@pytest.mark.parametrize(
    ("config", "gpus", "vram_gib", "ram_gib"),
    [
        ("llama-3.1-70b", 2, 24.0, 31.0),
        ("llama-3.1-70b", 1, 24.0, 40.0),
        ("llama-3.3-70b", 1, 24.0, 40.0),
        ("qwen2.5-72b", 2, 24.0, 31.0),
        ("qwen2.5-72b", 1, 24.0, 40.0),
        ("llama-3.1-8b", 1, 12.0, 15.0),
        ("smollm2-135m", 0, None, 7.4),
    ],
)
def test_every_config_fits_what_its_header_says(config, gpus, vram_gib, ram_gib):
    plan = make_plan(load(f"recipe/configs/{config}.yaml"), gpus=gpus, vram_gib=vram_gib, ram_gib=ram_gib)
    assert plan.fits
    if config == "smollm2-135m":
        assert plan.placement.keep_layers == 30


def test_70b_takes_8192_tokens_on_two_24_gib_cards_without_offloading():
    plan = on_paper(train={"micro_batch_tokens": 8192}, compute={"offload_layers": 0})
    assert plan.fits and plan.placement.offload_layers == 0


def test_70b_fits_one_24_gib_card_with_40_gib_of_ram():
    plan = on_paper(1, ram_gib=40.0, train={"micro_batch_tokens": 4096})
    assert plan.fits and 40 <= plan.placement.offload_layers <= 50
    assert host(plan, "offloaded layers") == pytest.approx(
        32.887 * plan.placement.offload_layers / 80, abs=1e-2
    )
    assert not on_paper(1, ram_gib=16.0).fits


def test_a_sequence_of_32768_tokens_needs_host_ram_for_the_layers_inputs():
    """40 GiB of them on each rank: 64 GiB of RAM hold 16,384 tokens on two cards, 96 GiB hold 32,768."""
    long = {"train": {"micro_batch_tokens": 32768, "global_batch_tokens": 65536}}
    plan = on_paper(ram_gib=96.0, **long)
    assert plan.fits and 0 < plan.placement.offload_layers < 80
    assert on_paper(1, ram_gib=72.0, **long).fits
    (reason,) = on_paper(ram_gib=64.0, **long).reasons
    assert reason.startswith("host RAM: ") and "biggest: activations" in reason
    changes = [
        way.change for way in ways_out(settings(**long), target_of(gpus=2, vram_gib=24.0, ram_gib=64.0))
    ]
    assert changes[:2] == ["--set train.micro_batch_tokens=16384", "94 GiB of RAM"]


@pytest.mark.parametrize(
    ("model", "tokens", "placement", "measured_gib"),
    [
        (LLAMA_70B, 8192, Placement(80, 48, 80, 0, mlp_chunk=2048, slots=1), 21.01),
        (LLAMA_70B, 4096, Placement(80, 46, 80, 8, mlp_chunk=2048, slots=1), 21.87),
        (LLAMA_70B, 4096, Placement(80, 46, 75, 0, mlp_chunk=4096, slots=1), 21.86),
        (LLAMA_70B, 4096, Placement(80, 0, 0, 50), 77.03),
        ("meta-llama/Llama-3.1-8B", 4096, Placement(32, 0, 0, 32), 17.37),
    ],
)
def test_the_peak_is_what_one_h100_measured(model, tokens, placement, measured_gib):
    """torch's peak of allocated bytes, true shapes, bf16, one rank (docs/benchmarks.md)."""
    run = settings(model, train={"micro_batch_tokens": tokens}, compute={"dtype": "bf16"})
    parts = device_parts(shape_of(model), run, 1, True, placement)
    planned = sum(part.gib for part in parts if part.name != "allocator slack")
    assert planned == pytest.approx(measured_gib, rel=0.03)


def test_fixed_layers_are_obeyed():
    fixed = {"offload_layers": 30, "keep_layers": 3}
    for gpus, ram_gib in (
        (2, 64.0),
        (1, 16.0),
        (0, 256.0),
    ):  # one card would need more offloaded: then it says so
        plan = on_paper(gpus, vram_gib=24.0 if gpus else None, ram_gib=ram_gib, compute=fixed)
        assert (plan.placement.offload_layers, plan.placement.keep_layers) == (30, 3)
        assert plan.fits is (gpus != 1)
    one = on_paper(compute={"keep_layers": 3}).placement
    assert (one.offload_layers, one.keep_layers) == (0, 3)


@pytest.mark.parametrize("name", ["offload_layers", "keep_layers"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_more_layers_than_the_model_has_are_refused(name, gpus):
    with pytest.raises(
        UserError, match=f"compute.{name} is 81, but the model has 80 layers; expected 0 to 80, or auto"
    ):
        on_paper(gpus, vram_gib=24.0 if gpus else None, compute={name: 81})


@pytest.mark.parametrize(("gpus", "vram_gib"), [(1, 24.0), (1, 48.0), (2, 20.0), (2, 24.0), (4, 24.0)])
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_auto_offloads_what_must_be_and_beyond_that_only_what_pays(gpus, vram_gib, tokens):
    batch = {"micro_batch_tokens": tokens}

    def placed(**compute):
        plan = on_paper(gpus, vram_gib, ram_gib=128.0, train=batch, compute=compute)
        seconds = micro_batch_seconds(
            shape_of(LLAMA_70B), settings(train=batch), gpus, card_with(vram_gib) or UNKNOWN, plan.placement
        )
        return plan, seconds.total

    plan, seconds = placed()
    auto = plan.placement.offload_layers
    fewest = next(count for count in range(81) if placed(offload_layers=count, keep_layers=0)[0].fits)
    assert plan.fits and auto >= fewest
    if auto > fewest:
        assert placed(offload_layers=fewest)[1] > seconds


def test_nothing_is_offloaded_where_there_is_room():
    for gpus, vram_gib in ((1, 141.0), (2, 80.0), (4, 80.0)):
        plan = on_paper(gpus, vram_gib, train={"micro_batch_tokens": 4096})
        assert plan.fits and plan.placement.offload_layers == 0


@pytest.mark.parametrize("ram_gib", [30.0, 34.0, 40.0, 64.0, 128.0])
def test_little_ram_is_not_overfilled(ram_gib):
    """Neither with weights nor with activations; more RAM is never slower."""
    for tokens in (1024, 4096):
        plan = on_paper(1, ram_gib=ram_gib, train={"micro_batch_tokens": tokens})
        less = on_paper(1, ram_gib=ram_gib - 2, train={"micro_batch_tokens": tokens})
        assert plan.fits
        if plan.placement.keep_layers and plan.placement.away_layers:  # that only saves time
            assert sum(part.gib for part in plan.host_parts) <= ram_gib * KEEP_SHARE
        assert plan.duration.tokens_per_second * TIE >= less.duration.tokens_per_second


def test_more_ram_keeps_more_activations():
    kept = [
        on_paper(1, ram_gib=ram, train={"micro_batch_tokens": 4096}).placement.keep_layers
        for ram in (32, 64, 128)
    ]
    assert kept == sorted(kept) and kept[0] < 5 and kept[-1] == 80


def test_double_quantisation_is_memory():
    plain = on_paper(vram_gib=80.0, quantization={"double_quant": False})
    # 4.3 GB against 1.1 GB, over the ranks
    assert gib(plain, "NF4 constants") * 2 * 2**30 == pytest.approx(4.28e9, rel=0.01)
    assert gib(on_paper(), "NF4 constants") * 2 * 2**30 == pytest.approx(1.09e9, rel=0.01)


FIXED = {"offload_layers": 0, "keep_layers": 0}


def test_more_cards_mean_less_on_each():
    batch = {"global_batch_tokens": 8192}
    needed = [on_paper(gpus, train=batch, compute=FIXED).vram_needed_gib for gpus in (2, 4, 8)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] - needed[1] > 4


def test_more_tokens_and_a_larger_rank_mean_more():
    fixed = {"compute": FIXED, "vram_gib": 80.0}
    base = on_paper(**fixed, train={"micro_batch_tokens": 1024}).vram_needed_gib
    few = {"train": {"micro_batch_tokens": 1024}}
    assert on_paper(**fixed, train={"micro_batch_tokens": 4096}).vram_needed_gib > base + 3
    assert on_paper(**fixed, **few, lora={"rank": 64}).vram_needed_gib > base + 2
    assert on_paper(vram_gib=80.0, **few, compute=FIXED | {"dtype": "fp32"}).vram_needed_gib > base + 1


def test_the_peak_is_the_largest_moment_of_a_step():
    def moment(tokens, **compute):
        train = {"micro_batch_tokens": tokens, "global_batch_tokens": 2 * tokens}
        plan = on_paper(vram_gib=80.0, train=train, compute=compute)
        return {part.name for part in plan.device_parts} & {"loss", "MLP backward", "attention backward"}

    assert moment(32768, keep_layers=0) == {"attention backward"}
    assert moment(4096, keep_layers=0) == {"loss"}
    assert moment(1024, keep_layers=80) == {"loss"}  # before it, the forward has saved all


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_few_layers_has_a_peak_too(layers):
    shape = dataclasses.replace(shape_of("llama-3.1-8b"), layers=layers)
    for away, keep in ((0, 0), (layers, 0), (1, layers)):
        placement = Placement(layers, away_layers=away, keep_layers=keep)
        assert sum(part.gib for part in device_parts(shape, settings(), 1, True, placement)) > 1


def test_a_card_that_is_too_small_is_told_what_would_fit():
    plan = on_paper(1, vram_gib=6.0)
    (reason,) = plan.reasons
    assert "8.1 GiB needed on each GPU, 6.0 there" in reason and "lm_head 2.0" in reason
    assert on_paper(1, vram_gib=plan.vram_needed_gib + 0.01).fits


def test_fewer_tokens_are_suggested_where_they_help():
    few = {"gpus": 1, "vram_gib": 6.0, "ram_gib": 6.0, "model": "meta-llama/Llama-3.1-8B"}
    (reason,) = on_paper(**few, train={"micro_batch_tokens": 16384}).reasons
    assert reason.startswith("host RAM: 9.5 GiB needed, 6.0 there; biggest: activations 3.9")
    assert on_paper(**few, train={"micro_batch_tokens": 4096}).fits


def test_ram_and_disk_are_reasons_too():
    plan = make_plan(settings(), gpus=2, vram_gib=48, ram_gib=7, disk_gib=10)
    ram, disk = plan.reasons
    assert ram.startswith("host RAM: 7.7 GiB needed, 7.0 there; biggest: processes 2.6, checkpoint 2.3")
    assert disk.startswith("disk: 176.7 GiB needed, 10.0 free; biggest: source checkpoint 131.4")
    small = settings(model={"id": "meta-llama/Llama-3.1-8B"}, lora={"rank": 4})
    (ram,) = make_plan(small, gpus=1, vram_gib=48, ram_gib=3, disk_gib=500).reasons
    assert ram.startswith("host RAM: 3.5 GiB needed, 3.0 there; the most while preparing the model")


def test_70b_on_a_cpu_is_refused_with_the_way_out():
    plan = make_plan(settings(), gpus=0, ram_gib=32)
    assert plan.device == "cpu" and plan.world_size == 2 and not plan.fits
    assert "host RAM" in plan.reasons[0]
    assert "1 GPU of 24 GiB" in [way.change for way in ways_out(settings(), target_of(gpus=0, ram_gib=32))]


def test_the_demo_fits_8_gb_on_two_cpu_ranks():
    batch = {"global_batch_tokens": 1024, "micro_batch_tokens": 512}
    plan = make_plan(settings("demo", data={"max_length": 256}, train=batch), gpus=0, ram_gib=8 * 0.93)
    assert plan.fits and plan.world_size == 2 and plan.accumulation == 1
    assert plan.duration is None
    assert (plan.placement.keep_layers, plan.placement.offload_layers) == (30, 0)


def test_layers_can_be_offloaded_on_a_cpu_too_and_are_counted_once():
    batch = {"global_batch_tokens": 512, "micro_batch_tokens": 256}
    ask = {"model": "demo", "gpus": 0, "vram_gib": None, "ram_gib": 8.0, "data": {"max_length": 256}}
    none, ten = (on_paper(**ask, train=batch, compute={"offload_layers": count}) for count in (0, 10))
    moved = gib(none, "NF4 weights") - gib(ten, "NF4 weights")
    assert host(ten, "offloaded layers") == pytest.approx(2 * moved, rel=0.05) and moved > 0
    text = render(ten)
    assert "10 of 30 layers offloaded" in text and "offloaded layers" in text


def test_the_machine_is_taken_where_nothing_else_is_said():
    plan = make_plan(settings(), machine(gpus=[card("NVIDIA GeForce RTX 3090"), card("RTX 3090", 23.5)]))
    assert (plan.world_size, plan.vram_each_gib, plan.vram_gib) == (2, (24.0, 23.5), 23.5)
    assert plan.cards == ("RTX 3090", "RTX 3090") and not plan.cards_assumed
    assert make_plan(settings("demo"), machine(gpus=[])).device == "cpu"


def test_another_machine_is_not_judged_by_this_ones_ram_and_disk():
    plan = make_plan(settings(), machine(gpus=[], ram_total_gib=2, disk_free_gib=1), gpus=2, vram_gib=48)
    assert plan.fits and plan.ram_gib is None and plan.disk_gib is None
    assert render(plan).endswith("It fits (not compared, since not given: host RAM, disk).\n")
    assert not make_plan(settings(), machine(gpus=[card("RTX A6000", 48)] * 2, disk_free_gib=1)).fits


def test_a_container_limit_is_the_ram():
    assert make_plan(settings("demo"), machine(gpus=[], ram_total_gib=64, ram_limit_gib=2)).ram_gib == 2


def test_time_is_the_floor_of_arithmetic():
    # 4 × 69.5e9 FLOP per token and up to 2 × 49.7e9 for what is computed again, at 2 × 71 TFLOP/s.
    def rate(keep_layers):
        plan = on_paper(vram_gib=24.0, compute={"keep_layers": keep_layers})
        assert set(plan.cards) == {"RTX 3090"} and plan.cards_assumed
        return 100 * 16384 / plan.duration.floor_seconds

    assert rate(0) == pytest.approx(142e12 / (4 * 69.5e9 + 2 * 49.66e9), rel=1e-3)
    assert rate(80) == pytest.approx(142e12 / (4 * 69.5e9), rel=1e-3)
    assert rate(0) < rate(40) < rate(80)
    assert on_paper(train={"steps": None, "epochs": 1}).duration.floor_seconds is None


def test_mixed_cards_go_at_the_pace_of_the_slowest():
    assert slowest_card(["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"]).name == "RTX 3090"
    assert slowest_card(["NVIDIA GeForce RTX 4090", "NVIDIA RTX 6000 Ada Generation"]) is None


def test_more_ranks_than_gpus_do_not_fit():
    plan = on_paper(vram_gib=80, compute={"processes": 4})
    assert plan.reasons == ["compute.processes is 4, but there are 2 GPUs: a rank needs one of its own"]


def test_a_prepared_model_needs_no_disk_again_and_gives_its_shape(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = make_plan(settings("some/new-model"), machine(gpus=[]), ram_gib=8, prepared=tmp_path)
    assert plan.parameters < 1e6 and plan.prepare_gib == 0
    assert plan.disk_needed_gib == pytest.approx(sum(part.gib for part in plan.run_disk_parts))
    assert "prepared already" in render(plan)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"gpus": 2}, "add --vram-gib"),
        ({"gpus": -1}, "--gpus is -1"),
        ({"gpus": 1, "vram_gib": 0}, "--vram-gib is 0"),
        ({"gpus": 1, "vram_gib": 24, "card_names": "RTX 9"}, "--gpu is `RTX 9`, expected one of RTX 3060, "),
        ({"gpus": 3, "vram_gib": [24, 16]}, "names 2 values for 3 GPUs, expected one, or one for each"),
        ({"gpus": 2, "card_names": ["3090", "4090", "3060"]}, "--gpu names 3 values for 2 GPUs"),
        ({"vram_gib": 24}, "expected --gpus as well"),
        ({"gpus": 3, "vram_gib": 24}, "expected a multiple of 3072"),
    ],
)
def test_bad_questions(arguments, part):
    with pytest.raises(UserError, match=part):
        make_plan(settings(), machine(gpus=[]), **arguments)


@pytest.mark.parametrize(("gpus", "vram_gib"), [(0, None), (1, 6.0), (1, 24.0), (2, 24.0)])
def test_the_table_fits_a_terminal_and_adds_up(gpus, vram_gib):
    plan = on_paper(gpus, vram_gib, ram_gib=40.0)
    text = render(plan)
    assert max(map(len, text.splitlines())) <= 100
    assert f"{plan.vram_needed_gib if gpus else plan.device_gib:.2f}" in text
    assert ("It fits." in text) == plan.fits == (vram_gib == 24.0)
    assert ("Time: about" in text) == (vram_gib == 24.0)
    assert plan.device_gib == pytest.approx(sum(part.gib for part in plan.device_parts))
    assert f"{sum(part.gib for part in plan.host_parts) + 1:.2f}" in text


def test_the_plan_as_json_says_where_everything_lies():
    plan = on_paper(1, ram_gib=40.0)
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["device_gib"] == plan.device_gib
    assert Placement(**found["placement"]) == plan.placement  # what `recipe train` gives to its ranks
    assert found["placement"]["layers"] == 80 and found["placement"]["offload_layers"] > 0
