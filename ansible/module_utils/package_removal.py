"""Takes away what `packages` added, and nothing else: what another package has come to need stays, with the reason."""

from __future__ import annotations

from collections.abc import Iterable

from ansible.module_utils.apt_failures import listed
from ansible.module_utils.apt_tools import (
    APT_GET,
    AptError,
    Package,
    Plan,
    auto_installed,
    database,
    relations,
    simulate,
)
from ansible.module_utils.package_record import Job, Record, settle


def take_away(job: Job, names: list[str] | None) -> tuple[list[str], list[str]]:
    """Purges these of the record, or all. Returns what that means, line by line, and a line for each that stays."""
    if job.record == Record() or names == []:
        return [], []
    if not job.check:
        settle(job)
    packages = database()
    wanted = [name for name in job.record.added if names is None or name in names]
    ours = [name for name in wanted if name in packages and packages[name].status != "n"]
    kept, plan = choose(ours, packages, job.record)
    if not job.check:
        going = [name for name in ours if name not in kept]
        # apt forgets what it took for automatic before dpkg begins. Were we killed then, all of it would look like what
        # somebody has asked for.
        job.record.manual += [name for name in going if name not in job.record.manual]
        job.save()
        purge(job, going, packages)
        if names is None:
            forget_all(job, kept)
        else:
            forget(job, {name for name in wanted if name not in kept})
    return plan.lines(), [f"{name} stays: {reason}" for name, reason in kept.items()]


def choose(ours: list[str], packages: dict[str, Package], record: Record) -> tuple[dict[str, str], Plan]:
    """Which of ours have to stay and why, and what apt would do to purge the rest. AptError: more than that."""
    kept, auto = {}, auto_installed()
    for name in ours:
        if packages[name].essential:
            kept[name] = "the system cannot be without it"
        elif packages[name].exists and name not in auto and name not in record.manual:
            kept[name] = "somebody has asked for it since (apt-mark showmanual)"
    while going := [name for name in ours if name not in kept]:
        plan = simulate(["purge", *going], going)
        more = [name for name in (*plan.gone, *plan.new, *plan.other) if name not in going]
        if not more:
            return kept, plan
        # Relations have versions, which needed() does not read: for these, what else has the name will not do.
        further = needed(packages, going, strict=more)
        if not further:
            raise AptError(
                f"the removal of {listed(going)} would change {listed(more)}, which this recipe did not bring; remove "
                "those yourself if you do not need them, then run the play again; nothing was changed"
            )
        kept |= further
    return kept, Plan({}, {}, {}, [])


def needed(packages: dict[str, Package], ours: list[str], strict: Iterable[str] = ()) -> dict[str, str]:
    """Which of ours another package depends on, directly or through others of ours: {name: reason}.

    A dependency that one of another's packages can satisfy keeps none of ours, unless its package is in `strict`.
    """
    providers: dict[str, set[str]] = {}
    for name, package in packages.items():
        if package.exists:
            for group in [[name.split(":")[0]], *relations(package.provides)]:
                providers.setdefault(group[0], set()).add(name)
    going, kept = set(ours), {}
    queue = [name for name, package in packages.items() if package.exists and name not in going]
    while queue:
        needer = queue.pop()
        for group in relations(packages[needer].depends):
            able = {name for one in group for name in providers.get(one, ())}
            if able - going and needer not in strict:
                continue
            for name in sorted(able & going):
                going.remove(name)
                kept[name] = f"{needer} needs it"
                queue.append(name)
    return kept


def purge(job: Job, names: list[str], packages: dict[str, Package]) -> None:
    release(job, [name for name in job.record.holds if name in names])
    # Settings that were there before us are not ours to delete.
    without = [name for name in names if name in job.record.settings_before]
    remove = [name for name in without if packages[name].exists]
    if remove:
        job.call([*APT_GET, "-y", "remove", *remove], remove)
    rest = [name for name in names if name not in without]
    if rest:
        job.call([*APT_GET, "-y", "purge", *rest], rest)


def release(job: Job, names: list[str]) -> None:
    packages = database()
    held = [name for name in names if name in packages and packages[name].held]
    if held:
        job.call(["apt-mark", "unhold", *held], held)


def forget(job: Job, names: set[str]) -> None:
    record = job.record
    record.added = [name for name in record.added if name not in names]
    record.manual = [name for name in record.manual if name not in names]
    record.settings_before = [name for name in record.settings_before if name not in names]
    record.holds = [name for name in record.holds if name not in names]
    job.save()


def forget_all(job: Job, kept: dict[str, str]) -> None:
    """An empty record; holds and marks are as they were before us."""
    release(job, job.record.holds)
    packages, marked = database(), auto_installed()
    # What stays for another package stays as its dependency.
    names = [*job.record.marks, *(name for name, reason in kept.items() if reason.endswith(" needs it"))]
    names = [name for name in names if name in packages and packages[name].exists and name not in marked]
    if names:
        job.call(["apt-mark", "auto", *names], names)
    job.record = Record()
    job.save()
