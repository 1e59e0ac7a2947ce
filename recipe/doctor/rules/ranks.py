"""Ranks that died, hang or never met, and the ways that join them."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.rules.memory import SIGKILL
from recipe.doctor.scan import Line, Mark

UNRESOLVED = (
    "Name or service not known",
    "Temporary failure in name resolution",
    "No address associated with hostname",
    "nodename nor servname provided",
)
WATCHDOG = (
    "Watchdog caught collective operation timeout",
    "heartbeat monitor timed out",
    "Timed out waiting 1800000ms for recv",
    Mark("Timed out waiting", r"Timed out waiting \d+ms for (recv|send)"),
)
GEFORCE = Mark("GeForce", r"GeForce RTX [345]0\d\d|RTX 4090|RTX 3090|RTX 5090")
NCCL_FAILED = (
    "unhandled system error",
    "unhandled cuda error",
    "ncclSystemError",
    "ncclUnhandledCudaError",
    "ncclInternalError",
    "internal error - please report this issue to the NCCL developers",
)
NCCL_WARNS = "NCCL WARN "
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "ncclRemoteError",
    "remote process exited or there was a network error",
    "Broken pipe",
    "Socket closed",
)


def go_on(case: Case) -> str:
    if case.is_run:
        return f"`{case.again}` goes on from the last checkpoint; see `dmesg -T | tail` for why"
    return "see `dmesg -T | tail`, then start again from the last checkpoint"


def _nccl_failed(case: Case) -> list[Line]:
    """Its errors, and what it had warned of before them: warnings alone stand in logs of runs that go well."""
    failed = [line for mark in NCCL_FAILED for line in case.found(mark)]
    return failed and [failed[0], *case.found(NCCL_WARNS)[:2], *failed[1:]]


def _geforce(case: Case) -> list[Line]:
    cards = [name for name in case.manifest.get("gpus") or [] if re.search("RTX|GeForce", name)]
    stuck = [line for mark in WATCHDOG for line in case.found(mark)]
    seen = case.found(GEFORCE)
    if not stuck or not (seen or len(cards) > 1) or case.found("NCCL_P2P_DISABLE set by environment to 1"):
        return []
    return [stuck[0], *seen[:1]]


def _not_resolved(case: Case) -> list[Line]:
    """In a log that failed, or that has ended with it: healthy ranks see it now and then, and try IPv4."""
    lines = [line for mark in UNRESOLVED for line in case.found(mark)]
    if case.state == "failed" and not case.metrics:
        fatal = [line for line in lines if "[W" not in line.text[:4]] or (lines if _timed_out(case) else [])
        return fatal
    last = case.end[-1].text if case.end else ""
    waits = case.state == "open" and any(mark in last for mark in UNRESOLVED)
    return lines if waits else []


def _timed_out(case: Case) -> bool:
    return any(case.found(mark) for mark in NEVER_MET)


NEVER_MET = (
    "RendezvousTimeoutError",
    "RendezvousConnectionError",
    Mark("Timed out after", r"Timed out after \d+ seconds waiting for clients"),
    "The client socket has timed out after",
    "The client socket has failed to connect to any network address",
    Mark("wait timeout after", r"wait timeout after \d+ms"),
)


def _left_early(case: Case) -> list[Line]:
    """Ranks complain of a lost peer, and the launcher saw nobody fail but them."""
    lost = [line for mark in LOST for line in case.found(mark)]
    # One of ours that has lost its peers is known by the launcher's exit code, as others are.
    ended = case.found(ENDED_BY_SIGNAL)
    return [] if ended or not lost else lost[:2]


ENDED_BY_SIGNAL = Mark("exitcode: -", r"failed \(exitcode: -\d+\)")

RULES = (
    Rule(
        "rank_killed",
        "A rank was killed (SIGKILL)",
        "Nothing in the program does that: mostly the kernel where RAM ran out, else a person, a job's time limit or a "
        "container's end.",
        go_on,
        marks=SIGKILL,
        certainty="likely",
        over=("rank_died", "no_end", "nccl_error"),
        general_remedy="`dmesg -T | tail` says whether RAM ran out; the same RUN= goes on from the last checkpoint",
    ),
    Rule(
        "rank_crashed",
        "A rank crashed outside of Python",
        "A signal such as SIGSEGV or SIGABRT comes from compiled code: an extension built for another torch, a driver, or "
        "bad memory.",
        "run it with PYTHONFAULTHANDLER=1 to see where; install the packages of the lock again (`make setup`)",
        marks=(
            Mark("exitcode: -", r"failed \(exitcode: -(4|6|7|8|11)\)"),
            "(SIGSEGV)",
            "(SIGABRT)",
            "(SIGILL)",
            Mark("Segmentation fault", r"(?<!\w)Segmentation fault"),
            Mark("was killed by SIG", r"was killed by SIG(SEGV|ABRT|ILL|BUS|FPE)"),
        ),
        certainty="likely",
        over=("rank_died",),
    ),
    Rule(
        "rank_terminated",
        "The run was ended from outside (SIGTERM or SIGHUP)",
        "A scheduler, a shutdown or a closed terminal told the launcher to stop.",
        "start it in tmux or as a service (`make provision` can make runs go on after a reboot)",
        marks=(
            "torch.distributed.elastic.multiprocessing.api.SignalException",
            Mark("got signal", r"Process \d+ got signal: \d+"),
        ),
        certainty="likely",
        over=("rank_died",),
    ),
    Rule(
        "rank_died",
        "A rank has died",
        "The others wait for it or lose their connection to it.",
        go_on,
        causes=("rank_died",),
        kind="symptom",
        general_remedy="see `dmesg -T | tail`; the same RUN= goes on from the last checkpoint",
    ),
    Rule(
        "rank_stopped",
        "A rank was stopped (SIGSTOP) while the others waited",
        "A debugger, a frozen container (docker pause, the freezer) or Ctrl-Z holds it; no collective ends then.",
        go_on,
        marks=(Mark("was stopped (SIGSTOP)", r"rank \d+ .*was stopped \(SIGSTOP\)"),),
        causes=("rank_stopped",),
        over=("rank_killed", "rank_died", "rank_hung"),
        general_remedy="`ps -o pid,stat` (T: stopped); `kill -CONT PID`, or end what holds it, then the same RUN=",
    ),
    Rule(
        "rank_behind",
        "A rank is at another step than the others",
        "Ranks that do not run the same collectives wait for each other for ever.",
        go_on,
        causes=("rank_behind",),
        general_remedy="give all ranks the same number of batches; the same RUN= goes on from the last checkpoint",
    ),
    Rule(
        "p2p_hang",
        "NCCL hangs on GeForce cards over P2P",
        "RTX 40 cards report peer access that their driver does not carry out; every collective waits (nccl-tests issue 117).",
        "set NCCL_P2P_DISABLE=1 (`make preflight` writes it to host.env where it is needed), and update the driver",
        find=_geforce,
        reads=(GEFORCE, "NCCL_P2P_DISABLE set by environment to 1"),
        certainty="likely",
        when="unfinished",
        over=("collective_timeout", "rank_hung", "rank_crashed"),
    ),
    Rule(
        "collective_timeout",
        "A collective has timed out",
        "One rank did not come: it hangs, computes something else, or the link between the GPUs does not work.",
        "find the rank whose last collective differs in the lines shown (`py-spy dump --pid`); test the link with `make "
        "preflight`; NCCL_DEBUG=INFO says which way was chosen; on GeForce cards try NCCL_P2P_DISABLE=1",
        marks=WATCHDOG,
        certainty="likely",
        kind="symptom",
        when="unfinished",
        over=("rank_crashed",),  # NCCL's watchdog ends the process by SIGABRT
    ),
    Rule(
        "rank_hung",
        "A rank hangs",
        "It lives and does nothing that the others could see.",
        "`py-spy dump --pid PID` shows where; the same RUN= goes on from the last checkpoint",
        causes=("rank_hung",),
        kind="symptom",
    ),
    Rule(
        "collectives_differ",
        "Ranks called different collectives",
        "A branch that only some ranks take (a shorter data set, `if rank == 0`) holds a collective.",
        "call it on all ranks; TORCH_DISTRIBUTED_DEBUG=DETAIL names the first one that differs",
        marks=(
            "Detected mismatch between collectives on ranks",
            "Mismatch between collective operation types",
        ),
    ),
    Rule(
        "nccl_versions_differ",
        "NCCL, CUDA and the driver do not fit each other",
        "Another NCCL than torch's own was loaded, or the hosts have different ones (the article: mismatch of versions).",
        "unset LD_LIBRARY_PATH and LD_PRELOAD, remove the system's libnccl2, `pip check`; the same image or lock on all hosts; "
        "reboot after a driver update",
        marks=(
            Mark("nccl", r"undefined symbol: nccl\w+"),
            "NCCL version mismatch",
            "ismatched NCCL version",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library",
            "Driver/library version mismatch",
        ),
        over=("nccl_error", "version_mismatch"),
    ),
    Rule(
        "nccl_error",
        "NCCL failed",
        "A system call, a device or a link failed below NCCL; its next line says which (the article: driver, CUDA or NCCL "
        "mismatch, or the environment).",
        "run again with NCCL_DEBUG=INFO and read the first WARN; set NCCL_SOCKET_IFNAME to the interface that joins the "
        "hosts; the same versions everywhere; reboot after a driver update",
        find=_nccl_failed,
        reads=(*NCCL_FAILED, NCCL_WARNS),
        certainty="likely",
    ),
    Rule(
        "port_in_use",
        "The port of the rendezvous is in use",
        "Another run, or what an earlier one has left, listens on MASTER_PORT (29500 where none is set).",
        "`ss -ltnp | grep PORT`, end it, or use --standalone, or another --master_port (accelerate: --main_process_port 0)",
        marks=("EADDRINUSE", "[Errno 98]", Mark("ddress already in use", r"[Aa]ddress already in use")),
    ),
    Rule(
        "host_not_resolved",
        "A host's name cannot be resolved",
        "The rendezvous asks for a name that the resolver does not know; containers without network know not even their own.",
        "use an IP address as MASTER_ADDR, or add the name to /etc/hosts; on one host --standalone --local-addr localhost",
        find=_not_resolved,
        reads=UNRESOLVED,
        when="unfinished",
        over=("never_met", "peer_lost", "hub_unreachable"),
    ),
    Rule(
        "never_met",
        "The ranks did not find each other",
        "A node or rank did not start, listens elsewhere, or a firewall drops its packets.",
        "start all nodes with the same MASTER_ADDR, port and number of nodes; `nc -zv ADDRESS PORT` from each; look at the log "
        "of the node that is missing",
        marks=NEVER_MET,
        certainty="likely",
    ),
    Rule(
        "rank_left_early",
        "A rank ended before the others were done",
        "The others lost their peer while no process failed before them: it had fewer batches, or left on a condition of "
        "its own (see what it printed last).",
        "give all ranks the same number of batches (drop_last, Join), and end all ranks together; in several hosts' runs, look "
        "at the other hosts' logs first",
        find=_left_early,
        reads=(ENDED_BY_SIGNAL,),
        certainty="possible",
        kind="symptom",
        over=("peer_lost",),
    ),
    Rule(
        "peer_lost",
        "The connection to another rank was lost",
        "A consequence: the rank at the other end had failed before.",
        "look for the first rank that failed, in this log or in the other hosts'",
        marks=LOST,
        certainty="possible",
        kind="consequence",
    ),
)
