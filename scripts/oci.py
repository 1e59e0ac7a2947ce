"""Reads an image as an OCI archive: its digest, its files, how large its parts are, and where two of them differ."""

import collections
import itertools
import json
import re
import tarfile


def manifest_digest(archive):
    with tarfile.open(archive) as tar:
        return json.loads(member(tar, "index.json").read())["manifests"][0]["digest"]


def member(tar, name):
    """A file of an archive, to be read. Raises KeyError where there is none."""
    return tar.extractfile(name)


def layers(archive):
    """The layers of an OCI archive, in order, each as an open tar."""
    with tarfile.open(archive) as tar:

        def blob(digest):
            return member(tar, "blobs/" + digest.replace(":", "/"))

        manifest = json.load(blob(manifest_digest(archive)))
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=blob(layer["digest"])) as contents:
                yield contents


def part_of(name):
    """To which part of the image a file belongs: a Python package, the recipe, or Debian."""
    package = re.match(r"opt/venv/lib/python[^/]+/site-packages/([^/]+)(?:/([^/]+)/)?", name)
    if package:
        first = re.sub(r"(\.libs|-[^-]*\.dist-info|\.py|\.pth)$", "", package[1])
        return f"{first}/{package[2]}" if first == "nvidia" and package[2] else first
    if name.startswith("opt/recipe/"):
        return "recipe"
    return "python" if "python3" in name or name.startswith("opt/venv") else "debian"


def sizes(archive):
    """Bytes of each part, largest first."""
    total: collections.Counter[str] = collections.Counter()
    for layer in layers(archive):
        for entry in layer:
            total[part_of(entry.name)] += entry.size if entry.isreg() else 0
    return dict(total.most_common())


def first_difference(first, second):
    """Where two OCI archives part: the first file, and in what."""
    for number, (one, other) in enumerate(itertools.zip_longest(layers(first), layers(second)), 1):
        if one is None or other is None:
            return f"layer {number}: only one has it"
        for a, b in zip(one, other, strict=False):
            where = f"layer {number}, {a.name}"
            if a.name != b.name:
                return f"{where}: the other has {b.name} there"
            facts = [
                f
                for f in ("type", "mode", "uid", "gid", "size", "mtime", "linkname")
                if getattr(a, f) != getattr(b, f)
            ]
            if facts:
                return f"{where}: {facts[0]} is {getattr(a, facts[0])} and {getattr(b, facts[0])}"
            if a.isreg() and one.extractfile(a).read() != other.extractfile(b).read():
                return f"{where}: other bytes"
        if len(one.getnames()) != len(other.getnames()):
            return f"layer {number}: one has more files"
    return "all files are the same: the settings of the image differ"
