"""Faults that a test puts into the ranks of a real run, by a sitecustomize module: the code that trains has no switch."""

# Runs `code` after the module `name` was imported, in whatever process has this folder on its path.
HOOK = """
import importlib.machinery, sys
class After(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if name == NAME and spec is not None:
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                exec(CODE, vars(module))
            spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, After)
"""


def put_fault(folder, module, code):
    """The environment in which a process that imports `module` runs `code` in it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"NAME, CODE = {module!r}, {code!r}\n{HOOK}")
    return {"PYTHONPATH": str(folder)}
