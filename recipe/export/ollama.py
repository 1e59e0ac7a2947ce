"""Ollama: a Modelfile beside a GGUF file, with the chat template and the parameters of the tokenizer.

Ollama renders conversations with templates of Go's. Ours is found by rendering the tokenizer's own Jinja template with
marked messages and reading what stands around the marks; then what it gives is compared with the Jinja rendering of other
conversations. Where the two differ, no TEMPLATE is written, and Ollama takes the one in the GGUF file as well as it can.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.errors import Refused, UserError
from recipe.files import read_json

NAME = re.compile(r"([a-z0-9][a-z0-9._-]*/)*[a-z0-9][a-z0-9._-]*(:[A-Za-z0-9._-]+)?")
# Ollama's names for what a generation_config.json sets.
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
MARKS = "\ue000system\ue001", "\ue000first\ue001", "\ue000answer\ue001", "\ue000second\ue001"
Message = dict[str, str]


@dataclass(frozen=True)
class Parts:
    """What a chat template writes around the messages of a conversation."""

    no_system: str  # at the beginning where no system message stands there: often a message of its own
    before_system: str
    after_system: str
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    cue: str  # behind the last question
    system_last: bool = False  # the system message stands in the last question, after before_user

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of them with our template."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        system_part = self.before_system + system + self.after_system
        text = system_part if system and not self.system_last else self.no_system
        for number, message in enumerate(messages):
            last, content = number == len(messages) - 1, message["content"]
            if message["role"] == "user":
                inside = system_part if self.system_last and last and system else ""
                text += self.before_user + inside + content + self.after_user + self.cue * last
            elif message["role"] == "assistant":
                text += self.before_answer + content + self.after_answer * (not last)
        return text

    def go(self) -> str:
        """The same as a Go template. `$last` as in Ollama's own templates: an answer that is begun is continued."""
        system = f"{self.before_system}{{{{ $.System }}}}{self.after_system}"
        otherwise = f"{{{{ else }}}}{self.no_system}" if self.no_system else ""
        begin = (
            self.no_system if self.system_last else f"{{{{ if .System }}}}{system}{otherwise}{{{{ end }}}}"
        )
        inside = f"{{{{ if and $last $.System }}}}{system}{{{{ end }}}}" if self.system_last else ""
        return (
            f"{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
            f'{{{{ if eq .Role "user" }}}}{self.before_user}{inside}{{{{ .Content }}}}{self.after_user}'
            f"{{{{ if $last }}}}{self.cue}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{self.before_answer}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{self.after_answer}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def modelfile(
    gguf: str, tokenizer_folder: Path, model_folder: Path, context_tokens: int, adapter: str | None = None
) -> str:
    """The text of a Modelfile. `gguf`, `adapter`: names of files beside it. `model_folder`: has generation_config.json."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    generation = {}
    if (path := model_folder / "generation_config.json").is_file():
        generation = read_json(path)
    lines = [f"FROM ./{gguf}", *[f"ADAPTER ./{adapter}"] * (adapter is not None)]
    try:
        lines.append(f'TEMPLATE """{chat_parts(tokenizer).go()}"""')
    except UserError as error:
        lines.append(f"# No TEMPLATE: {error}. Ollama reads the one in {gguf}.")
    lines.append(f"PARAMETER num_ctx {context_tokens}")
    lines += [f"PARAMETER stop {_quoted(token)}" for token in _stops(tokenizer, generation)]
    lines += [
        f"PARAMETER {ours} {generation[theirs]}"
        for theirs, ours in PARAMETERS.items()
        if generation.get(theirs) is not None
    ]
    return "\n".join(lines) + "\n"


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"--ollama {name}: is no name of Ollama's, expected lower-case letters, digits, . _ - and one :tag"
        )


def command(name: str) -> list[str]:
    """What makes a model of the Modelfile in the folder where it is typed."""
    return ["ollama", "create", name, "-f", "Modelfile"]


def create(name: str, folder: Path) -> bool:
    """Run `ollama create` in `folder`; False where there is no Ollama. Raises Refused where it fails."""
    check_name(name)
    if not shutil.which("ollama"):
        return False
    done = subprocess.run(command(name), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        raise Refused(f"{folder}: `{' '.join(command(name))}` failed ({said}); is `ollama serve` running?")
    return True


def chat_parts(tokenizer: Any) -> Parts:
    """Raises UserError where the template cannot be put into Go's form, or does not say the same there."""
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("the tokenizer has no chat template")
    if "strftime_now" in tokenizer.chat_template:
        raise UserError("the chat template writes today's date")
    parts = _found(tokenizer)
    if any(
        token in text
        for text in vars(parts).values()
        if isinstance(text, str)
        for token in ("{{", "}}", '"""')
    ):
        raise UserError('the chat template writes {{, }} or """')
    user, answer = (
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4.\nFour."},
    )
    system, more = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Äh\n\nand 3 + 3?"}
    for talk in ([user], [system, user], [user, answer, more], [system, user, answer, more, answer, user]):
        if parts.render(talk) != _rendered(tokenizer, talk):
            raise UserError(
                "the chat template writes some conversations otherwise than a template of Ollama's can"
            )
    return parts


def _found(tokenizer: Any) -> Parts:
    """By rendering marked messages; what stands between two marks is cut behind the token that ends a turn."""
    system, first, answer, second = MARKS
    roles = {system: "system", first: "user", answer: "assistant", second: "user"}

    def between(marks: list[str], order: list[str]) -> list[str] | None:
        text = _rendered(tokenizer, [{"role": roles[mark], "content": mark} for mark in marks])
        pieces = re.split("|".join(order), text)
        return pieces if re.findall("|".join(order), text) == order else None

    talk = [first, answer, second]
    plain = between(talk, talk)
    if plain is None:
        raise UserError("the chat template does not write each message once, in order")
    with_system = between([system, *talk], [system, *talk])
    if with_system is None:
        inside = between([system, *talk], [first, answer, system, second])
        if inside is None:
            raise UserError(
                "the chat template does not write the system message first or in the last question"
            )
        begins = [plain[0], plain[2]]
        before_user = _common_end(begins, tokenizer)
        no_system, after_answer = (text.removesuffix(before_user) for text in begins)
        return Parts(
            no_system, "", inside[3], before_user, "", plain[1], after_answer, plain[3], system_last=True
        )
    begins = [plain[0], with_system[1], plain[2]]
    before_user = _common_end(begins, tokenizer)
    cut = len(_turn_end(before_user, tokenizer))
    before_user = before_user[cut:]
    no_system, after_system, after_answer = (text.removesuffix(before_user) for text in begins)
    after_user = _turn_end(plain[1], tokenizer)
    if not plain[3].startswith(after_user):
        after_user = ""
    return Parts(
        no_system,
        with_system[0],
        after_system,
        before_user,
        after_user,
        plain[1].removeprefix(after_user),
        after_answer,
        plain[3].removeprefix(after_user),
    )


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """As training saw it, without the BOS that Ollama puts before every text where the GGUF file says so."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation ({error})") from None
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text


def _common_end(texts: Sequence[str], tokenizer: Any) -> str:
    """In which all of them end; it begins in the middle of no special token."""
    length = 0
    while length < min(map(len, texts)) and len({text[len(text) - length - 1 :] for text in texts}) == 1:
        length += 1
    special = "|".join(map(re.escape, tokenizer.get_added_vocab())) or "$^"
    for text in texts:
        for token in re.finditer(special, text):
            if token.start() < len(text) - length < token.end():
                length = len(text) - token.end()
    return texts[0][len(texts[0]) - length :]


def _turn_end(text: str, tokenizer: Any) -> str:
    """What of a text between two messages belongs to the first: up to the token that ends it, and white space behind."""
    found = re.match(f".*?{re.escape(tokenizer.eos_token or chr(0))}\\s*", text, re.DOTALL)
    return found[0] if found else ""


def _stops(tokenizer: Any, generation: dict[str, Any]) -> list[str]:
    """The texts of the tokens that end an answer."""
    ids = generation.get("eos_token_id") or []
    tokens = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])]
    return [str(token) for token in dict.fromkeys(tokens) if token]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
