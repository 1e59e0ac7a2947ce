"""The record of what `packages` added to a machine, and apt-get called so that the record is right however it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ansible.module_utils.apt_failures import explain, listed
from ansible.module_utils.apt_tools import (
    APT_GET,
    AptError,
    Plan,
    auto_installed,
    await_locks,
    database,
    run,
    run_locked,
    simulate,
    write_whole,
)

INSTALL = (
    "-y",
    "--no-install-recommends",
    "-oDpkg::Options::=--force-confdef",
    "-oDpkg::Options::=--force-confold",
)


@dataclass
class Record:
    """The state file: what a machine has of us. All are names of packages."""

    added: list[str] = field(default_factory=list)
    # Of them, those that apt took for wanted after our installation: its dependencies in some sections are, too.
    manual: list[str] = field(default_factory=list)
    # Of them, those whose settings the machine had from before (dpkg's state "rc").
    settings_before: list[str] = field(default_factory=list)
    holds: list[str] = field(default_factory=list)
    # Not ours, but asked for by us: {"NAME": "auto"}, as apt-mark had them.
    marks: dict[str, str] = field(default_factory=dict)
    # Removed to make way.
    replaced: list[str] = field(default_factory=list)
    # A transaction that runs or was killed: before (what existed), requested, planned (what it adds), removals, and
    # holds of ours on what it changes, which apt drops then.
    pending: dict[str, list[str]] | None = None

    @classmethod
    def load(cls, path: Path) -> Record:
        record = cls()
        try:
            values = json.loads(path.read_text())
            for name, value in asdict(record).items():
                new = values.get(name, value)
                if not isinstance(new, (dict, type(None)) if name == "pending" else type(value)):
                    raise ValueError(f"{name} is a {type(new).__name__}")
                setattr(record, name, new)
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError) as error:
            raise AptError(
                f"{path}: not a record of packages ({error}); expected JSON with added, holds and pending; move it "
                "away, then what it lists stays installed"
            ) from None
        return record

    def save(self, path: Path) -> None:
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


@dataclass
class Job:
    """One call of the module."""

    record: Record
    file: Path
    check: bool
    lock_seconds: int
    cache_valid_seconds: int
    replaces: list[str]
    warnings: list[str] = field(default_factory=list)
    acted: bool = False

    def save(self) -> None:
        self.record.save(self.file)

    def call(self, command: Sequence[str], names: Iterable[str]) -> None:
        self.acted = True
        status, text = run_locked(command, self.lock_seconds)
        if status:
            raise AptError(explain(text, names), text)

    def hold(self, names: list[str]) -> None:
        if names:
            # Recorded first: to release what is not held does no harm, to forget what is would.
            self.record.holds += [name for name in names if name not in self.record.holds]
            self.save()
            self.call(["apt-mark", "hold", *names], names)


def allow(job: Job, plan: Plan, names: Iterable[str], removable: Iterable[str] = ()) -> list[str]:
    """Refuses what we must not do to the machine. Returns the options that the rest of the plan needs."""
    names = list(names)
    unwanted = [
        name
        for name in plan.gone
        if name not in removable
        and not any(fnmatchcase(name.split(":")[0], pattern) for pattern in job.replaces)
    ]
    if unwanted:
        expected = f"nothing but {listed(job.replaces)}" if job.replaces else "nothing"
        raise AptError(
            f"{listed(names)} would remove {listed(unwanted)}; expected to remove {expected}; remove it yourself if "
            "you do not need it, then run the play again; nothing was changed"
        )
    packages = database()
    held = [name for name in (*plan.other, *plan.gone) if name in packages and packages[name].held]
    foreign = [name for name in held if name not in job.record.holds]
    if foreign:
        raise AptError(
            f"{listed(names)} would change {listed(foreign)}, which somebody has put on hold; expected it to be free; "
            f"`apt-mark unhold {' '.join(foreign)}` if you agree, then run the play again; nothing was changed"
        )
    return ["--allow-change-held-packages"] if held else []


def transaction(job: Job, words: Sequence[str], plan: Plan, requested: Iterable[str]) -> None:
    """apt-get for real, as planned. Whatever it adds gets into the record, also when it or we are killed."""
    packages, auto, record = database(), auto_installed(), job.record
    asked = [word.split("=")[0] for word in requested]
    if record.pending is None:
        there = sorted(name for name, package in packages.items() if package.exists)
        record.pending = {"before": there, "requested": [], "planned": [], "removals": [], "holds": []}
    record.pending["requested"] += asked
    record.pending["planned"] += plan.new
    record.pending["removals"] += plan.gone
    record.pending["holds"] += [name for name in plan.other if name in packages and packages[name].held]
    for name in plan.new:
        if name in packages and packages[name].status == "c" and name not in record.added:
            record.settings_before.append(name)
    for name in asked:  # `apt-get install NAME` makes it wanted for itself
        if name in packages and packages[name].exists and name in auto and name not in record.added:
            record.marks[name] = "auto"
    job.save()
    job.acted = True
    try:
        status, text = run_locked([*APT_GET, *words], job.lock_seconds)
    finally:
        holds = record.pending["holds"]
        note(job)
    rehold(job, holds)
    if status:
        raise AptError(explain(text, asked), text)


def note(job: Job, pending: bool = False) -> None:
    """Moves what the pending transaction has added so far into the record; pending: it is still to be completed."""
    record, packages, auto = job.record, database(), auto_installed()
    there = {name for name, package in packages.items() if package.exists}
    if record.pending:
        known = {*record.pending["before"], *record.added}
        fresh = [name for name in dict.fromkeys(record.pending["planned"]) if name in there - known]
        gone = [name for name in record.pending["removals"] if name not in there and name not in record.added]
        record.manual += [name for name in fresh if name not in auto]
        record.added += fresh
        record.replaced = sorted({*record.replaced, *gone})
    # What is wholly gone is ours no more: should it come again, somebody else has brought it.
    known = {name for name, package in packages.items() if package.status != "n"}
    record.added = [name for name in record.added if name in known]
    record.manual = [name for name in record.manual if name in record.added]
    record.settings_before = [name for name in dict.fromkeys(record.settings_before) if name in record.added]
    if not pending:
        record.pending = None
    job.save()


def rehold(job: Job, names: list[str]) -> None:
    packages = database()
    job.hold(
        [name for name in names if name in packages and packages[name].installed and not packages[name].held]
    )


def settle(job: Job) -> None:
    """Completes what a killed play, or anybody's interrupted dpkg, left half done."""
    await_locks(job.lock_seconds)  # what is half done may be what another apt is doing
    if job.record.pending:
        note(job, pending=True)
    journal = Path("/var/lib/dpkg/updates")
    if run(["dpkg", "--audit"])[1].strip() or (journal.is_dir() and any(journal.iterdir())):
        job.acted = True
        # May fail for want of another package, which the next step brings; or again there, with its reason.
        run_locked(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], job.lock_seconds)
    repair, about = ["--no-install-recommends", "-f", "install"], ["the repair of what is half installed"]
    plan = simulate(repair, about)
    if plan:
        # What of ours is half removed, by a removal that was cut off, apt removes wholly.
        flags = allow(job, plan, about, removable=job.record.added)
        transaction(job, [*INSTALL, *flags, *repair], plan, [])
    elif job.record.pending:
        holds = job.record.pending["holds"]
        note(job)
        rehold(job, holds)
