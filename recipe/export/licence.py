"""The base model's licence, read from the base's own files: what it asks of those who pass on what is made with it.

Llama's asks for a line to be shown, for its text and a notice to travel along, and for names that begin with "Llama".
What is known here was read from the licences themselves; a licence that is not known is named and left to the reader.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from recipe.files import write_text

TRAVELS = re.compile(r"(?i)^(licen[sc]e|use_policy|notice|copying)")
NOTICE = "NOTICE"
HEAD = 4000  # characters of a licence in which its title stands


@dataclass(frozen=True)
class Licence:
    """`id`, `hub_name` and `link` are the front matter's license, license_name and license_link."""

    name: str
    id: str | None = None
    hub_name: str | None = None
    link: str | None = None
    attribution: str | None = None  # to be shown where the model is described
    name_prefix: str | None = None  # of every name that a derived model gets
    notice: str | None = None  # to stand in a text file `NOTICE` beside the weights
    terms: str | None = None  # what else a reader must know
    must_travel: bool = False  # its text has to be passed on
    found_in: str | None = None  # the file that says so, or None where only the model's name does
    files: tuple[Path, ...] = ()

    def allows(self, name: str) -> bool:
        """Whether a derived model may bear this name, whose parts may be joined as names of repositories are."""
        return self.name_prefix is None or _joined(name).startswith(_joined(self.name_prefix))

    def named(self, name: str) -> str:
        """The name itself, or the nearest one that is allowed."""
        return name if self.allows(name) else f"{(self.name_prefix or '').replace(' ', '-')}-{name}"


def _joined(name: str) -> str:
    return re.sub(r"[-_ ]", "", name)


def _llama(version: str, link: str, title: str | None = None, prefix: str | None = "Llama") -> Licence:
    called = title or f"Llama {version}"
    return Licence(
        f"{called} Community License",
        "other" if version == "4" else f"llama{version}",
        "llama4" if version == "4" else None,
        link,
        None if prefix is None else "Built with Llama" if prefix == "Llama" else f"Built with Meta {prefix}",
        prefix,
        f"{called} is licensed under the {called} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        "The Acceptable Use Policy applies; above 700 million monthly users Meta has to be asked.",
        must_travel=True,
    )


def _qwen(name: str, hub_name: str, shown: bool, terms: str) -> Licence:
    return Licence(
        name,
        "other",
        hub_name,
        None,
        "Built with Qwen" if shown else None,
        None,
        f"{'Tongyi Qianwen' if hub_name == 'tongyi-qianwen' else 'Qwen'} is licensed under the {name}, Copyright (c) "
        "Alibaba Cloud. All Rights Reserved.",
        terms,
        must_travel=True,
    )


_MANY_USERS = "Above 100 million monthly users Alibaba Cloud has to be asked for a commercial licence."
# By what a README's front matter calls it: `license`, or `license_name` where that is `other`.
KNOWN = {
    "llama4": _llama("4", "https://www.llama.com/llama4/license/"),
    "llama3.3": _llama("3.3", "https://www.llama.com/llama3_3/license/"),
    "llama3.2": _llama("3.2", "https://www.llama.com/llama3_2/license/"),
    "llama3.1": _llama("3.1", "https://www.llama.com/llama3_1/license/"),
    "llama3": _llama("3", "https://www.llama.com/llama3/license/", "Meta Llama 3", "Llama 3"),
    "llama2": _llama("2", "https://ai.meta.com/llama/license/", prefix=None),
    "qwen-research": _qwen(
        "Qwen RESEARCH LICENSE AGREEMENT", "qwen-research", True, "Not for commercial use."
    ),
    "qwen": _qwen("Qwen LICENSE AGREEMENT", "qwen", True, _MANY_USERS),
    "tongyi-qianwen": _qwen("Tongyi Qianwen LICENSE AGREEMENT", "tongyi-qianwen", False, _MANY_USERS),
    "apache-2.0": Licence(
        "Apache License 2.0", "apache-2.0", link="https://www.apache.org/licenses/LICENSE-2.0"
    ),
    "mit": Licence("MIT License", "mit"),
}

# Titles as they stand in the licences. The first that fits counts: what asks for more stands above.
_TITLES = (
    (r"llama 4 (community license|acceptable use)", "llama4"),
    (r"llama 3\.3 (community license|acceptable use)", "llama3.3"),
    (r"llama 3\.2 (community license|acceptable use)", "llama3.2"),
    (r"llama 3\.1 (community license|acceptable use)", "llama3.1"),
    (r"llama 3 (community license|acceptable use)", "llama3"),
    (r"llama 2 (community license|acceptable use)", "llama2"),
    (r"qwen research license", "qwen-research"),
    (r"tongyi qianwen license", "tongyi-qianwen"),
    (r"qwen license agreement", "qwen"),
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"mit license|permission is hereby granted, free of charge", "mit"),
)

# For checkpoints that came without their papers. A letter before `llama` makes it another model (TinyLlama).
_NAMES = (
    (r"(?<![a-z])llama[-_]?4\b", "llama4"),
    (r"(?<![a-z])llama[-_]?3\.3\b", "llama3.3"),
    (r"(?<![a-z])llama[-_]?3\.2\b", "llama3.2"),
    (r"(?<![a-z])llama[-_]?3\.1\b", "llama3.1"),
    (r"(?<![a-z])llama[-_]?3\b", "llama3"),
    (r"(?<![a-z])llama[-_]?2\b", "llama2"),
    (r"^qwen2\.5-(coder-)?3b\b", "qwen-research"),
    (r"^qwen2\.5-(math-)?72b\b", "qwen"),
    (r"^qwen(1\.5)?-|^qwen2-(math-)?72b\b", "tongyi-qianwen"),
    (r"^(qwen2(\.5)?-|qwen3-|smollm|mistral-(7b|nemo)|mixtral-|tinyllama)", "apache-2.0"),
)


def licence_of(folder: Path, model: str) -> Licence:
    """Of the base in `folder` (or of an export of it, to which its papers were copied), whose name is `model`."""
    papers = tuple(licence_files(folder))
    for pattern, key in _TITLES:
        for path in papers:
            if re.search(pattern, " ".join(_head(path).lower().split())):
                return replace(KNOWN[key], found_in=path.name, files=papers)
    if stated := _stated(folder / "README.md"):
        key, link = stated
        found = KNOWN.get(key) or Licence(key, key if link is None else "other", key if link else None, link)
        return replace(found, found_in="README.md", files=papers)
    if papers:
        return Licence(
            f"see {papers[0].name}",
            "other",
            "see-licence",
            papers[0].name,
            found_in=papers[0].name,
            files=papers,
        )
    name = model.rpartition("/")[2].lower()
    for pattern, key in _NAMES:
        if re.search(pattern, name):
            return KNOWN[key]
    return Licence("unknown")


def licence_files(folder: Path) -> list[Path]:
    """The base's licence, use policy and notices, which go wherever something made of it goes."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if TRAVELS.match(path.name) and path.is_file())


def copy_licence(model_folder: Path, model: str, target: Path) -> Licence:
    """Put the base's papers beside an export, and the notice that its licence asks for where the base brings none."""
    licence = licence_of(model_folder, model)
    for path in licence.files:
        shutil.copyfile(path, target / path.name)
    if licence.notice and not any(path.name.lower().startswith("notice") for path in licence.files):
        write_text(target / NOTICE, licence.notice + "\n")
    return licence


def front_matter(text: str) -> dict[str, Any]:
    """Of a README; empty where there is none that can be read."""
    parts = re.split(r"^---\s*$", text.lstrip("\ufeff"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stated(readme: Path) -> tuple[str, str | None] | None:
    """What a README's front matter calls the licence, and where that stands if it is none that hubs know."""
    values = front_matter(_head(readme, 10**6)) if readme.is_file() else {}
    name, own = values.get("license"), values.get("license_name")
    if isinstance(name, list):
        name = name[0] if name else None
    if name == "other" and own:
        return str(own), str(values.get("license_link") or "README.md")
    return (str(name).lower(), None) if name and name != "unknown" else None


def _head(path: Path, characters: int = HEAD) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(characters)
