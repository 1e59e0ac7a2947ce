"""Checks of what only the host sees of itself: kernel log, swap devices, limits, services, Docker, clock, NUMA.

Their facts come from recipe/probe.py; where the host handed none in, or does not tell, a check skips and says why.
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from recipe.container import in_container
from recipe.preflight.check import Check, Context, judged, told
from recipe.preflight.disks import existing
from recipe.preflight.host import needs_nccl

# The first engine with CDI switched on, as compose.yaml asks for GPUs.
OLDEST_ENGINE = 25
# vm.overcommit_memory: 2 refuses what might not fit, and CUDA reserves far more addresses than it uses.
STRICT_OVERCOMMIT = 2


def swap_kind(context: Context) -> Check:
    """zram lies in the RAM that is short; a swap file or partition does not."""
    devices, why = told(context, "swap")
    expected = "a swap file or partition, if any"
    if devices is None:
        return Check("swap kind", "skip", why, expected)
    if not devices:
        return Check("swap kind", "ok", "no swap", expected)
    found = ", ".join(f"{d['kind']} of {d['gib']:.1f} GiB" for d in devices)
    good = any(device["kind"] != "zram" for device in devices) or not context.plan.placement.offload_layers
    remedy = "add a swap file: zram compresses into the very RAM that offloaded layers need, and NF4 does not compress"
    return judged("swap kind", good, found, expected, remedy, "warn")


def memlock(context: Context) -> Check:
    """Pinned memory: offloaded layers and activations. CUDA pins through its driver, NCCL and others ask the limit."""
    limits, why = told(context, "limits")
    expected = "unlimited, or as much as the plan keeps in host RAM"
    if not context.on_gpu:
        return Check("memlock", "skip", "nothing is pinned in a run on CPUs", expected)
    if in_container():
        # compose.yaml sets the container's own, which is the one that counts.
        found = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        limit = None if found == resource.RLIM_INFINITY else found
    elif limits is None:
        return Check("memlock", "skip", why, expected)
    else:
        limit = limits["memlock_bytes"]
    if limit is None:
        return Check("memlock", "ok", "unlimited", expected)
    needed = context.plan.host_gib if context.plan.placement.offload_layers else 0.0
    remedy = "set `* - memlock unlimited` in /etc/security/limits.d/, log in again; in a container --ulimit memlock=-1"
    gib = limit / 2**30
    return judged("memlock", gib >= needed, f"{gib:.2f} GiB", expected, remedy, "warn", gib, "GiB")


def overcommit(context: Context) -> Check:
    """Whether the kernel refuses memory that is only reserved: CUDA reserves far more than it uses."""
    limits, why = told(context, "limits")
    expected = "vm.overcommit_memory 0 or 1"
    if limits is None or limits["overcommit"] is None:
        return Check("overcommit", "skip", why or "the kernel does not tell", expected)
    mode = limits["overcommit"]
    remedy = "`sudo sysctl vm.overcommit_memory=0`: with 2, CUDA's reservations fail while RAM is free"
    return judged("overcommit", mode != STRICT_OVERCOMMIT, str(mode), expected, remedy, "fail", mode)


def kernel_log(context: Context) -> Check:
    """The OOM killer, machine checks and PCIe errors since the boot; the GPU's own are `xid`'s."""
    lines, why = told(context, "kernel_log")
    expected = "no OOM killer, machine check or PCIe error since the boot"
    if lines is None:
        return Check("kernel log", "skip", why, expected)
    bad = [line for line in lines if line["kind"] in ("oom", "mce", "aer")]
    if not bad:
        return Check("kernel log", "ok", "quiet", expected, measured=0, unit="lines")
    remedies = {
        "oom": "RAM ran out: `make plan`, then add RAM or swap, or close what grew",
        "mce": "the CPU or RAM reports errors: run memtest86+, drop memory overclocking",
        "aer": "the PCIe link errs: reseat the card and its riser, or set an older PCIe generation in the BIOS",
    }
    last = bad[-1]
    found = f"{len(bad)} lines, the last: {last['text'][:120]}"
    return Check("kernel log", "warn", found, expected, remedies[last["kind"]], len(bad), "lines")


def services(context: Context) -> Check:
    """The persistence daemon keeps the driver loaded; early OOM killers end a run that still has swap to go."""
    units, why = told(context, "units")
    expected = "nvidia-persistenced active, nothing of ours failed"
    if units is None:
        return Check("services", "skip", why, expected)
    states, failed = units["states"], units["failed"]
    ours = [name for name in failed if re.match(r"nvidia|docker|containerd|recipe", name)]
    if ours:
        remedy = f"`systemctl status {ours[0]}` says why; `sudo systemctl restart {ours[0]}`"
        return Check("services", "warn", f"failed: {', '.join(ours)}", expected, remedy)
    killers = [name for name in ("earlyoom", "systemd-oomd") if states.get(name) == "active"]
    if killers and context.plan.placement.offload_layers:
        remedy = (
            f"`sudo systemctl stop {killers[0]}` while training: it ends the largest program when RAM is thin"
        )
        return Check("services", "warn", f"{', '.join(killers)} active", expected, remedy)
    persistent = states.get("nvidia-persistenced")
    if context.machine.gpus and persistent not in ("active", None):
        remedy = "`sudo systemctl enable --now nvidia-persistenced`: without it the driver unloads between programs"
        return Check("services", "warn", f"nvidia-persistenced is {persistent}", expected, remedy)
    active = sorted(name for name, state in states.items() if state == "active")
    return Check("services", "ok", f"active: {', '.join(active) or 'none of ours'}", expected)


def docker(context: Context) -> Check:
    """Needed for RUNTIME=docker only: without it the recipe runs in .venv."""
    found, why = told(context, "docker")
    expected = f"Docker {OLDEST_ENGINE} or newer" + (
        " and NVIDIA's toolkit, or none" if context.on_gpu else ", or none"
    )
    if found is None:
        return Check("docker", "skip", f"{why}; RUNTIME=host does without", expected)
    if not found["engine"]:
        remedy = "start it (`sudo systemctl start docker`), join the group docker, or use RUNTIME=host"
        return Check("docker", "warn", found["why"] or "the engine does not answer", expected, remedy)
    words = f"engine {found['engine']}, toolkit {found['toolkit'] or 'missing'}"
    number = re.match(r"\d+", found["engine"])
    if not number or int(number[0]) < OLDEST_ENGINE:
        return Check("docker", "warn", words, expected, "`make provision` brings one, or use RUNTIME=host")
    good = bool(found["toolkit"]) or not context.on_gpu
    remedy = "install nvidia-container-toolkit (`make provision`), or use RUNTIME=host"
    return judged("docker", good, words, expected, remedy, "warn")


def user(context: Context) -> Check:
    """Files of a run belong to who started it: root's would be in the way of everybody later."""
    paths = context.settings.paths
    places = [existing(Path(folder)) for folder in (paths.models, paths.runs)]
    closed = [str(place) for place in places if not os.access(place, os.W_OK)]
    host, _ = told(context, "user")
    groups = f", groups {', '.join(host['groups'])} on the host" if host and host["groups"] else ""
    remedy = (
        f"`sudo chown -R $USER {closed[0]}`, or point paths.models and paths.runs elsewhere" if closed else ""
    )
    found = (
        f"{closed[0]} may not be written by user {os.getuid()}" if closed else f"user {os.getuid()}{groups}"
    )
    return judged("user", not closed, found, "may write paths.models and paths.runs", remedy)


def clock(context: Context) -> Check:
    """A wrong clock breaks certificates, and the order of checkpoints and logs."""
    synchronised, why = told(context, "clock")
    expected = "synchronised"
    if synchronised is None:
        return Check("clock", "skip", why, expected)
    found = "synchronised" if synchronised else "not synchronised"
    return judged("clock", synchronised, found, expected, "`sudo timedatectl set-ntp true`", "warn")


def numa(context: Context) -> Check:
    """GPUs on two nodes meet over the link between the CPUs, and each rank's pinned memory should be near its card."""
    paths, why = told(context, "gpu_paths")
    expected = "all GPUs on one node"
    if not context.on_gpu:
        return Check("numa", "skip", "no GPU in this run", expected)
    if paths is None:
        return Check("numa", "skip", why, expected)
    nodes = sorted({path["numa_node"] for path in paths if path["numa_node"] is not None})
    if not nodes:
        return Check("numa", "ok", "the board has one node", expected)
    remedy = "it runs, slower: move the cards to slots of one CPU, or set CUDA_VISIBLE_DEVICES to those of one node"
    found = f"GPUs on node{'' if len(nodes) == 1 else 's'} {', '.join(map(str, nodes))}"
    good = len(nodes) == 1 or not needs_nccl(context.plan)
    return judged("numa", good, found, expected, remedy, "warn", len(nodes), "nodes")


CHECKS = [swap_kind, memlock, overcommit, numa, kernel_log, services, docker, user, clock]
