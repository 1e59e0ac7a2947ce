"""Numbers of the steps, of the memory and of the GPUs that must become a warning, and those that must not."""

import random
from dataclasses import replace

import pytest

from recipe.sensors import Sensors
from recipe.train.alarms import (
    QUIET_STEPS,
    Curve,
    HostMemory,
    HostWatch,
    Lamps,
    gpu_alarms,
    is_explosion,
    is_spike,
    memory_alarms,
    not_finite,
    vram_alarms,
)
from recipe.train.pulse import Pulse
from recipe.train.run import Run

# Of a run of the demo: noisy, and falling.
random.seed(7)
LOSSES = [1.9 - 0.01 * step + random.gauss(0, 0.12) for step in range(60)]
NORMS = [1.2 + random.gauss(0, 0.3) for _ in range(60)]
GIB = 2**30
CARD = Sensors(
    index=1,
    uuid="GPU-b",
    name="NVIDIA GeForce RTX 3090",
    pci_address="0000:02:00.0",
    temperature_celsius=71,
    slowdown_celsius=95,
    fan_percent=60,
    power_watts=280.0,
    power_limit_watts=280.0,
    power_default_watts=350.0,
    sm_clock_mhz=1700,
    sm_clock_max_mhz=2100,
    memory_used_gib=22.0,
    memory_total_gib=24.0,
    throttle_reasons=("power cap",),
    ecc_uncorrected=None,
    ecc_corrected=None,
    retired_pages=None,
    remapped_rows_failed=None,
    remapped_rows_pending=None,
    pcie_generation=4,
    pcie_generation_max=4,
    pcie_width=16,
    pcie_width_max=16,
    pcie_replays=0,
    nvlinks_active=None,
    processes=(),
)
OTHER = replace(CARD, index=0, uuid="GPU-a", pci_address="0000:01:00.0")


def told(curve, numbers, first=1):
    return [
        (step, alarm.cause)
        for step, (loss, norm) in enumerate(numbers, first)
        for alarm in curve.step(step, loss, norm)
    ]


def test_a_run_that_learns_warns_of_nothing():
    assert told(Curve(), zip(LOSSES, NORMS, strict=True)) == []


def test_a_spike_and_an_explosion_warn_once_until_it_has_been_quiet():
    losses, norms = list(LOSSES), list(NORMS)
    for step in (30, 31, 33, 30 + QUIET_STEPS):
        losses[step - 1], norms[step - 1] = 6.0, 80.0
    expected = [(step, cause) for step in (30, 50) for cause in ("loss_spike", "gradient_explosion")]
    assert told(Curve(), zip(losses, norms, strict=True)) == expected


def test_a_run_that_goes_on_knows_what_was_usual():
    lines = [{"loss": loss, "grad_norm": norm} for loss, norm in zip(LOSSES, NORMS, strict=True)]
    assert told(Curve(lines), [(6.0, 1.2)], first=61) == [(61, "loss_spike")]
    assert told(Curve(), [(6.0, 1.2)], first=61) == [], "without that nothing is known"


def test_how_far_is_far():
    usual = LOSSES[10:60]
    assert not is_spike(2.2, usual)
    assert is_spike(3.3, usual)
    assert not is_spike(1.4, [1.0] * 50), "a very quiet stretch makes no spike of a small step"
    assert is_spike(1.6, [1.0] * 50)
    assert not is_spike(60.0, usual[:5])
    assert not is_explosion(9.0, [0.01] * 50), "below 10 clipping does no harm"
    assert not is_explosion(11.0, [1.2] * 50)
    assert is_explosion(13.0, [1.2] * 50)
    assert not is_explosion(float("inf"), [1.2] * 50)


def test_a_loss_that_is_no_number_says_what_to_try():
    text = str(not_finite(7, float("nan"), 1e-4, "step-000006"))
    assert text.startswith(
        "step 7: the loss is nan; nothing of that state was saved, the last good checkpoint is step-"
    )
    assert "--set train.learning_rate=5e-05 (now 0.0001)" in text and "\n" not in text
    assert "there is no checkpoint yet" in str(not_finite(1, float("inf"), 1e-4, None))


def causes(alarms):
    return [alarm.cause for alarm in alarms]


def test_low_memory_is_told_once_until_it_comes_back():
    lamps = Lamps()
    seen = [
        causes(memory_alarms(HostMemory(64.0, available, 0), None, 10, lamps))
        for available in (20.0, 3.7, 3.0, 20.0, 3.0)
    ]
    assert seen == [[], ["host_memory_low"], [], [], ["host_memory_low"]]


@pytest.mark.parametrize(
    ("total", "available", "low"),
    [(128.0, 7.0, True), (128.0, 8.0, False), (16.0, 1.4, True), (16.0, 1.6, False)],
)
def test_low_is_a_share_of_much_memory_and_an_amount_of_little(total, available, low):
    assert HostMemory(total, available, 0).is_low == low


def test_swapping_is_a_rate():
    lamps = Lamps()
    before = HostMemory(64.0, 20.0, 40 * GIB)
    slow, fast = (replace(before, swapped_bytes=before.swapped_bytes + mib * 2**20) for mib in (30, 900))
    assert memory_alarms(before, None, 10, lamps) == [], "what was swapped before the run"
    assert memory_alarms(slow, before, 10, lamps) == []
    (alarm,) = memory_alarms(fast, before, 10, lamps)
    assert alarm.cause == "swapping" and alarm.values == {"swap_mib_per_second": 90.0}


def test_the_cgroups_memory_counts_where_it_is_tighter(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 50331648 kB\n")
    (tmp_path / "proc/vmstat").write_text("pswpin 10\npswpout 6\npswpin_other 9\n")
    assert HostMemory.read(tmp_path) == HostMemory(64.0, 48.0, 16 * 4096)
    (tmp_path / "proc/self/cgroup").write_text("0::/run\n")
    folder = tmp_path / "sys/fs/cgroup/run"
    folder.mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("memory\n")
    (folder / "memory.max").write_text(f"{16 * GIB}\n")
    (folder / "memory.current").write_text(f"{15 * GIB}\n")
    (folder / "memory.stat").write_text("inactive_file 0\n")
    assert HostMemory.read(tmp_path) == HostMemory(16.0, 1.0, 16 * 4096)


def test_a_full_card_and_allocations_tried_again_warn():
    assert vram_alarms(23.4, 24.0, 0, 0, Lamps()) == []
    assert causes(vram_alarms(23.6, 24.0, 0, 0, Lamps())) == ["vram_low"]
    lamps = Lamps()
    (alarm,) = vram_alarms(20.0, 24.0, 3, 1, lamps)
    assert "2 allocations had to be tried again" in alarm.message
    assert vram_alarms(20.0, 24.0, 4, 3, lamps) == []
    assert vram_alarms(20.0, 24.0, 4, 4, lamps) == []
    assert causes(vram_alarms(20.0, 24.0, 5, 4, lamps)) == ["vram_low"]


def test_heat_and_a_power_brake_warn_and_a_power_cap_does_not():
    lamps = Lamps()
    hot = replace(CARD, throttle_reasons=("power cap", "thermal"), temperature_celsius=93)
    assert gpu_alarms([OTHER, CARD], [OTHER, CARD], lamps) == []
    (alarm,) = gpu_alarms([OTHER, hot], [OTHER, CARD], lamps)
    assert alarm.cause == "throttling"
    assert alarm.message.startswith("GPU 1 is held back (thermal) at 93 degrees and 280 W, 1700 of 2100 MHz")
    assert gpu_alarms([OTHER, hot], [OTHER, hot], lamps) == []
    assert gpu_alarms([OTHER, CARD], [OTHER, hot], lamps) == []
    assert causes(gpu_alarms([OTHER, hot], [OTHER, CARD], lamps)) == ["throttling"]


def test_memory_errors_and_lost_cards_warn():
    lamps = Lamps()
    wrong = replace(CARD, ecc_uncorrected=2)
    assert gpu_alarms([wrong], [wrong], lamps) == []
    assert causes(gpu_alarms([replace(wrong, ecc_uncorrected=3)], [wrong], lamps)) == ["ecc"]
    (lost,) = gpu_alarms([OTHER], [OTHER, CARD], lamps)
    assert lost.cause == "gpu_lost" and lost.values == {"gpu": 1, "pci_address": "0000:02:00.0"}
    assert gpu_alarms([OTHER], [OTHER, CARD], lamps) == []
    assert causes(gpu_alarms(None, [OTHER, CARD], lamps)) == ["gpu_lost"], (
        "where NVML itself fails, none is named"
    )
    assert gpu_alarms(None, [OTHER, CARD], lamps) == []


def test_this_host_is_looked_at_for_real(tmp_path):
    memory = HostMemory.read()
    assert 0 < memory.available_gib <= memory.total_gib
    run = Run(tmp_path)
    watch = HostWatch(run, Pulse(run, 0), on_gpu=False)
    watch._memory = replace(memory, swapped_bytes=memory.swapped_bytes - GIB)
    assert "swapping" in causes(watch.look())
