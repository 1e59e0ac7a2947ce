"""What the tests of the server share: SmolLM2 as a GGUF, a LoRA for it, a server in this process, a browser."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import openai
import pytest

from recipe.prepare.demo import _fetch
from recipe.serve import server
from recipe.serve.llama import Files
from tests.report.conftest import browser  # noqa: F401, a fixture

KEY = "a-key-of-the-tests"
NAME = "first"
CONTEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Served:
    address: str
    key: str
    files: Files

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.key, max_retries=0)


@pytest.fixture(scope="session")
def gguf_files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("gguf")
    return Files(_fetch(folder), write_lora(folder / "lora.gguf"))


@pytest.fixture(scope="session")
def served(gguf_files):
    with (
        server.listening(0) as listener,
        server.serving(listener, gguf_files, NAME, KEY, server.CHAT, CONTEXT_TOKENS) as address,
    ):
        yield Served(address, KEY, gguf_files)


def write_lora(path: Path) -> Path:
    """A LoRA of rank 8 for SmolLM2 that changes what it says, and leaves it sentences."""
    from gguf import GGUFWriter

    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for layer in range(30):
        for name, out, into in (("attn_q", 576, 576), ("ffn_down", 576, 1536)):
            for half, shape, deviation in (("a", (8, into), 0.05), ("b", (out, 8), 0.02)):
                values = random.normal(0, deviation, shape).astype(np.float32)
                writer.add_tensor(f"blk.{layer}.{name}.weight.lora_{half}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
