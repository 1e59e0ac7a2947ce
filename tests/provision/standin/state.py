"""What has to be the same before the playbook and after everything was removed again."""

from __future__ import annotations

# Compared by their lines, below: packages add system users and leave them.
ACCOUNT_FILES = ("passwd", "group", "shadow", "gshadow")
FIRST_USER = 1000  # below lie the users and groups that packages make
LEFT_OUT = {
    "/etc/.pwd.lock",  # made by the first program that changes an account
    "/etc/ld.so.cache",  # ldconfig's cache of what lies in the libraries' folders
    "/etc/machine-id",  # the host's own, if its first start wrote it
    *(f"/etc/{name}" for name in ACCOUNT_FILES),
    # The account files as they were before their last change.
    *(f"/etc/{name}-" for name in (*ACCOUNT_FILES, "subuid", "subgid")),
}


def difference(before: dict, after: dict) -> list[str]:
    """Readable lines, one for each thing of two `Host.state()`s that differs; empty where nothing does."""
    found = []
    for part in before:
        if part == "accounts":
            found += _accounts(before[part], after[part])
            continue
        for name in sorted(before[part].keys() | after[part].keys()):
            was, now = before[part].get(name), after[part].get(name)
            if was != now and name not in LEFT_OUT:
                found.append(f"{part}: {name}: {_words(was)} before, {_words(now)} after")
    return found


def _words(entry: str | list[str] | None) -> str:
    if isinstance(entry, list):
        return " ".join(word[:16] if len(word) == 64 else word for word in entry)
    return entry or "nothing"


def _accounts(before: dict, after: dict) -> list[str]:
    """Users and groups that were there and changed, or that are new and no package's."""
    found = []
    numbers = {name: int(line.split(":")[2]) for name, line in after["passwd"].items()}
    numbers |= {name: int(line.split(":")[2]) for name, line in after["group"].items()}
    for file in ACCOUNT_FILES:
        for name in sorted(before[file].keys() | after[file].keys()):
            was, now = before[file].get(name), after[file].get(name)
            if was == now:
                continue
            # A package's new group is no difference; somebody left as its member is.
            if (
                was is None
                and numbers[name] < FIRST_USER
                and (file in ("passwd", "shadow") or now.endswith(":"))
            ):
                continue
            found.append(f"accounts: /etc/{file}: {was or 'nothing'} before, {now or 'nothing'} after")
    return found
