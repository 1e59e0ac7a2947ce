"""Ansible module: packages by apt, with a record of what it added, so that exactly that can be taken away again.

    packages: {name: [mtools, "docker-compose-v2|docker-compose", "nvidia-driver=580.*"], hold: false}
    packages: {name: [docker-ce], replaces: [docker.io, "containerd*"]}    # these may be removed for it, nothing else
    packages: {name: [mtools], state: latest}
    packages: {name: [mtools], state: absent}           # only where this module brought it
    packages: {state: purge_added}                      # all that it brought

`a|b`: the one that is installed, else the first that apt can install. Also: lock_seconds (300: how long to wait for
another apt), cache_valid_seconds (86400: `apt-get update` only when the lists are older, or a name is not in them),
state_file (the record, package_record.py).

Returns added and removed (names), kept (a line for each package that was not taken away), replaced (those of the user
that made way since the record began), and versions in the diff. A failure is one line, with apt's last 40 in `log`.
Where everything is installed, apt is not called.

What sets it apart from ansible.builtin.apt: it needs no python3-apt, also not for --check; it records; and a play that
was killed in the middle of an installation is completed by the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ansible.module_utils.apt_failures import listed, no_candidate
from ansible.module_utils.apt_tools import (
    UPDATE,
    AptError,
    Known,
    LockError,
    Package,
    database,
    lists_age_seconds,
    policy,
    simulate,
)
from ansible.module_utils.package_record import INSTALL, Job, Record, allow, settle, transaction
from ansible.module_utils.package_removal import take_away


@dataclass(frozen=True)
class Wish:
    """`a=1.*|b`: (name, version pattern or "") of each alternative."""

    alternatives: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Wish:
        found = []
        for word in text.split("|"):
            parts = re.fullmatch(r"([a-z0-9][a-z0-9+.-]*[a-z0-9+.](?::[a-z0-9]+)?)(?:=(\S+))?", word.strip())
            if not parts:
                raise AptError(f"name: {text!r}; expected NAME, NAME=VERSION or A|B, as dpkg names packages")
            found.append((parts[1], parts[2] or ""))
        return cls(tuple(found))

    def __str__(self) -> str:
        return " or ".join(name for name, _ in self.alternatives)

    def there(self, packages: dict[str, Package]) -> list[str]:
        """The alternatives that are installed as wished."""
        return [
            name
            for name, version in self.alternatives
            if name in packages
            and packages[name].installed
            and fnmatchcase(packages[name].version, version or "*")
        ]

    def choice(self, known: dict[str, Known]) -> str | None:
        """NAME or NAME=VERSION of the first that apt can install."""
        for name, version in self.alternatives:
            if name in known and not version:
                return name
            for one in known[name].versions if name in known else ():
                if fnmatchcase(one, version):
                    return f"{name}={one}"
        return None


def present(
    job: Job, wishes: list[Wish], latest: bool, hold: bool, packages: dict[str, Package]
) -> list[str]:
    """Lines of what a check would change; what a real run has changed is seen in dpkg's database."""
    wanted = [wish for wish in wishes if latest or not wish.there(packages)]
    lines = []
    if job.check:
        if job.record.pending:
            lines.append("! an installation that was interrupted is completed")
        lines += preview(job, wanted, latest)
    elif wanted or job.record.pending:
        settle(job)
        packages = database()
        wanted = [wish for wish in wishes if latest or not wish.there(packages)]
        if wanted:
            install(job, wanted, latest)
            packages = database()
    if hold:
        names = [name for wish in wishes for name in wish.there(packages) if not packages[name].held]
        if job.check:
            lines += [f"! hold {name}" for name in names]
        else:
            job.hold(names)
    return lines


def known_to_apt(wishes: Iterable[Wish]) -> dict[str, Known]:
    return policy(name for wish in wishes for name, _ in wish.alternatives)


def arguments(wishes: list[Wish], known: dict[str, Known], latest: bool) -> list[str]:
    """What comes after `apt-get install`; nothing where all is up to date."""
    words = [word for wish in wishes if (word := wish.choice(known))]
    if latest:
        words = [
            word for word in words if word not in known or known[word].installed != known[word].candidate
        ]
    return words


def options(words: list[str]) -> list[str]:
    # Only who names a version can mean an older one.
    older = ["--allow-downgrades"] if any("=" in word for word in words) else []
    return ["--no-install-recommends", *older, "install", *words]


def preview(job: Job, wishes: list[Wish], latest: bool) -> list[str]:
    if not wishes:
        return []
    known = known_to_apt(wishes)
    lines = [f"+ {wish} (not known to apt yet)" for wish in wishes if not wish.choice(known)]
    words = arguments(wishes, known, latest)
    if words:
        plan = simulate(options(words), words)
        allow(job, plan, words)
        lines += plan.lines()
    return lines


def install(job: Job, wishes: list[Wish], latest: bool) -> None:
    names = [str(wish) for wish in wishes]
    known = known_to_apt(wishes)
    problem = None
    fresh = lists_age_seconds() <= job.cache_valid_seconds and all(wish.choice(known) for wish in wishes)
    if not fresh:
        problem = update(job, names)
        known = known_to_apt(wishes)
        for wish in wishes:
            if not wish.choice(known):
                raise AptError(unknown(wish, known, problem))
        if problem:  # of a source that is not needed for these
            job.warnings.append(f"apt-get update: {problem}")
    while words := arguments(wishes, known, latest):
        plan = simulate(options(words), names)
        if not plan:
            return
        flags = allow(job, plan, names)
        try:
            transaction(job, [*INSTALL, *flags, *options(words)], plan, words)
            return
        except AptError as error:
            # Newer versions may have taken the place of those in our lists.
            if not fresh or not re.search(r"Failed to fetch .* 404 ", error.text):
                raise
        fresh = False
        problem = update(job, names)
        if problem:
            raise AptError(problem)
        known = known_to_apt(wishes)


def update(job: Job, names: list[str]) -> str | None:
    """What went wrong, in a line; perhaps only with a source that we do not need."""
    try:
        job.call(UPDATE, names)
    except LockError:
        raise
    except AptError as error:
        return str(error)
    return None


def unknown(wish: Wish, known: dict[str, Known], problem: str | None) -> str:
    if problem and problem.startswith("apt cannot reach"):
        return problem
    name, version = wish.alternatives[0]
    line = no_candidate(str(wish))
    if name in known:
        line = f"{name}: no version {version} in apt's sources; they have {listed(known[name].versions)}"
    return f"{line}; apt-get update: {problem}" if problem else line


def difference(
    before: dict[str, Package], after: dict[str, Package]
) -> tuple[list[str], list[str], list[str]]:
    """Names that came, names that went, and all changes as lines."""
    old = {name: package for name, package in before.items() if package.exists}
    new = {name: package for name, package in after.items() if package.exists}
    added = sorted(new.keys() - old.keys())
    removed = sorted(old.keys() - new.keys())
    lines = [f"+ {name} {new[name].version}" for name in added]
    lines += [f"- {name} {old[name].version}" for name in removed]
    for name in sorted(new.keys() & old.keys()):
        if new[name].version != old[name].version:
            lines.append(f"~ {name} {old[name].version} -> {new[name].version}")
        elif new[name].status != old[name].status:
            lines.append(f"! {name} completed")
        if new[name].held != old[name].held:
            lines.append(f"! {'hold' if new[name].held else 'release'} {name}")
    gone = [name for name, package in before.items() if package.status == "c" and name not in after]
    return added, removed, lines + [f"- settings of {name}" for name in gone]


def work(module: AnsibleModule) -> dict:
    wanted, file = module.params, Path(module.params["state_file"])
    job = Job(
        Record.load(file),
        file,
        module.check_mode,
        wanted["lock_seconds"],
        wanted["cache_valid_seconds"],
        wanted["replaces"],
    )
    wishes = [Wish.parse(text) for text in wanted["name"]]
    replaced = job.record.replaced
    before = database()
    kept: list[str] = []
    if wanted["state"] in ("present", "latest"):
        lines = present(job, wishes, wanted["state"] == "latest", wanted["hold"], before)
        replaced = job.record.replaced
    elif wanted["state"] == "purge_added":
        lines, kept = take_away(job, None)
    else:
        names = [name for wish in wishes for name, _ in wish.alternatives]
        ours = [name for name in names if name in job.record.added]
        lines, kept = take_away(job, ours)
        others = [name for name in names if name not in ours and name in before and before[name].exists]
        kept += [f"{name} stays: this recipe did not bring it" for name in others]
    for warning in job.warnings:
        module.warn(warning)
    added: list[str] = []
    removed: list[str] = []
    after = database() if job.acted else before
    if not job.check:
        added, removed, lines = difference(before, after)
    return {
        "changed": bool(lines),
        "added": added,
        "removed": removed,
        "kept": kept,
        "replaced": [name for name in replaced if name not in after or not after[name].exists],
        "diff": {"before": "", "after": "".join(f"{line}\n" for line in lines)},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "default": []},
            "state": {
                "type": "str",
                "choices": ["present", "latest", "absent", "purge_added"],
                "default": "present",
            },
            "hold": {"type": "bool", "default": False},
            "replaces": {"type": "list", "elements": "str", "default": []},
            "lock_seconds": {"type": "int", "default": 300},
            "cache_valid_seconds": {"type": "int", "default": 86400},
            "state_file": {"type": "path", "default": "/var/lib/qlora-70b-recipe/packages.json"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**work(module))
    except AptError as error:
        module.fail_json(msg=str(error), log=error.log, stderr="\n".join(error.log))


if __name__ == "__main__":
    main()
