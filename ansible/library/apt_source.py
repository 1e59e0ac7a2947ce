"""Ansible module: a signed package source for apt, whose key has to have a given fingerprint.

    apt_source: {name: docker, uris: ["https://…"], suites: [bookworm], components: [stable], key_url: "https://…",
                 fingerprint: 9DC8 5822 …, pin: {packages: ["docker-*"], origin: download.docker.com, priority: 600}}
    apt_source: {name: nvidia, uris: ["https://…"], suites: ["/"], key_url: …, fingerprint: …}      # flat: no components
    apt_source: {name: contrib, uris: […], suites: […], components: [contrib], key_file: /usr/share/keyrings/….gpg}
    apt_source: {name: docker, state: absent}

Also: architectures (default: the host's), types ([deb]), pin.release in place of pin.origin, timeout (30: seconds
without an answer when the key is loaded), lock_seconds (300).

Files: /etc/apt/sources.list.d/recipe-NAME.sources, /etc/apt/keyrings/recipe-NAME.gpg and, with pin,
/etc/apt/preferences.d/recipe-NAME. They are put in place only after apt has read the source and verified its signature,
so a failure changes nothing. No network is used where they are there already, nor by --check.

A source of the user's for the same repository stays, and ours agrees with it: apt reads nothing at all where two sources
name different keys for one repository. Where the user's key is not the wanted one, that is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

from ansible.module_utils.apt_failures import explain
from ansible.module_utils.apt_tools import (
    LISTS,
    UPDATE,
    AptError,
    native_architecture,
    run,
    run_locked,
    write_whole,
)
from ansible.module_utils.openpgp_keys import key_in, load

ETC = Path("/etc/apt")
PARTS = ETC / "sources.list.d"
HEAD = "# Made by the recipe's provision.yml; unprovision.yml removes it.\n"


@dataclass(frozen=True)
class Source:
    name: str
    uris: list[str]
    suites: list[str]
    components: list[str]
    architectures: list[str]
    types: list[str]
    fingerprint: str  # upper-case hex; "": key_file is taken as it is

    @property
    def file(self) -> Path:
        return PARTS / f"recipe-{self.name}.sources"

    @property
    def key(self) -> Path:
        return ETC / f"keyrings/recipe-{self.name}.gpg"

    @property
    def pin(self) -> Path:
        return ETC / f"preferences.d/recipe-{self.name}"

    def text(self, signed_by: str) -> str:
        fields = {
            "Types": self.types,
            "URIs": self.uris,
            "Suites": self.suites,
            "Components": self.components,
            "Architectures": self.architectures or [native_architecture()],
            "Signed-By": [signed_by] if signed_by else [],
        }
        lines = [f"{name}: {' '.join(values)}\n" for name, values in fields.items() if values]
        return HEAD + "".join(lines)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def pin_text(pin: dict | None) -> str:
    if not pin:
        return ""
    kind = "origin" if pin.get("origin") else "release"
    value = f'"{pin["origin"]}"' if kind == "origin" else pin["release"]
    return (
        f"{HEAD}Package: {' '.join(pin['packages'])}\nPin: {kind} {value}\nPin-Priority: {pin['priority']}\n"
    )


# --- other sources of the host ---------------------------------------------------------------------------------------


@contextmanager
def staged() -> Iterator[Path]:
    """A folder that apt's unprivileged user can read; gone at the next start of the machine if we are killed."""
    folder = Path(tempfile.mkdtemp(prefix="recipe-source-", dir="/run"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def agreed(source: Source, signed_by: str, folder: Path) -> str:
    """The Signed-By with which apt can read ours beside the host's other sources: ours, or that of the user's."""
    parts = folder / "parts"
    parts.mkdir()
    for other in PARTS.iterdir() if PARTS.is_dir() else ():
        if other.name != source.file.name:
            (parts / other.name).symlink_to(other)
    ours = parts / source.file.name
    for _ in range(2):
        ours.write_text(source.text(signed_by))
        status, text = run(["apt-get", "indextargets", f"-oDir::Etc::sourceparts={parts}"])
        if not status:
            return signed_by
        conflict = re.search(
            r"Conflicting values set for option Signed-By regarding source (.+): (\S*) != (\S*)$", text, re.M
        )
        if not conflict:
            break
        theirs = conflict[2] if conflict[3] == signed_by else conflict[3]
        # With key_file, the repository is one of the distribution's, and trusted as the user's own source trusts it.
        if source.fingerprint and not key_in(theirs, source.fingerprint):
            raise AptError(
                f"{file_of(conflict[1]) or 'a source of the host'} has {conflict[1]} with another key "
                f"({theirs or 'none named'}), expected {source.fingerprint}; remove that source, or let it have the "
                "vendor's key, then run the play again; nothing was changed"
            )
        signed_by = theirs
    raise AptError(explain(text, [source.name]), text)


def targets(*options: str) -> list[dict[str, str]]:
    """What apt downloads for its sources: Filename, Base-URI and more, each. AptError where it cannot read them."""
    status, text = run(["apt-get", "indextargets", *options])
    if status:
        raise AptError(explain(text), text)
    blocks = [dict(re.findall(r"^(\S+): (.*)$", block, re.MULTILINE)) for block in text.split("\n\n")]
    return [block for block in blocks if "Filename" in block]  # there may be warnings between them


def file_of(repository: str) -> str | None:
    """Which file has the source "URI SUITE"?"""
    uri, _, suite = repository.partition(" ")
    words = {uri.rstrip("/"), suite.rstrip("/") or "/"}
    for path in [ETC / "sources.list", *sorted(PARTS.glob("*"))]:
        found = {word.rstrip("/") or "/" for word in read(path).split()}
        if words <= found and not path.name.startswith("recipe-"):
            return str(path)
    return None


# --- states ----------------------------------------------------------------------------------------------------------


def present(source: Source, wanted: dict, check: bool) -> dict:
    before, pin = read(source.file), pin_text(wanted["pin"])
    has_key = bool(source.fingerprint) and key_in(source.key, source.fingerprint, only=True)
    used = "".join(re.findall(r"^Signed-By: (.*)$", before, re.MULTILINE))  # as was agreed when it was made
    if not source.fingerprint:
        trusted = not used or Path(used).exists()
    else:
        trusted = has_key if used == str(source.key) else key_in(used, source.fingerprint)
    if before == source.text(used) and trusted and read(source.pin) == pin:
        return {"changed": False, "diff": {"before": "", "after": ""}}
    if wanted["key_file"] and not check and not os.access(wanted["key_file"], os.R_OK):
        raise AptError(f"key_file: {wanted['key_file']} is not there; expected a keyring on the host")
    with staged() as folder:
        signed_by = agreed(source, wanted["key_file"] or str(source.key), folder)
        text = source.text(signed_by)
        result = {"changed": True, "diff": shown(source, before, text, pin)}
        if check:
            return result
        own_key = signed_by == str(source.key)
        packets = None
        if own_key and not has_key:
            packets = load(source.name, wanted["key_url"], source.fingerprint, wanted["timeout"])
            (folder / "key.gpg").write_bytes(packets)
            (folder / "key.gpg").chmod(0o644)
        fetch(
            source,
            source.text(str(folder / "key.gpg") if packets else signed_by),
            folder,
            wanted["lock_seconds"],
        )
    if packets:
        write_whole(source.key, packets)
    if pin:
        write_whole(source.pin, pin.encode())
    write_whole(source.file, text.encode())
    if not own_key:
        source.key.unlink(missing_ok=True)
    if not pin:
        source.pin.unlink(missing_ok=True)
    return result


def fetch(source: Source, text: str, folder: Path, lock_seconds: int) -> None:
    """`apt-get update` for this source alone, as it would be: verifies its signature."""
    file = folder / source.file.name
    file.write_text(text)
    times = {path: path.stat() for path in (LISTS, LISTS / "partial") if path.exists()}
    only = [f"-oDir::Etc::sourcelist={file}", "-oDir::Etc::sourceparts=-", "-oAPT::Get::List-Cleanup=0"]
    status, output = run_locked([*UPDATE, *only], lock_seconds)
    # By these times `packages` knows when all lists were updated.
    for path, old in times.items():
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    if status:
        line = explain(output, [f"the source {source.name}"])
        raise AptError(
            line if line.endswith("nothing was changed") else f"{line}; nothing was changed", output
        )


def shown(source: Source, before: str, text: str, pin: str) -> list[dict]:
    pairs = [(source.file, before, text), (source.pin, read(source.pin), pin)]
    return [
        {"before_header": str(path), "after_header": str(path), "before": old, "after": new}
        for path, old, new in pairs
        if old != new
    ]


def absent(source: Source, check: bool) -> dict:
    files = [path for path in (source.file, source.pin, source.key) if path.exists()]
    diff = [
        {"before_header": str(path), "after_header": "/dev/null", "before": read(path), "after": ""}
        for path in files
        if path != source.key
    ]
    if files and not check:
        ours = []
        with suppress(AptError):
            if source.file.exists():
                ours = targets(f"-oDir::Etc::sourcelist={source.file}", "-oDir::Etc::sourceparts=-")
        for path in files:
            path.unlink()
        forget_lists(ours)
    return {"changed": bool(files), "diff": diff, "removed": [str(path) for path in files]}


def forget_lists(ours: list[dict[str, str]]) -> None:
    """Deletes what apt has downloaded for these and for none of the sources that are left."""
    try:
        others = targets()
    except AptError:
        return  # the next `apt-get update` does it
    for name in {one["Filename"] for one in ours} - {one["Filename"] for one in others}:
        for path in LISTS.glob(f"{Path(name).name}*"):  # perhaps compressed
            path.unlink()
    for uri in {one["Base-URI"] for one in ours} - {one["Base-URI"] for one in others}:
        for end in ("InRelease", "Release", "Release.gpg"):
            (LISTS / file_name(uri + end)).unlink(missing_ok=True)


def file_name(uri: str) -> str:
    """As apt names what it downloaded (URItoFileName)."""
    rest = re.sub(r"^[^:]+:/*(?:[^/@]*@)?", "", uri)
    return re.sub(r"[\\|{}\[\]<>\"^~_=!@#$%&*]", lambda found: f"%{ord(found[0]):02x}", rest).replace(
        "/", "_"
    )


def read_source(module: AnsibleModule) -> Source:
    wanted = module.params
    if not re.fullmatch(r"[a-z0-9-]+", wanted["name"]):
        raise AptError(f"name: {wanted['name']!r}; expected small letters, digits and hyphens")
    fingerprint = re.sub(r"\s", "", wanted["fingerprint"] or "").upper()
    if wanted["state"] == "present":
        if not wanted["uris"] or not wanted["suites"]:
            raise AptError(f"source {wanted['name']}: no uris or no suites; expected both")
        if bool(wanted["key_url"]) == bool(wanted["key_file"]):
            raise AptError(f"source {wanted['name']}: expected either key_url or key_file")
        if wanted["key_url"] and not re.fullmatch(r"[0-9A-F]{40}|[0-9A-F]{64}", fingerprint):
            raise AptError(f"source {wanted['name']}: fingerprint {fingerprint!r}; expected 40 hex digits")
        flat = {suite.endswith("/") for suite in wanted["suites"]}
        if flat != {not wanted["components"]}:
            raise AptError(
                f"source {wanted['name']}: suites {wanted['suites']}, components {wanted['components']}; expected either "
                "components, or suites that are paths and end with /"
            )
        for field in ("uris", "suites", "components", "architectures"):
            for word in wanted[field]:
                if re.search(r"\s", word) or not word:
                    raise AptError(
                        f"source {wanted['name']}: {field}: {word!r}; expected words without blanks"
                    )
    return Source(
        wanted["name"],
        wanted["uris"],
        wanted["suites"],
        wanted["components"],
        wanted["architectures"],
        wanted["types"],
        fingerprint if wanted["key_url"] else "",
    )


def main() -> None:
    words = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "uris": words,
            "suites": words,
            "components": words,
            "architectures": words,
            "types": words | {"default": ["deb"]},
            "key_url": {"type": "str", "no_log": False},
            "key_file": {"type": "path", "no_log": False},
            "fingerprint": {"type": "str"},
            "pin": {
                "type": "dict",
                "options": {
                    "packages": {"type": "list", "elements": "str", "required": True},
                    "priority": {"type": "int", "required": True},
                    "origin": {"type": "str"},
                    "release": {"type": "str"},
                },
                "mutually_exclusive": [("origin", "release")],
                "required_one_of": [("origin", "release")],
            },
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "timeout": {"type": "int", "default": 30},
            "lock_seconds": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    try:
        source = read_source(module)
        if module.params["state"] == "absent":
            result = absent(source, module.check_mode)
        else:
            result = present(source, module.params, module.check_mode)
    except AptError as error:
        module.fail_json(msg=str(error), log=error.log, stderr="\n".join(error.log))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
