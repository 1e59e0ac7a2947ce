"""GGUF files by the other tool: llama.cpp itself, through its C interface.

The library is the one inside the package xllamacpp, whose Python side is a server only: it has builds for x86_64 and
aarch64 that load on any glibc since 2.17 (llama_cpp_py_sync, which has the whole interface in Python, wants 2.38 and so
does not load on Debian 12). The lock pins it, and `_check` sees whether it is still laid out as declared here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from recipe.errors import UserError
from recipe.export.scores import Score

Document = tuple[list[int], list[int]]  # input_ids, labels: as in recipe/export/plain.py
IGNORED = -100
BATCH = 256  # tokens computed at a time: with a vocabulary of 128k their logits are 125 MiB
WARNING = 3  # GGML_LOG_LEVEL_WARN
F32, F16 = 0, 1  # GGML_TYPE_F32, GGML_TYPE_F16
LOG = "void(int, const char *, void *)"
# llama.h and ggml.h, as far as used here. The structures end in room for members of a later version.
C_INTERFACE = """
struct llama_model_params {
    void *devices, *tensor_buft_overrides;
    int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
    void *tensor_split, *progress_callback, *progress_callback_user_data, *kv_overrides;
    bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
    char spare[128];
};
struct llama_context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int32_t ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void *cb_eval, *cb_eval_user_data;
    int32_t type_k, type_v;
    size_t moe_cache_size;
    void *abort_callback, *abort_callback_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    char spare[128];
};
struct llama_batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
};
void llama_backend_init(void);
void llama_log_set(void (*log)(int, const char *, void *), void *);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct llama_model_params);
void llama_model_free(void *model);
void *llama_model_get_vocab(void *model);
int32_t llama_model_meta_count(void *model);
int32_t llama_model_meta_key_by_index(void *model, int32_t i, char *buf, size_t size);
int32_t llama_model_meta_val_str_by_index(void *model, int32_t i, char *buf, size_t size);
int32_t llama_vocab_n_tokens(void *vocab);
bool llama_vocab_is_eog(void *vocab, int32_t token);
int32_t llama_tokenize(void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t most, bool add, bool parse);
void *llama_adapter_lora_init(void *model, const char *path);
void *llama_init_from_model(void *model, struct llama_context_params);
void llama_free(void *context);
int32_t llama_set_adapters_lora(void *context, void **adapters, size_t count, float *scales);
void *llama_get_memory(void *context);
void llama_memory_clear(void *memory, bool data);
struct llama_batch llama_batch_init(int32_t tokens, int32_t embd, int32_t sequences);
void llama_batch_free(struct llama_batch);
int32_t llama_decode(void *context, struct llama_batch);
float *llama_get_logits(void *context);
size_t ggml_quantize_chunk(int type, const float *from, void *to, int64_t start, int64_t rows, int64_t columns, const float *);
"""


@dataclass
class Log:
    """What llama.cpp said. It prints a hundred lines for each file; here only what is of use is kept."""

    lines: list[str] = field(default_factory=list)

    def last(self) -> str:
        return self.lines[-1].strip() if self.lines else "no message"


@dataclass(frozen=True)
class Loaded:
    """A model, its vocabulary and, where there is one, a LoRA adapter: pointers of llama.cpp."""

    path: Path
    model: Any
    vocabulary: Any
    adapter: Any
    log: Log

    @property
    def tokens(self) -> int:
        return library()[0].llama_vocab_n_tokens(self.vocabulary)


def token_scores(model: Path, documents: Sequence[Document], lora: Path | None = None) -> list[Score]:
    """How likely llama.cpp finds the labelled tokens of each document, from the logits at the positions before them."""
    if not documents:
        return []
    with loaded(model, lora) as it, _context(it, max(len(ids) for ids, _ in documents)) as context:
        return [_score(it, context, ids, labels) for ids, labels in documents]


def greedy(
    model: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, lora: Path | None = None
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the token that ends it."""
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    with loaded(model, lora) as it, _context(it, longest) as context:
        return [_continued(it, context, list(prompt), max_new_tokens) for prompt in prompts]


def tokenise(model: Path, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """`special`: special tokens that are written out in a text are taken as such, and BOS is put where it belongs."""
    lib, ffi = library()
    found = []
    with loaded(model, vocabulary_only=True) as it:
        for text in texts:
            raw = text.encode()
            room = ffi.new("int32_t[]", len(raw) + 8)
            count = lib.llama_tokenize(it.vocabulary, raw, len(raw), room, len(room), special, special)
            if count < 0:
                raise UserError(f"{model}: llama.cpp cannot tokenise {text[:40]!r}")
            found.append(list(room[0:count]))
    return found


def chat_template(model: Path) -> str | None:
    return metadata(model).get("tokenizer.chat_template")


def metadata(model: Path) -> dict[str, str]:
    """All that the file says of itself, as text; lists are shortened by llama.cpp."""
    lib, ffi = library()

    def text(ask: Any, index: int) -> str:
        room = ffi.new("char[]", 256)
        length = ask(it.model, index, room, 256)
        if length >= 256:
            room = ffi.new("char[]", length + 1)
            ask(it.model, index, room, length + 1)
        return ffi.string(room).decode(errors="replace")

    with loaded(model, vocabulary_only=True) as it:
        return {
            text(lib.llama_model_meta_key_by_index, index): text(lib.llama_model_meta_val_str_by_index, index)
            for index in range(lib.llama_model_meta_count(it.model))
        }


@contextmanager
def loaded(model: Path, lora: Path | None = None, vocabulary_only: bool = False) -> Iterator[Loaded]:
    """Raises UserError where llama.cpp cannot read the file, with what it says."""
    lib, ffi = library()
    for path in (model, lora):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file, expected a GGUF file")
    with logged() as log:
        parameters = lib.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        # Weights repacked for this CPU are computed by other products, and take the memory of the file once more.
        parameters.use_extra_bufts = False
        pointer = lib.llama_model_load_from_file(os.fsencode(model), parameters)
        if pointer == ffi.NULL:
            raise UserError(f"{model}: llama.cpp cannot load it ({log.last()})")
        try:
            adapter = ffi.NULL
            if lora is not None:
                adapter = lib.llama_adapter_lora_init(pointer, os.fsencode(lora))
                if adapter == ffi.NULL:
                    raise UserError(f"{lora}: llama.cpp cannot load it on {model.name} ({log.last()})")
            yield Loaded(model, pointer, lib.llama_model_get_vocab(pointer), adapter, log)
        finally:
            lib.llama_model_free(pointer)  # its adapters too


@contextmanager
def logged() -> Iterator[Log]:
    """What llama.cpp warns of while the block runs."""
    lib, ffi = library()
    log = Log()

    @ffi.callback(LOG)
    def keep(level: int, text: Any, _: Any) -> None:
        line = ffi.string(text).decode(errors="replace")
        if level == 5 or level >= WARNING:  # 5 goes on with the line before
            if level == 5 and log.lines and not log.lines[-1].endswith("\n"):
                log.lines[-1] += line
            elif level != 5:
                log.lines.append(line)

    lib.llama_log_set(keep, ffi.NULL)
    try:
        yield log
    finally:
        lib.llama_log_set(_OPENED[2], ffi.NULL)


def library() -> tuple[Any, Any]:
    """llama.cpp and its ffi. Raises UserError where it is not to be had, or is another than this file was written for."""
    global _OPENED
    if _OPENED is None:
        ffi = cffi.FFI()
        ffi.cdef(C_INTERFACE)
        try:
            package = importlib.util.find_spec("xllamacpp")
            if package is None or not package.origin:
                raise OSError("no such package")
            opened = ffi.dlopen(str(next(Path(package.origin).parent.glob("xllamacpp*.so"))))
            silent = ffi.callback(LOG, lambda *_: None)
            opened.llama_log_set(silent, ffi.NULL)
            _check(opened)
        except (OSError, StopIteration, AttributeError) as error:
            raise UserError(
                f"llama.cpp is not to be had here ({str(error).splitlines()[0] if str(error) else 'no library'}), expected "
                "the package xllamacpp as the lock names it; run `make setup`"
            ) from None
        opened.llama_backend_init()
        _OPENED = opened, ffi, silent  # the callback must live as long as llama.cpp may call it
    return _OPENED[:2]


def _check(opened: Any) -> None:
    """Its structures are laid out as we believe: their defaults stand where they should."""
    model, context = opened.llama_model_default_params(), opened.llama_context_default_params()
    found = [model.vocab_only, model.use_extra_bufts, context.n_ctx, context.type_k, context.type_v]
    found += [context.embeddings, context.offload_kqv, context.no_perf, context.kv_unified]
    if found != [False, True, 512, F16, F16, False, True, True, False]:
        raise OSError(f"another version, with defaults {found}")


_OPENED: Any = None


@contextmanager
def _context(it: Loaded, tokens: int) -> Iterator[Any]:
    lib, ffi = library()
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = -(-tokens // 256) * 256
    parameters.n_batch = parameters.n_ubatch = min(BATCH, parameters.n_ctx)
    parameters.n_seq_max = 1
    # Its threads wait for each other spinning: on a busy machine one is many times faster than one for each core.
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    parameters.n_threads = parameters.n_threads_batch = threads
    # What is measured is the file, not llama.cpp's savings: keys and values in fp32, attention without shortcuts.
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = 0
    parameters.no_perf = True
    context = lib.llama_init_from_model(it.model, parameters)
    if context == ffi.NULL:
        raise UserError(f"{it.path}: llama.cpp makes no context of {tokens} tokens ({it.log.last()})")
    try:
        if it.adapter != ffi.NULL:
            lib.llama_set_adapters_lora(
                context, ffi.new("void *[]", [it.adapter]), 1, ffi.new("float[]", [1.0])
            )
        yield context
    finally:
        lib.llama_free(context)


def _logits(
    it: Loaded, context: Any, ids: Sequence[int], start: int, wanted: Sequence[bool]
) -> np.ndarray[Any, Any]:
    """Of the wanted ones of `ids`, which stand at `start`; what came before is in the context. A view: use it at once."""
    lib, ffi = library()
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, (token, want) in enumerate(zip(ids, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, want
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if code := lib.llama_decode(context, batch):
            raise UserError(f"{it.path}: llama.cpp cannot compute it (code {code}: {it.log.last()})")
    finally:
        lib.llama_batch_free(batch)
    count = sum(wanted)
    if not count:
        return np.empty((0, it.tokens), dtype=np.float32)
    buffer = ffi.buffer(lib.llama_get_logits(context), count * it.tokens * 4)
    return np.frombuffer(buffer, dtype=np.float32).reshape(count, it.tokens)


def _score(it: Loaded, context: Any, ids: list[int], labels: list[int]) -> Score:
    lib, _ = library()
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    loss, tokens, gap = 0.0, 0, 0.0
    for start in range(0, len(ids) - 1, BATCH):
        part = ids[start : min(start + BATCH, len(ids) - 1)]
        targets = np.array(labels[start + 1 : start + 1 + len(part)])
        counted = targets != IGNORED
        logits: np.ndarray[Any, Any] = _logits(it, context, part, start, counted.tolist())
        tokens += len(logits)
        for row, target in zip(logits, targets[counted], strict=True):
            exact = row.astype(np.float64)
            behind = float(exact.max() - exact[target])
            loss += behind + float(np.log(np.exp(exact - exact.max()).sum()))
            gap = max(gap, behind)
    return Score(loss, tokens, gap)


def _continued(it: Loaded, context: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    lib, _ = library()
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    answer: list[int] = []
    given, start = prompt, 0
    logits: np.ndarray[Any, Any]
    while len(answer) < max_new_tokens:
        for first in range(0, len(given), BATCH):
            part = given[first : first + BATCH]
            last = first + len(part) == len(given)
            logits = _logits(it, context, part, start + first, [False] * (len(part) - 1) + [last])
        start += len(given)
        token = int(logits[0].argmax())
        if lib.llama_vocab_is_eog(it.vocabulary, token):
            break
        answer.append(token)
        given = [token]
    return answer
