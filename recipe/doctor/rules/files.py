"""Disks, permissions, checkpoints, and requests that do not fit what lies there."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Line, Mark

OTHER_SETTINGS = "was begun with other settings"
DENIED = (
    Mark("Permission denied", r"(PermissionError|\[Errno 13\]|[Pp]ermission denied)"),
    Mark("permission denied", r"permission denied"),
    Mark(
        "Operation not permitted", r"PermissionError|\[Errno 1\]"
    ),  # libnuma in a container says it of nothing that matters
)


def same_settings(case: Case) -> str:
    for line in case.found(OTHER_SETTINGS):
        if named := re.search(r"(CONFIG=\S+)", line.text):
            return f"`make train {named[1]}` goes on with the run's own settings; another RUN= begins anew"
    return "the run's own config.yaml as CONFIG= goes on with it; another RUN= begins anew"


def _unsaved(case: Case) -> list[Line]:
    """Saves that failed; those after which another one has succeeded are over."""
    kinds = [event.kind for event in case.events]
    over = len(kinds) - kinds[::-1].index("checkpoint") if "checkpoint" in kinds else 0
    return [event.line for event in case.events[over:] if event.cause == "save_failed"]


RULES = (
    Rule(
        "disk_full",
        "The disk is full",
        "No byte more could be written, or a limit (a quota, ulimit -f) was reached.",
        "`df -h` and `df -i`; delete what is not needed, or another disk with --set paths.runs= / paths.models= (and HF_HOME, "
        "TMPDIR); a run goes on by the same RUN=",
        marks=(
            "No space left on device",
            "[Errno 28]",
            "Disk quota exceeded",
            "[Errno 27] File too large",
            "File too large",
            "(SIGXFSZ)",
            Mark("GiB free, expected", r"GiB free, expected [\d.]+ GiB for"),
            "unexpected pos",
            "file write failed",
            "PytorchStreamWriter failed writing file",
        ),
        over=("request", "permission_denied", "rank_died", "save_failed"),
    ),
    Rule(
        "read_only",
        "The file system may only be read",
        "It is mounted so, or the kernel did that after an error of the disk.",
        "write to another folder (--set paths.runs=); `dmesg | grep -i remount` tells of a disk that fails",
        marks=("Read-only file system", "[Errno 30]"),
        certainty="likely",
        over=("permission_denied", "save_failed"),
    ),
    Rule(
        "permission_denied",
        "A file or folder may not be written or read",
        "It belongs to another user, often root from an earlier container, or has not the rights.",
        "`ls -ld` it, then `sudo chown -R $(id -u):$(id -g) runs models`, or another folder with --set paths.runs=",
        marks=DENIED,
        certainty="likely",
        over=("request", "missing_file", "save_failed"),
    ),
    Rule(
        "too_many_open_files",
        "Too many files are open",
        "The limit of a process (`ulimit -n`) is lower than its shards, workers and connections need.",
        "`ulimit -n 65536` before the start (LimitNOFILE= of a service, --ulimit nofile= of a container)",
        marks=("Too many open files", "[Errno 24]", "received 0 items of ancdata"),
        over=("permission_denied",),
    ),
    Rule(
        "too_many_processes",
        "No more processes or threads may be started",
        "The limit of the user or the container (`ulimit -u`, pids) is reached.",
        "OMP_NUM_THREADS=1, fewer workers, a higher --pids-limit or `ulimit -u`",
        marks=("can't start new thread", "Resource temporarily unavailable", "pthread_create failed"),
        certainty="likely",
    ),
    Rule(
        "save_failed",
        "A checkpoint could not be written",
        "The disk of the run has refused it, and the line has its word for why. The checkpoint before is untouched.",
        lambda case: (
            "see to that disk (`df -h`, `ls -ld`, `dmesg | tail`), or copy the run to another one; then "
            f"{case.again} goes on from the checkpoint before"
        ),
        find=_unsaved,
        kind="symptom",
        when="unfinished",
        general_remedy="see to that disk (`df -h`, `ls -ld`, `dmesg | tail`), or copy the run to another one; the same RUN= goes "
        "on from the checkpoint before",
    ),
    Rule(
        "checkpoint_damaged",
        "A checkpoint or weight file is damaged",
        "It was cut while it was written or copied, or the disk has changed it: its header, size or hash is wrong.",
        "nothing for a run of ours: the checkpoint before is used; else remove the file and fetch or copy it again, and compare "
        "hashes",
        marks=(
            "is missing or damaged",
            "has NaN or infinite values, expected finite weights",
            "Error while deserializing header",
            "incomplete metadata",
            "SafetensorError",
            "PytorchStreamReader failed",
            "the file is damaged, fetch or make it again",
            "invalid load key",
            "unpickling stack underflow",
        ),
        certainty="likely",
        over=("request",),
    ),
    Rule(
        "pickle_refused",
        "torch does not load this checkpoint's pickle",
        "From torch 2.6 on torch.load takes tensors only; a trainer's random states and arguments are Python objects.",
        "update transformers and accelerate; for a file of your own torch.load(..., weights_only=False)",
        marks=("Weights only load failed",),
        over=("checkpoint_damaged",),
    ),
    Rule(
        "settings_differ",
        "An unfinished run was to go on with other settings",
        "What was trained so far belongs to the settings that it was begun with.",
        same_settings,
        marks=(OTHER_SETTINGS,),
        over=("request",),
        general_remedy="CONFIG=runs/NAME/config.yaml goes on; another RUN= begins anew",
    ),
    Rule(
        "run_in_use",
        "Another process trains this run",
        "A run's folder has one writer.",
        "wait for it or stop it (`ps aux | grep recipe.train.worker`), or use another RUN=",
        marks=("another process trains this run now",),
        over=("request",),
    ),
    Rule(
        "run_finished",
        "The run is finished already",
        "A finished run is never trained over.",
        "another RUN= begins anew; `make export-adapters` and `make eval` use this one",
        marks=(Mark("is finished already", r"RUN=\S+: is finished already"),),
        over=("request",),
    ),
    Rule(
        "does_not_fit",
        "By the plan, the run does not fit this machine",
        "The sum of its parts is more than the GPUs or the RAM have; nothing was started.",
        "`make plan` names the biggest parts and the nearest sizes that fit",
        marks=("does not fit on this machine",),
        over=("request",),
    ),
    Rule(
        "missing_file",
        "A file is not there",
        "The path that the line names does not exist where the program runs (in a container: is it mounted?).",
        "see the path in the line; paths are relative to the folder where the program was started",
        marks=(Mark("No such file or directory", r"FileNotFoundError|\[Errno 2\]"), "no such config file"),
        certainty="likely",
        over=("request",),
    ),
)
