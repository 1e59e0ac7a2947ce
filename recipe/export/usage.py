"""How an export is loaded, in four lines, as its model card shows it. Tests run what stands here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipe.settings import Settings


def how_to_use(
    kind: str,
    base: Mapping[str, Any],
    settings: Settings,
    compute_dtype: str | None,
    facts: Mapping[str, Any],
) -> str:
    """`base`: the manifest's model. `facts` may name the GGUF file (`file`) and the one it stands on (`base_file`)."""
    if kind == "adapters":
        shown = _peft(base, settings, compute_dtype or "bfloat16")
    elif kind.startswith("merged-"):
        shown = _transformers()
    elif kind == "gguf-lora":
        shown = _lora_file(facts.get("file", "ADAPTERS.gguf"), facts.get("base_file", "BASE.gguf"))
    else:
        shown = _model_file(facts.get("file", "MODEL.gguf"))
    new = settings.lora.new_tokens and kind == "adapters"
    note = (
        "\n\nThe tokenizer is the one in this folder: that of the base model does not know the new tokens."
        if new
        else ""
    )
    return f"## How to use it\n\n{shown}{note}"


def _peft(base: Mapping[str, Any], settings: Settings, compute_dtype: str) -> str:
    quantization = settings.quantization
    options = (
        f'load_in_4bit=True, bnb_4bit_quant_type="{quantization.type}", '
        f'bnb_4bit_use_double_quant={quantization.double_quant}, bnb_4bit_compute_dtype="{compute_dtype}"'
    )
    revision = f', revision="{base["revision"]}"' if base["revision"] else ""
    return f"""```python
import peft, transformers
nf4 = transformers.BitsAndBytesConfig({options})
model = transformers.AutoModelForCausalLM.from_pretrained("{base["name"]}"{revision}, quantization_config=nf4)
model = peft.PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")
```"""


def _transformers() -> str:
    return """```python
from transformers import pipeline
chat = pipeline("text-generation", "PATH_OF_THIS_FOLDER", dtype="bfloat16", device_map="auto")
messages = [{"role": "user", "content": "Hello"}]
print(chat(messages, max_new_tokens=100)[0]["generated_text"][-1]["content"])
```"""


def _model_file(file: str) -> str:
    return f"""```bash
llama-cli -m {file} -p "Hello"        # talk to it in the terminal
llama-server -m {file} --port 8080    # or over HTTP, as OpenAI's clients do
printf 'FROM ./{file}\\n' > Modelfile   # or with Ollama, unless a Modelfile lies here
ollama create tuned -f Modelfile && ollama run tuned
```"""


def _lora_file(file: str, base_file: str) -> str:
    return f"""```bash
llama-cli -m {base_file} --lora {file} -p "Hello"
llama-server -m {base_file} --lora {file} --port 8080
printf 'FROM ./{base_file}\\nADAPTER ./{file}\\n' > Modelfile
ollama create tuned -f Modelfile && ollama run tuned
```

`{base_file}` is the base model as a GGUF file."""
