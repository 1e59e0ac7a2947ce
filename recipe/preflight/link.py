"""Checks of the ways between host and GPUs and between the GPUs: PCIe, copies, NVLink, IOMMU, collectives.

Cards whose driver offers peer access that does not work hang or give wrong sums (NVIDIA/nccl-tests issue 117).
"""

from __future__ import annotations

from typing import Any

from recipe.plan.cards import COPY_GB_PER_SECOND
from recipe.preflight.check import Check, Context, judged, not_measured, told
from recipe.preflight.host import needs_nccl
from recipe.preflight.measured import wrong_copies

# Below these the collectives, and offloaded layers' copies, take longer than the arithmetic that hides them.
SLOW_PINNED_GIB = 5.0  # PCIe 3.0 x8
SLOW_PAGEABLE_GIB = 1.0
SLOW_NCCL_GIB = 1.5
NARROW_WIDTH, OLD_GENERATION = 8, 3
MANY_REPLAYS = 1000
SMALL_BAR1_GIB = 0.5


def pcie(context: Context) -> Check:
    """Generation and width while bytes move: idle cards fall back to generation 1."""
    expected = f"generation {OLD_GENERATION} or newer with {NARROW_WIDTH} lanes or more, under load"
    if answer := not_measured("pcie link", context.copies, expected):
        return answer
    cards = [card for card in context.copies["cards"] if card.get("generation") and card.get("width")]
    if not cards:
        return Check("pcie link", "skip", "these cards do not tell", expected)
    found = ", ".join(f"GPU {card['index']}: {card['generation']}.0 x{card['width']}" for card in cards)
    bad = [c for c in cards if c["generation"] < OLD_GENERATION or c["width"] < NARROW_WIDTH]
    remedy = ""
    if bad:
        card = bad[0]
        found = f"GPU {card['index']}: {card['generation']}.0 x{card['width']} of {card['generation_max']}.0 x{card['width_max']}"
        remedy = "move it to a wider slot, reseat it and its riser, or set the slot's generation in the BIOS"
    least = min(card["generation"] * card["width"] for card in cards)
    return judged("pcie link", not bad, found, expected, remedy, "warn", least, "generation × lanes")


def pcie_errors(context: Context) -> Check:
    """How often the link had to repeat what arrived damaged."""
    expected = f"fewer than {MANY_REPLAYS} replays since the driver was loaded"
    if answer := not_measured("pcie errors", context.sensors, expected):
        return answer
    known = [(card, card.pcie_replays) for card in context.sensors["cards"] if card.pcie_replays is not None]
    if not known:
        return Check("pcie errors", "skip", "these cards do not tell", expected)
    card, replays = max(known, key=lambda pair: pair[1])
    remedy = "the link repeats what arrived damaged: reseat the card and its riser, or set an older generation in the BIOS"
    good = replays < MANY_REPLAYS
    return judged(
        "pcie errors",
        good,
        f"{replays} replays on GPU {card.index}",
        expected,
        remedy,
        "warn",
        replays,
        "replays",
    )


def host_copies(context: Context) -> Check:
    """Pinned and not, both ways: how offloaded layers and activations go."""
    expected = f"pinned {SLOW_PINNED_GIB:.0f} GiB/s or more; the plan reckons with {COPY_GB_PER_SECOND} GB/s"
    if answer := not_measured("host copies", context.copies, expected):
        return answer
    cards = context.copies["cards"]
    pinned = min(min(card["pinned_to"], card["pinned_from"]) for card in cards)
    pageable = min(min(card["pageable_to"], card["pageable_from"]) for card in cards)
    found = f"{pinned:.1f} GiB/s pinned, {pageable:.1f} not pinned (the slowest card and way)"
    good = pinned >= SLOW_PINNED_GIB and pageable >= SLOW_PAGEABLE_GIB
    remedy = "look at `pcie link`; slow without pinning only: RAM is slow or on another NUMA node"
    return judged("host copies", good, found, expected, remedy, "warn", pinned, "GiB/s")


def peer_copies(context: Context) -> Check:
    """Each card to each other one, compared with what was sent."""
    expected = "every byte arrives, or the driver says that there is no peer access"
    peers = context.peers
    if wrong := wrong_copies(peers):
        remedy = "host.env now tells NCCL to do without P2P; a BIOS update, or IOMMU and ACS switched off, may cure it"
        return Check("p2p copies", "warn", wrong, expected, remedy)
    if answer := not_measured("p2p copies", peers, expected):
        return answer
    pairs = peers["pairs"]
    damaged = [pair for pair in pairs if not pair["right"]]
    if damaged:
        found = (
            f"a copy through the host from GPU {damaged[0]['from']} to GPU {damaged[0]['to']} arrived damaged"
        )
        return Check("p2p copies", "fail", found, expected, "test the RAM (memtest86+) and reseat the cards")
    direct = sum(pair["access"] for pair in pairs)
    slowest = min(pair["gib_per_second"] for pair in pairs)
    way = "direct" if direct == len(pairs) else "through the host" if not direct else f"{direct} direct"
    return Check(
        "p2p copies",
        "ok",
        f"{len(pairs)} ways right, {way}, {slowest:.1f} GiB/s",
        expected,
        "",
        slowest,
        "GiB/s",
    )


def nvlink(context: Context) -> Check:
    """Nice to have; where some cards of a run have links up and others none, a bridge sits badly."""
    expected = "as many links on every card, or none"
    if answer := not_measured("nvlink", context.sensors, expected):
        return answer
    links = [card.nvlinks_active for card in context.sensors["cards"]]
    if all(count is None for count in links):
        return Check("nvlink", "ok", "none; PCIe is what the plan reckons with", expected)
    found = ", ".join(f"{count or 0} links" for count in links)
    remedy = "reseat the bridge, or leave it off; `nvidia-smi nvlink --status` shows each link"
    return judged(
        "nvlink", len(set(links)) == 1, found, expected, remedy, "warn", sum(n or 0 for n in links), "links"
    )


def acs(context: Context) -> Check:
    """ACS sends copies between GPUs up to the root complex: slow, and with an IOMMU that translates, often damaged."""
    expected = "no ACS redirect above the GPUs, no translating IOMMU, where there is peer access"
    paths, why = told(context, "gpu_paths")
    if not needs_nccl(context.plan):
        return Check("acs, iommu", "skip", "no two GPUs in this run", expected)
    if paths is None:
        return Check("acs, iommu", "skip", why, expected)
    mode, _ = told(context, "iommu")
    redirects = [path["acs_redirect"] for path in paths]
    state = "on" if True in redirects else "off" if False in redirects else "not readable without root"
    found = f"ACS redirect {state}, IOMMU {mode or 'unknown'}"
    # Without peer access nothing goes directly, and neither matters.
    peers = any(pair["access"] for pair in context.peers.get("pairs", []))
    good = not peers or (True not in redirects and mode != "translated")
    remedy = "switch ACS or the IOMMU (VT-d, AMD-Vi) off in the BIOS, or boot with iommu=pt"
    return judged("acs, iommu", good, found, expected, remedy, "warn")


def bar1(context: Context) -> Check:
    """Resizable BAR: peer access of consumer cards needs all of the card's memory in the window."""
    expected = "the whole card (Above 4G decoding, Resizable BAR), or no peer access"
    paths, why = told(context, "gpu_paths")
    if not context.on_gpu:
        return Check("bar1", "skip", "no GPU in this run", expected)
    if paths is None:
        return Check("bar1", "skip", why, expected)
    sizes = [path["bar1_gib"] for path in paths if path["bar1_gib"] is not None]
    if not sizes:
        return Check("bar1", "skip", "sysfs does not tell", expected)
    smallest = min(sizes)
    peers = any(pair["access"] for pair in context.peers.get("pairs", []))
    remedy = "switch on Above 4G decoding and Resizable BAR in the BIOS: P2P through a small window is slow"
    good = smallest > SMALL_BAR1_GIB or not peers
    return judged("bar1", good, f"{smallest:g} GiB", expected, remedy, "warn", smallest, "GiB")


def all_reduce(context: Context) -> Check:
    """Sums over all ranks, each number compared, with a time limit; where NCCL fails, once more with NCCL_DEBUG=INFO."""
    return _collective(context, "all-reduce", "all_reduce", "every rank gets the same, right sums")


def all_gather(context: Context) -> Check:
    """Parts of all ranks, each number compared: so FSDP2 gathers a layer."""
    return _collective(context, "all-gather", "all_gather", "every rank gets every part, in its place")


def _collective(context: Context, name: str, part: str, expected: str) -> Check:
    """A part of recipe/preflight/ranks.py; after a failure the parts that did not run are skipped."""
    found = context.ranks
    if part not in found:
        return _not_run(name, part, found, expected, _remedy(context, found))
    rate = found[part]["gib_per_second"]
    with_settings = ", ".join(f"{key}={value}" for key, value in found["settings"].items())
    text = f"{rate:.1f} GiB/s over {context.plan.world_size} ranks{f' ({with_settings})' if with_settings else ''}"
    remedy = "look at `pcie link` and `p2p copies`, and at `nvidia-smi topo -m`"
    good = rate >= SLOW_NCCL_GIB or not context.on_gpu
    return judged(name, good, text, expected, remedy, "warn", rate, "GiB/s")


def _remedy(context: Context, found: dict[str, Any]) -> str:
    if not context.on_gpu:
        return "look at the message; a firewall on the loopback or too little RAM ends gloo's ranks"
    remedy = "look at `nvidia-smi topo -m` and `dmesg`; NCCL_P2P_DISABLE=1 make preflight tries without peer access"
    return f"{found['log_file']} has what NCCL said; {remedy}" if "log_file" in found else remedy


def shard_step(context: Context) -> Check:
    """FSDP2 over all ranks against the same step unsharded (recipe/preflight/shard_step.py)."""
    expected = "the unsharded loss, before and after a step, on every rank"
    found = context.ranks
    if "shard_step" in found:
        step = found["shard_step"]
        text = f"loss {step['loss']:.4f}, then {step['loss_after']:.4f}, off by {step['difference']:.0e}"
        return Check("sharded step", "ok", text, expected, "", step["difference"], "loss")
    remedy = "FSDP2 computes wrongly here: look at the message, and at `versions`"
    return _not_run("sharded step", "shard_step", found, expected, remedy)


def _not_run(name: str, part: str, found: dict[str, Any], expected: str, remedy: str) -> Check:
    """The part that failed says so; those behind it never began."""
    failed = found.get("stage") or "all_reduce"
    if "error" in found and failed != part:
        return Check(name, "skip", f"{failed.replace('_', '-')} failed before it", expected)
    return not_measured(name, found, expected, remedy) or Check(name, "skip", "not run", expected)


WITH_GPUS = [pcie, pcie_errors, host_copies, peer_copies, nvlink, acs, bar1]
ALWAYS = [all_reduce, all_gather, shard_step]
