"""`make serve`: may vLLM do it, in a container on this machine's GPUs? Else recipe/serve does it, on the CPU in .venv.

What vLLM needs is said by recipe/serve/vllm.py, which any Python can run. Standard library only.
"""

import json
import subprocess
import sys
from pathlib import Path

import engine
from setup import SetupError

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "qlora-70b-recipe:vllm"


def vllm_request(arguments, flavour):
    """{"words": of vLLM's command line, "port", "key"}. Raises SetupError where vLLM cannot serve this run here."""
    if flavour != "gpu":
        raise SetupError("vLLM needs an NVIDIA GPU, found none")
    engine.require_gpus()
    if engine.image(IMAGE) is None:
        raise SetupError(
            f"there is no image {IMAGE}: `docker pull vllm/vllm-openai:v0.33.0`, then "
            "`docker compose --profile vllm build vllm`"
        )
    engine.require_compose()
    done = subprocess.run(
        [sys.executable, "-m", "recipe.serve.vllm", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SetupError(engine.last_line(done.stderr))
    return json.loads(done.stdout)


def environment(request):
    """What compose.yaml's service takes from the environment; the key must not stand on a command line."""
    return {"VLLM_API_KEY": request["key"], "RECIPE_SERVE_PORT": str(request["port"])}


def address(request):
    return f"http://127.0.0.1:{request['port']}/v1 for OpenAI's clients, key {request['key']} (Ctrl-C ends)"
