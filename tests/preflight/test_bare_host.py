"""What a host runs that has nothing but its own Python 3.10 (Ubuntu 22.04's): the probe, the PCI tree, host.env."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("recipe.probe", "recipe.hostenv", "recipe.hardware")
# Names and arguments that came with Python 3.11, as far as code like this would use them.
NEWER = {
    "tomllib", "TaskGroup", "ExceptionGroup", "BaseExceptionGroup", "add_note", "StrEnum", "ReprEnum", "file_digest",
    "chdir", "UTC", "Self", "assert_never", "LiteralString", "Required", "NotRequired", "process_group", "getLevelNamesMapping",
}  # fmt: skip
# In functions that these programs do not call.
NOT_CALLED = {"recipe.files": {"file_digest"}}


def with_imports(name: str, found: dict[str, ast.Module] | None = None) -> dict[str, ast.Module]:
    """This module of ours and all of ours that it imports, as Python 3.10 reads them."""
    found = {} if found is None else found
    if name in found:
        return found
    file = ROOT / Path(*name.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if file.is_file():  # else a name in a module
        found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 10))
        for module in imported(found[name]):
            if module.partition(".")[0] == "recipe":
                with_imports(module, found)
    return found


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def used(tree: ast.Module) -> set[str]:
    """Every name, attribute and keyword argument of a module."""
    return {
        getattr(node, field)
        for node in ast.walk(tree)
        for field in ("id", "attr", "arg", "name")
        if isinstance(getattr(node, field, None), str)
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_is_python_3_10_and_needs_the_standard_library_alone(program):
    modules = with_imports(program)
    assert {program, "recipe.hardware"} <= set(modules)
    for name, tree in modules.items():
        roots = {module.partition(".")[0] for module in imported(tree)}
        assert roots - sys.stdlib_module_names - {"recipe"} == set(), name
        assert (used(tree) | imported(tree)) & NEWER == NOT_CALLED.get(name, set()), name


@pytest.mark.parametrize(
    "text",
    ["try:\n    pass\nexcept* OSError:\n    pass\n", "import tomllib\n", "import subprocess\nsubprocess.run([], process_group=0)\n"],
)  # fmt: skip
def test_what_3_11_brought_would_be_seen(text):
    try:
        tree = ast.parse(text, feature_version=(3, 10))
    except SyntaxError:
        return
    assert (used(tree) | imported(tree)) & NEWER
