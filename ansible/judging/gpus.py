"""Checks of GPUs and driver: enough of them, large, new and well connected enough, and a driver that can be had."""

from __future__ import annotations

import re

from judging.case import Case, Check, Row, decimal, judged, row, whole, yes
from judging.known import major

# CUDA 13, which torch is built for, has no code for GPUs before Turing (recipe/preflight/gpu.py).
TOO_OLD = ("older", "Maxwell", "Pascal", "Volta")
NARROWEST_LINK = 4  # lanes: of PCIe 3.0 about 3.5 GB/s, when layers come from RAM the link is what counts
OLDEST_LINK = 3  # PCIe generation
SMALL_BAR_GIB = 1.0  # without resizable BAR the window to a card's memory has 256 MiB
DRIVER_PACKAGE = re.compile(
    r"nvidia-(driver|dkms|kernel|open|headless|utils|smi|compute)|libnvidia-|libcuda|cuda-drivers"
)
WITHOUT_GPU = "`-e gpus_wanted=0` sets up a machine that computes on its CPU"


# --- the GPUs -------------------------------------------------------------------------------------------


def gpu(case: Case) -> Row:
    """Enough GPUs that can be used?"""
    if case.without_gpu:
        return row("gpu", "ok", f"{named(case.gpus) or 'none'}; none is wanted (gpus_wanted=0)")
    wanted, there = max(case.gpus_wanted or 1, 1), case.usable_gpus
    expected = (
        "two NVIDIA GPUs, or one"
        if case.gpus_wanted is None
        else f"at least {wanted} NVIDIA GPU{'s' * (wanted > 1)}"
    )
    if not there:
        return _no_gpu(case, expected)
    passed = len(case.gpus) - len(there)
    found = named(there) + (f"; {passed} more passed through to virtual machines" if passed else "")
    if len(there) < wanted:
        return row(
            "gpu", "fail", found, expected, f"add GPUs, or ask for fewer with `-e gpus_wanted={len(there)}`"
        )
    if len(there) == 1 and not _one_is_enough(case.plan):
        ram, speed = case.ram_needed_gib, _tokens_per_second(case.plan)
        plan = [f"{ram:.0f} GiB of RAM needed"] if ram else []
        plan += [f"{speed:,.0f} tokens/s predicted"] if speed else []
        remedy = "it goes on: what does not fit the card lies in RAM, which is slower" + (
            f" ({', '.join(plan)})" if plan else ""
        )
        return row("gpu", "warn", found, "two or more", remedy)
    return row("gpu", "ok", found, expected)


def gpu_generation(case: Case) -> Row | None:
    if case.without_gpu or not case.usable_gpus:
        return None
    old = [g for g in case.usable_gpus if g.get("architecture") in TOO_OLD]
    if not old:
        return row(
            "gpu generation",
            "ok",
            " and ".join(sorted({str(g.get("architecture")) for g in case.usable_gpus})),
        )
    every = len(old) == len(case.usable_gpus)
    remedy = "use Turing or newer: RTX 20 and GTX 16 of 2018, or later"
    if not every:
        remedy = "it goes on: leave them out of runs with CUDA_VISIBLE_DEVICES, or take them out"
    found = f"{named(old)} ({old[0]['architecture']}): CUDA 13 has no code for it"
    return row("gpu generation", "fail" if every else "warn", found, "Turing or newer", remedy)


def gpu_memory(case: Case) -> Row | None:
    """The smallest card must hold a rank of the plan."""
    if case.without_gpu or not case.usable_gpus:
        return None
    sizes = [decimal(g.get("memory_gib")) for g in case.usable_gpus]
    known = [size for size in sizes if size is not None]
    needed = decimal(case.plan.get("vram_needed_gib"))
    if len(known) < len(sizes):
        return row("gpu memory", "skip", "not known before the driver runs")
    found = f"{min(known):g} GiB the smallest, {sum(known):g} in all"
    if not needed:
        return row("gpu memory", "ok", found)
    reason = case.reason("GPU memory") or "larger cards, or another config (`recipe_config`)"
    if min(known) < needed:
        return row("gpu memory", "fail", found, f"{needed:.1f} GiB on each for the plan", reason)
    return row("gpu memory", "ok", f"{found}; {needed:.1f} needed on each")


def gpu_link(case: Case) -> Row | None:
    """What card and slot can do at best: an idle card slows its link down."""
    if case.without_gpu or not case.usable_gpus:
        return None
    slow = []
    for g in case.usable_gpus:
        width, generation = g.get("link_width_max"), g.get("link_generation_max")
        if (width or NARROWEST_LINK) < NARROWEST_LINK or (generation or OLDEST_LINK) < OLDEST_LINK:
            slow.append(f"{g.get('address')} PCIe {generation or '?'}.0 x{width or '?'}")
    links = {f"PCIe {g['link_generation_max']}.0 x{g['link_width_max']}" for g in case.usable_gpus
             if g.get("link_generation_max") and g.get("link_width_max")}  # fmt: skip
    if not slow:
        return row("gpu link", "ok" if links else "skip", ", ".join(sorted(links)) or "the bus does not tell")
    remedy = "it goes on, slower where cards exchange layers: another slot, no riser, or the slot's lanes in the BIOS"
    expected = f"x{NARROWEST_LINK} and PCIe {OLDEST_LINK}.0 at least"
    return row("gpu link", "warn", ", ".join(slow), expected, remedy)


def resizable_bar(case: Case) -> Row | None:
    """No speed of ours hangs on it, but with many cards a BIOS without Above 4G Decoding loses some."""
    known = [g for g in case.usable_gpus if g.get("bar_gib")]
    if case.without_gpu or not known:
        return None
    small = [g for g in known if g["bar_gib"] < SMALL_BAR_GIB]
    found = (
        ", ".join(f"{size:g} GiB" for size in sorted({g["bar_gib"] for g in known}))
        + " of a card's memory addressable"
    )
    if not small:
        return row("resizable bar", "ok", found)
    remedy = "it goes on: `Above 4G Decoding` and `Resizable BAR` in the BIOS, if it has them"
    return row("resizable bar", "warn", found, "the card's whole memory", remedy)


def iommu(case: Case) -> Row | None:
    """With ACS, what one card sends another goes up to the CPU and is translated. GeForce cards never send directly."""
    if case.without_gpu or len(case.usable_gpus) < 2:
        return None
    state = case.machine.get("iommu") or {}
    if not state.get("enabled") or not state.get("acs_separated"):
        return row("iommu", "ok", "on" if state.get("enabled") else "off")
    if all("GeForce" in str(g.get("name")) for g in case.usable_gpus):
        return row("iommu", "ok", "on, each card in a group of its own; GeForce cards have no P2P to lose")
    remedy = "it goes on: where no virtual machine needs it, switch IOMMU or ACS off in the BIOS"
    found = "on, each card in a group of its own: P2P between cards goes through the CPU"
    return row("iommu", "warn", found, "off, for P2P between cards", remedy)


# --- the driver -----------------------------------------------------------------------------------------


def driver(case: Case) -> Row | None:
    """The driver that is there against the branch that torch's CUDA needs, and what becomes of it."""
    found, choice = case.machine.get("driver") or {}, case.chosen("driver")
    loaded, expected = case.loaded_driver, f"branch {case.branch} or newer"
    if case.without_gpu or (not case.gpus and not loaded):
        return None
    if case.machine.get("wsl2"):
        remedy = "install NVIDIA's newest driver in Windows"
        return judged(
            "driver", major(loaded) >= case.branch, f"{loaded or 'none'} of Windows", expected, remedy
        )
    if found.get("runfile"):
        what = f"{loaded or 'a driver'} that NVIDIA's .run installer put here"
        if major(loaded) >= case.branch and not case.new_driver:
            remedy = (
                "it goes on with that one; after a new kernel, run its installer again: apt does not know it"
            )
            return row("driver", "warn", what, "one of apt", remedy)
        remedy = (
            "`sudo nvidia-uninstall`, reboot, and provision again: apt's driver would overwrite half of it"
        )
        return row("driver", "fail", what, f"{expected} of apt, or none", remedy)
    held = _held_old_driver(case)
    if held:
        what = f"{held[0]} {case.machine['installed'][held[0]]} is installed and held"
        return row(
            "driver", "fail", what, expected, f"`sudo apt-mark unhold {' '.join(held)}`, then provision again"
        )
    if major(loaded) >= case.branch and not case.new_driver:
        if found.get("smi_error"):
            remedy = "kernel module and libraries disagree, or a card is lost: reboot, then `nvidia-smi`"
            return row("driver", "warn", f"{loaded} is loaded, but {found['smi_error']}", expected, remedy)
        return row("driver", "ok", f"{loaded} is loaded")
    return _driver_to_come(case, loaded, choice, expected)


def driver_sources(case: Case) -> Row | None:
    foreign = (case.machine.get("driver") or {}).get("foreign_sources") or []
    if (
        case.without_gpu
        or not foreign
        or not (case.new_driver or case.chosen("driver").get("source") == "installed")
    ):
        return None
    remedy = "it goes on; apt may take the driver from there: " + " and ".join(
        f"`sudo mv {f} {f}.off`" for f in foreign
    )
    return row(
        "driver sources",
        "warn",
        f"NVIDIA drivers come from {', '.join(foreign)} too",
        "one source of drivers",
        remedy,
    )


def driver_modules(case: Case) -> Row | None:
    """Open or proprietary, against what the cards can be driven by."""
    modules = case.chosen("driver").get("modules")
    if case.without_gpu or not case.usable_gpus or not case.new_driver:
        return None
    if modules not in ("open", "proprietary"):
        return None
    verdict = {"open": "impossible", "proprietary": "needed"}[modules]
    wrong = [g for g in case.usable_gpus if g.get("open_modules") == verdict]
    other = "proprietary" if modules == "open" else "open"
    found = f"{modules} ones" + (f", which cannot drive {named(wrong)}" if wrong else "")
    remedy = f"`-e driver_modules={other}`; where cards need different ones, take one kind of card out"
    return judged("kernel modules", not wrong, found, f"{other} ones" if wrong else "", remedy)


def secure_boot(case: Case) -> Row | None:
    """Modules that DKMS builds are signed with a key of this machine, which its firmware must be told to trust."""
    state = case.machine.get("secure_boot") or "none"
    if state != "on":
        return row("secure boot", "ok", {"off": "off", "none": "not started by EFI"}.get(state, state))
    if not case.builds_modules or case.without_gpu:
        return row("secure boot", "ok", "on; no module is built here")
    found = "on, and the driver's modules will be built here"
    # DKMS makes the key when it builds its first module, so it cannot be enrolled before.
    key = "/var/lib/shim-signed/mok/MOK.der" if case.release_id == "ubuntu" else "/var/lib/dkms/mok.pub"
    enrol = (
        f"once they are built, `sudo mokutil --import {key}` asks for a new password, and at the next boot a blue "
        "screen asks: Enroll MOK, Continue, Yes, that password, Reboot"
    )
    if yes(case.settings.get("mok")):
        remedy = f"it goes on: {enrol}; until then the driver does not load"
        return row("secure boot", "warn", found, "off, or their key enrolled", remedy)
    ubuntu = (
        "; or Ubuntu's signed modules: `-e driver_source=distribution`" if case.release_id == "ubuntu" else ""
    )
    remedy = f"`-e checks_mok=true` if you sit at the machine: {enrol}{ubuntu}; or switch Secure Boot off in the BIOS"
    return row("secure boot", "fail", found, "off, or their key enrolled", remedy)


def nouveau(case: Case) -> Row | None:
    state = case.machine.get("nouveau") or {}
    bound = state.get("bound") or []
    if case.without_gpu or not (bound or state.get("loaded")):
        return None
    if not bound or not case.new_driver:
        return row(
            "nouveau", "ok", f"it drives {', '.join(bound)}" if bound else "loaded, but it drives no card"
        )
    found = f"it drives {', '.join(bound)}"
    if case.reboot == "no":
        remedy = "`-e reboot=yes` or `ask`: it is blacklisted, and gives the card away only at a reboot"
        return row("nouveau", "fail", f"{found}, and reboot=no", "NVIDIA's driver", remedy)
    return row(
        "nouveau", "warn", found, "NVIDIA's driver", "it goes on: nouveau is blacklisted; a reboot follows"
    )


def desktop(case: Case) -> Row | None:
    """It draws on the card that the firmware started with, and takes 0.3 to 1 GiB of it."""
    state = case.machine.get("desktop") or {}
    if not state.get("active"):
        return None
    name = state.get("manager") or "a desktop"
    drawn = [g for g in case.usable_gpus if g.get("boot_vga")]
    if case.without_gpu or not drawn or yes(case.settings.get("allow_desktop")):
        where = f" on {drawn[0]['address']}" if drawn else ", not on an NVIDIA card" if case.gpus else ""
        return row("desktop", "ok", f"{name}{where}")
    found = (
        f"{name} draws on {drawn[0]['name']} at {drawn[0]['address']} and takes 0.3 to 1 GiB of its memory"
    )
    remedy = (
        "it goes on: plug the monitor into the mainboard, or `sudo systemctl set-default multi-user.target`; "
        "`-e checks_allow_desktop=true` says that it is known"
    )
    return row("desktop", "warn", found, "no desktop on a card that trains", remedy)


# --- parts of checks ------------------------------------------------------------------------------------


def _no_gpu(case: Case, expected: str) -> Row:
    if case.gpus:
        found = f"{named(case.gpus)}, passed through to virtual machines (vfio-pci)"
        remedy = "provision the virtual machine, or take the cards out of vfio-pci (kernel command line, /etc/modprobe.d)"
        return row("gpu", "fail", found, expected, f"{remedy} and reboot; {WITHOUT_GPU}")
    if case.machine.get("wsl2"):
        found, remedy = "none that Windows shows", "install NVIDIA's driver in Windows, then `wsl --shutdown`"
    elif case.machine.get("amd_gpu"):
        found, remedy = "only AMD's, which the recipe cannot use", "use a machine with NVIDIA GPUs"
    else:
        found, remedy = "none on the PCI bus", "put one in; check its seat, its power cables and the BIOS"
    return row("gpu", "fail", found, expected, f"{remedy}; {WITHOUT_GPU}")


def _driver_to_come(case: Case, loaded: str | None, choice: dict, expected: str) -> Row:
    source, why = choice.get("source", "none"), choice.get("why") or "no source has it"
    there = f"{loaded} is loaded" if loaded else "none is loaded"
    if source != "installed" and not case.our_driver:
        return row(
            "driver",
            "fail",
            f"{there}, and none will be installed ({why})",
            expected,
            "`-e driver_source=auto`",
        )
    if not case.new_driver:
        return row(
            "driver",
            "warn",
            f"{there}; a newer one is installed",
            expected,
            f"it goes on: {_reboot_follows(case)}",
        )
    branch = whole(choice.get("branch")) or case.branch
    # NVIDIA's repositories do not have every branch.
    which = f"branch {branch}{' or the next' if source == 'nvidia' else ''}"
    to_come = f"{which} of {case.source_name(source)} to come"
    if branch < case.branch:
        return row("driver", "fail", f"{there}, {to_come}", expected, "`-e driver_source=nvidia`")
    if not loaded:
        return row("driver", "ok", f"{there}, {to_come}")
    return row("driver", "warn", f"{there}, {to_come}", expected, f"it goes on: {_reboot_follows(case)}")


def _reboot_follows(case: Case) -> str:
    return "a reboot is needed, and reboot=no leaves it to you" if case.reboot == "no" else "a reboot follows"


def _held_old_driver(case: Case) -> list[str]:
    """Packages of an older driver that apt may not touch, where a new one is to come. Those that this play holds are new."""
    packages = case.machine.get("installed") or {}
    held = [
        name for name in case.machine.get("held") or [] if DRIVER_PACKAGE.match(name) and name in packages
    ]
    return [name for name in held if case.new_driver and 0 < major(packages[name]) < case.branch]


def _one_is_enough(plan: dict) -> bool:
    """Whether the plan is for one card and keeps every layer on it."""
    placement = plan.get("placement") or {}
    on_card = placement.get("offload_layers") == 0 and placement.get("away_layers") == 0
    return plan.get("device") == "gpu" and plan.get("world_size") == 1 and bool(plan.get("fits")) and on_card


def _tokens_per_second(plan: dict) -> float | None:
    return decimal((plan.get("duration") or {}).get("tokens_per_second"))


def named(gpus: list[dict]) -> str:
    """2 × NVIDIA GeForce RTX 3090, NVIDIA RTX A6000"""
    names: dict[str, int] = {}
    for each in gpus:
        names[str(each.get("name"))] = names.get(str(each.get("name")), 0) + 1
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in names.items())


GPUS: list[Check] = [gpu, gpu_generation, gpu_memory, gpu_link, resizable_bar, iommu]
DRIVER: list[Check] = [secure_boot, driver, driver_sources, driver_modules, nouveau, desktop]
