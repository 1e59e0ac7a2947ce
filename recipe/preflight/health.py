"""Checks of how the GPUs are: memory errors, heat, fan, power, throttling, Xid; matmul rate, and all loaded in step."""

from __future__ import annotations

import re
from typing import Any

from recipe.plan.cards import slowest_card
from recipe.preflight.check import Check, Context, Status, judged, not_measured, told
from recipe.sensors import BAD_REASONS, Sensors

# So close to the slowdown threshold an idle card will be held back under load.
WARM_DEGREES = 15
SLOWDOWN_CELSIUS = 90  # where a card does not tell: GeForce cards slow down between 83 and 93
HOT_CELSIUS = 60  # a fan that stands still above this is broken; below, many cards stop theirs on purpose
LOW_POWER = 0.6  # of the card's own limit: below this it loses much more speed than a tenth
SLOW_MATMUL = 0.7  # of the card's expected rate
# What NVIDIA's catalogue says of the Xids that end runs on machines like these.
XIDS = {
    13: "a program's error, or unstable overclocking: reset the clocks",
    31: "a program's error, or damaged GPU memory",
    43: "a program was ended by the driver",
    48: "an uncorrectable memory error: the card may be failing",
    62: "the card's own controller halted: heat or power",
    63: "a memory row was replaced: reboot at the next occasion",
    64: "a memory row could not be replaced: the card is failing",
    74: "an NVLink error: reseat the bridge",
    79: "the card fell off the bus: power cables, riser, supply too weak",
    119: "the driver's GSP gave no answer: update the driver, or NVreg_EnableGpuFirmware=0",
}


def _cards(context: Context, name: str, expected: str) -> tuple[list[Sensors], Check | None]:
    """The readings, or the check's answer where there are none."""
    return context.sensors.get("cards", []), not_measured(name, context.sensors, expected)


def memory_errors(context: Context) -> Check:
    """ECC, retired pages, remapped rows: of data-centre and workstation cards; consumer cards do not tell."""
    expected = "no uncorrected error, no failed or pending replacement of memory"
    cards, answer = _cards(context, "gpu memory errors", expected)
    if answer:
        return answer
    worst: tuple[Status, str, str] | None = None
    for card in cards:
        if card.ecc_uncorrected or card.remapped_rows_failed:
            what = "a row that could not be replaced" if card.remapped_rows_failed else (
                f"{card.ecc_uncorrected} uncorrected memory errors")  # fmt: skip
            remedy = "results cannot be trusted: reboot, and replace the card if it comes again"
            worst = ("fail", f"GPU {card.index}: {what}", remedy)
            break
        if card.remapped_rows_pending or card.retired_pages:
            what = "a memory row waits to be replaced" if card.remapped_rows_pending else (
                f"{card.retired_pages} retired pages")  # fmt: skip
            worst = (
                "warn",
                f"GPU {card.index}: {what}",
                "reboot, which replaces it; many of them: replace the card",
            )
    if worst:
        return Check("gpu memory errors", worst[0], worst[1], expected, worst[2])
    if all(card.ecc_uncorrected is None and card.retired_pages is None for card in cards):
        return Check("gpu memory errors", "skip", "these cards have no ECC, or it is off", expected)
    corrected = sum(card.ecc_corrected or 0 for card in cards)
    return Check("gpu memory errors", "ok", f"{corrected} corrected since the driver was loaded", expected,
                 measured=corrected, unit="errors")  # fmt: skip


def throttling(context: Context) -> Check:
    """Why the clocks are held back at this moment, as the driver tells it; a power cap is normal."""
    expected = "clocks not held back by heat or power supply"
    cards, answer = _cards(context, "throttling", expected)
    if answer:
        return answer
    if all(card.throttle_reasons is None for card in cards):
        return Check("throttling", "skip", "these cards do not tell", expected)
    for card in cards:
        bad = [reason for reason in card.throttle_reasons or () if reason in BAD_REASONS]
        if bad:
            found = f"GPU {card.index}: {', '.join(bad)}"
            return Check("throttling", "warn", found, expected, _cooler_or_power(bad))
    reasons = sorted({reason for card in cards for reason in card.throttle_reasons or ()})
    return Check("throttling", "ok", ", ".join(reasons) or "none", expected)


def temperature(context: Context) -> Check:
    """A card that is warm while it idles will be held back under load."""
    expected = f"{WARM_DEGREES} °C or more below the slowdown threshold before the run"
    cards, answer = _cards(context, "temperature", expected)
    if answer:
        return answer
    known = [(card, card.temperature_celsius) for card in cards if card.temperature_celsius is not None]
    if not known:
        return Check("temperature", "skip", "these cards do not tell", expected)
    card, celsius = max(known, key=lambda pair: pair[1] - (pair[0].slowdown_celsius or SLOWDOWN_CELSIUS))
    limit = card.slowdown_celsius or SLOWDOWN_CELSIUS
    found = f"{celsius} °C on GPU {card.index}, slowdown at {limit}"
    remedy = "is another program computing? Else clean the fans, give the cards air, lower the power limit"
    return judged(
        "temperature", celsius <= limit - WARM_DEGREES, found, expected, remedy, "warn", celsius, "°C"
    )


def fan(context: Context) -> Check:
    """A fan that stands still on a warm card; below 60 °C many cards stop theirs on purpose."""
    expected = f"turning where a card is above {HOT_CELSIUS} °C"
    cards, answer = _cards(context, "fan", expected)
    if answer:
        return answer
    known = [card for card in cards if card.fan_percent is not None]
    if not known:
        return Check("fan", "skip", "these cards have none of their own, or do not tell", expected)
    still = [
        card for card in known if card.fan_percent == 0 and (card.temperature_celsius or 0) > HOT_CELSIUS
    ]
    found = ", ".join(f"{card.fan_percent} %" for card in known)
    if still:
        found = f"GPU {still[0].index} stands still at {still[0].temperature_celsius} °C"
    remedy = "the fan is blocked, broken or set by hand: look at it before the run"
    return judged("fan", not still, found, expected, remedy, "fail")


def power_limit(context: Context) -> Check:
    """A limit that was set far below the card's own costs more speed than it saves power."""
    expected = f"at least {LOW_POWER:.0%} of the card's own limit"
    cards, answer = _cards(context, "power limit", expected)
    if answer:
        return answer
    known = [
        (card, card.power_limit_watts / card.power_default_watts)
        for card in cards
        if card.power_limit_watts and card.power_default_watts
    ]
    if not known:
        return Check("power limit", "skip", "these cards do not tell", expected)
    card, share = min(known, key=lambda pair: pair[1])
    found = f"{card.power_limit_watts:.0f} W of {card.power_default_watts:.0f} on GPU {card.index}"
    remedy = f"`sudo nvidia-smi -i {card.index} -pl {(card.power_default_watts or 0) * 0.8:.0f}` gives nearly full speed"
    return judged(
        "power limit", share >= LOW_POWER, found, expected, remedy, "warn", card.power_limit_watts, "W"
    )


def xid(context: Context) -> Check:
    """The driver's own error numbers in the kernel log: most runs that die without a word left one."""
    lines, why = told(context, "kernel_log")
    expected = "no Xid since the boot"
    if lines is None:
        return Check("xid", "skip", why, expected)
    found = [line["text"] for line in lines if line["kind"] == "xid"]
    if not found:
        return Check("xid", "ok", "none", expected, measured=0, unit="lines")
    number = re.search(r"Xid \([^)]*\): (\d+)", found[-1])
    meaning = XIDS.get(int(number[1]), "see NVIDIA's catalogue of Xids") if number else "see `dmesg`"
    return Check(
        "xid", "warn", f"{len(found)}, the last: {found[-1][:120]}", expected, meaning, len(found), "lines"
    )


def matmul(context: Context) -> Check:
    """Each card alone, 16 bit with fp32 sums, against the rate that the plan reckons with."""
    card = slowest_card([gpu.name for gpu in context.machine.gpus])
    expected = f"{SLOW_MATMUL:.0%} of {card.tflops:.0f} TFLOP/s ({card.name})" if card else "a known card"
    if answer := _load_answer(context, "matmul rate", expected):
        return answer
    rates = [found["tflops"] for found in context.load["cards"]]
    slowest = min(rates)
    found = ", ".join(f"{rate:.0f}" for rate in rates) + " TFLOP/s"
    if card is None:
        return Check(
            "matmul rate",
            "ok",
            f"{found}; no rate of this card is known here",
            expected,
            "",
            slowest,
            "TFLOP/s",
        )
    remedy = (
        "look at the power limit, clocks and heat (`nvidia-smi -q -d PERFORMANCE`), and for other programs"
    )
    good = slowest >= SLOW_MATMUL * card.tflops
    return judged("matmul rate", good, found, expected, remedy, "warn", slowest, "TFLOP/s")


def loaded(context: Context) -> Check:
    """All cards in step: steady, unhurt and the same. A machine that went off here is told at the next start."""
    expected = "all cards compute the same, are not held back, and the machine stays on"
    if mark := context.load.get("went_off"):
        remedy = (
            "a power supply too weak for the cards' peaks: limit them (`sudo nvidia-smi -pl 300`), use separate "
            f"cables; then remove {mark} to try again"
        )
        return Check(
            "loaded in step", "fail", "the machine restarted while all cards were loaded", expected, remedy
        )
    if answer := _load_answer(context, "loaded in step", expected):
        return answer
    load = context.load
    readings: dict[str, Any] = load["readings"]
    together = load["tflops_together"]
    hottest = max((reading["celsius"] for reading in readings.values()), default=0)
    watts = sum(reading["watts"] for reading in readings.values())
    found = f"{load['bursts']} bursts, {together:.0f} TFLOP/s each, {watts:.0f} W in all, {hottest} °C"
    damaged = [index for index, count in enumerate(load["damaged"]) if count]
    if damaged or load["unlike"]:
        found = f"GPU {(damaged or load['unlike'])[0]} computed wrongly; {found}"
        remedy = "reset overclocking and undervolting; if it comes again, the card or its power is bad"
        return Check("loaded in step", "fail", found, expected, remedy, together, "TFLOP/s")
    bad = sorted({reason for reading in readings.values() for reason in reading["reasons"]} & BAD_REASONS)
    if bad:
        found = f"held back by {', '.join(bad)}; {found}"
    return judged(
        "loaded in step", not bad, found, expected, _cooler_or_power(bad), "warn", together, "TFLOP/s"
    )


def _load_answer(context: Context, name: str, expected: str) -> Check | None:
    if "went_off" in context.load:
        return Check(name, "skip", "not tried again: see `loaded in step`", expected)
    return not_measured(name, context.load, expected, "the load ended badly: look at `dmesg` for an Xid")


def _cooler_or_power(reasons: list[str]) -> str:
    if {"power brake", "hw slowdown"} & set(reasons):
        return "the card brakes itself: check its power cables (one per plug) and the supply"
    return "give the cards air, clean the fans, or lower the power limit (`sudo nvidia-smi -pl`)"


WITH_GPUS = [memory_errors, temperature, fan, power_limit, throttling, xid, matmul, loaded]
