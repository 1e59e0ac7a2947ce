"""The Triton kernels themselves, run without a GPU: Triton's interpreter executes them on CPU tensors.

Small and odd sizes in fp16 and fp32, against the reference. Triton is no package of the CPU lock (190 MB for nothing but
this test), so it is fetched by the hash that the GPU lock has for it, as the demo fetches its model.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.train.tiny_run import ROOT

KERNELS = "tests/engine/test_kernels_gpu.py"


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A folder for PYTHONPATH that holds Triton, or nothing where it is installed."""
    if importlib.util.find_spec("triton"):
        return ""
    folder = tmp_path_factory.mktemp("triton")
    lock = (ROOT / "requirements-gpu.lock").read_text()
    (entry,) = re.findall(r"^triton==[^\\\n]*(?:\\\n[^\\\n]*)+", lock, re.MULTILINE)
    (folder / "lock").write_text(entry)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(folder / "lock")], check=True)
    return str(folder)


def test_every_kernel_equals_its_reference(triton):
    paths = os.pathsep.join(filter(None, [triton, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", KERNELS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 74  # those that need a GPU's compiler or sizes aside
