"""GPU memory, host RAM and shared memory that ran out."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import LOSSES, Line, Mark, shell_says

CUDA_FULL = ("CUDA out of memory", "CUDA error: out of memory", "GPU memory is full on rank")
SIGKILL = (
    Mark("exitcode: -9", r"exitcode\s*: -9\b"),
    "(SIGKILL)",
    "Signal 9 (SIGKILL)",
    "was killed by SIGKILL",
    "exit code: 137",
    "is killed by signal: Killed",
    Mark("illed", shell_says("Killed")),
)
KERNEL_KILLED: tuple[str | Mark, ...] = (
    *(
        Mark(said, kernel=True)
        for said in ("Out of memory: Killed process", "Memory cgroup out of memory", "oom-kill", "oom_reaper")
    ),
    "OOMKilled",
    Mark("earlyoom", r"earlyoom.{,200}(SIGKILL|SIGTERM)"),
)
OFFLOADED = (
    Mark("offload_params", r"(?i)offload_params['\"]?\s*[:=]\s*true"),
    Mark("cpu_offload", r"(?i)cpu_offload['\"]?\s*[:=]\s*(true|CPUOffload\(offload_params=True)"),
    "CPUOffloadPolicy",
    Mark("layers offloaded", r"\b[1-9]\d* of \d+ layers offloaded"),
)
LARGE = tuple(Mark(size, rf"\b{size}\b") for size in ("70B", "70b", "72B", "72b"))
SMALL_CARD = Mark("total capacity of", r"total capacity of 2[2-4]\.\d+ GiB")


LOADING = (
    "from_pretrained",
    "load_state_dict",
    "caching_allocator_warmup",
    "_load_pretrained_model",
    "accelerator.prepare",
    "prepare_model",
)


def less_vram(case: Case) -> str:
    """The very setting that our own message names, or the next one to lower."""
    for line in case.found("GPU memory is full on rank"):
        if named := re.search(r"--set \S+", line.text):
            return f"go on with `{case.again} ARGS='{named[0]}'`"
    if case.is_run:
        layers = case.setting("compute.offload_layers")
        more = f"more than {layers}" if isinstance(layers, int) else "K, more than the plan says"
        return (
            f"`make plan CONFIG={case.config}` names what fits; then --set compute.offload_layers={more}, "
            f"or half of train.micro_batch_tokens (now {case.setting('train.micro_batch_tokens', 'auto')}) in a new run"
        )
    return (
        "halve the tokens per micro-batch and double the accumulation, offload some layers, end other programs on "
        "the GPU (`nvidia-smi`); `recipe plan --gpus N --vram-gib G` says what fits"
    )


def less_ram(case: Case) -> str:
    if case.is_run:
        return (
            f"see `dmesg -T | grep -i killed` and `make plan CONFIG={case.config}`; free RAM or lower "
            f"compute.offload_layers (now {case.setting('compute.offload_layers', 'auto')}), then {case.again}"
        )
    return (
        "see `dmesg -T | grep -i killed`; free RAM, load the model on one rank only, offload less, or add RAM"
    )


def _before(case: Case, line: Line) -> bool:
    """Whether a step was told above that line."""
    return any(step.number < line.number for mark in LOSSES for step in case.found(mark))


def _before_the_first_step(case: Case) -> list[Line]:
    """A full GPU with no step done: loading already was too much."""
    full = [line for mark in CUDA_FULL for line in case.found(mark)]
    loading = [line for mark in LOADING for line in case.found(mark)]
    if not full or case.metrics or _before(case, full[0]):
        return []
    if case.is_run:
        return full if not case.of_kind("loaded", "begun") else []
    return [full[0], loading[-1]] if loading else []


def _killed_for_memory(case: Case) -> list[Line]:
    """Our own event or a log's word is enough; the kernel may speak of another program where no rank was killed."""
    told = [line for mark in KERNEL_KILLED for line in case.found(mark)]
    killed = [line for mark in SIGKILL for line in case.found(mark)]
    ours = [event.line for event in case.events if event.cause == "out_of_host_memory"]
    if killed or ours or case.state == "broken off":
        return ours + told + killed if ours or told else []
    return [line for line in told if line.file != "dmesg"]


def _twice(case: Case) -> list[Line]:
    """Rank 1 or a later one that fills GPU 0, or a second process there with a model's worth of memory."""
    return [
        line
        for mark in CUDA_FULL
        for line in case.found(mark)
        if re.search(r"\[rank[1-9]\d*\].*GPU 0 has", line.text)
        or re.search(r"Process \d+ has (\d{2,}|[4-9])\.\d+ GiB memory in use", line.text)
    ]


UNALLOCATED = "reserved by PyTorch but unallocated"
IN_PIECES = Mark(UNALLOCATED, rf"Tried to allocate.*{UNALLOCATED}")


def _fragmented(case: Case) -> list[Line]:
    """Reserved by the allocator, in pieces too small for what was asked for."""
    lines = []
    for line in case.found(IN_PIECES):
        idle = re.search(r"([\d.]+) (MiB|GiB) is reserved by PyTorch but unallocated", line.text)
        asked = re.search(r"Tried to allocate ([\d.]+) (MiB|GiB)", line.text)
        if idle and asked and _gib(idle) > max(1.0, _gib(asked)):
            lines.append(line)
    return lines


def _gib(found: re.Match[str]) -> float:
    return float(found[1]) / (1024 if found[2] == "MiB" else 1)


RULES = (
    Rule(
        "cuda_out_of_memory",
        "GPU memory ran out",
        "What is kept for the backward pass grows with the tokens of a micro-batch, and weights, adapters and buffers "
        "stand beside it.",
        less_vram,
        marks=CUDA_FULL,
        causes=("out_of_memory",),
        general_remedy="--set compute.offload_layers=K (more), or half of train.micro_batch_tokens; `make plan` says what fits",
    ),
    Rule(
        "out_of_memory_before_step_1",
        "GPU memory ran out before the first step",
        "The weights themselves do not fit: something is not quantised, not sharded or not offloaded (the article's "
        "table; 70B takes 141 GB in 16 bits, 40 GB in NF4, half of that on each of two cards).",
        "check that load_in_4bit is on, that quant storage is the compute dtype (not uint8) and that FSDP shards before "
        "anything is moved to a GPU; `recipe plan` counts it, part by part",
        find=_before_the_first_step,
        reads=(*LOADING, *LOSSES),
        certainty="likely",
        over=("cuda_out_of_memory",),
    ),
    Rule(
        "model_loaded_twice",
        "The model was loaded twice on one GPU",
        "Ranks that load before they know their device all take GPU 0 (the article: the Accelerator was created too late).",
        "create the Accelerator (or call torch.cuda.set_device(LOCAL_RANK)) before from_pretrained, use no "
        "device_map='auto' under a launcher, and end old processes that `nvidia-smi` shows",
        marks=("Duplicate GPU detected",),
        find=_twice,
        certainty="likely",
        over=("cuda_out_of_memory", "out_of_memory_before_step_1", "nccl_error"),
    ),
    Rule(
        "large_model_on_small_cards",
        "A 70B model does not fit two 24 GB cards in this way",
        "Stock loaders put the whole 4-bit model on every rank before they shard it, or gather the 2 GiB head "
        "(axolotl issue 1522, LLaMA-Factory issue 2939).",
        "`make plan CONFIG=recipe/configs/llama-3.1-70b.yaml ARGS='--gpus 2 --vram-gib 24'`, then `make train` with it: each "
        "rank reads only its slice of a layer",
        marks=(SMALL_CARD,),
        needs=LARGE,
        certainty="likely",
        over=("cuda_out_of_memory", "out_of_memory_before_step_1"),
    ),
    Rule(
        "gpu_memory_in_pieces",
        "GPU memory was there, but in pieces",
        "The allocator holds more than was asked for, in blocks that are too small for it.",
        "set PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9); `recipe train` does",
        find=_fragmented,
        reads=(IN_PIECES,),
        certainty="likely",
        over=("cuda_out_of_memory",),
    ),
    Rule(
        "killed_for_memory",
        "The kernel killed a process because RAM ran out",
        "The kernel, a container's limit or earlyoom ends the largest process where RAM and swap are full.",
        less_ram,
        reads=KERNEL_KILLED,
        find=_killed_for_memory,
        over=("rank_killed", "offload_exceeds_ram", "no_end", "rank_died", "host_memory"),
        general_remedy="`make plan` says how much RAM the run needs; free some, or lower compute.offload_layers",
    ),
    Rule(
        "offload_exceeds_ram",
        "RAM ran out under offloaded weights",
        "With everything offloaded, shards, pinned copies and checkpoints lie in RAM: 190 to 200 GB were needed for 70B "
        "(fsdp_qlora issue 24), more than 128 GB in its benchmarks. Swap is a last resort.",
        less_ram,
        marks=SIGKILL,
        needs=OFFLOADED,
        certainty="likely",
        over=("rank_killed",),
        general_remedy="offload a number of layers instead of all (--set compute.offload_layers=K), or add RAM or a GPU",
    ),
    Rule(
        "host_memory",
        "RAM could not be allocated",
        "The process asked for more memory than the host, its limits (ulimit -v, a cgroup) or pinned memory allow.",
        less_ram,
        marks=(
            "DefaultCPUAllocator: can't allocate memory",
            Mark("MemoryError", r"\bMemoryError\b(:|$)"),
            "[Errno 12] Cannot allocate memory",
            "std::bad_alloc",
            "cudaHostAlloc",
            "CUDA_ERROR_OUT_OF_MEMORY: pinned",
        ),
        general_remedy="free RAM, raise the limit, or offload fewer layers (--set compute.offload_layers=K)",
    ),
    Rule(
        "ram_was_nearly_full",
        "RAM was nearly full before a rank was killed",
        "The kernel kills the largest process where RAM runs out.",
        less_ram,
        causes=("host_memory_low",),
        needs=SIGKILL,
        certainty="likely",
        over=("rank_killed", "rank_died"),
        general_remedy="end other programs, or lower compute.offload_layers",
    ),
    Rule(
        "gpu_memory_nearly_full",
        "GPU memory is nearly full",
        "Nothing is left for the next longer row, or another program has taken it.",
        less_vram,
        causes=("vram_low",),
        certainty="likely",
        kind="symptom",
        general_remedy="end other programs on the GPU, or --set compute.offload_layers=K (more)",
    ),
    Rule(
        "shared_memory_full",
        "/dev/shm is full or too small",
        "NCCL and data loaders share memory through /dev/shm; a container's default is 64 MiB. A page that cannot be had "
        "is a bus error.",
        "start the container with --ipc=host or --shm-size=8g (our compose.yaml does), or `df -h /dev/shm` and empty it",
        marks=(
            Mark("Bus error", r"(?<!\w)Bus error"),
            "(SIGBUS)",
            "insufficient shared memory",
            "unable to write to file </torch_",
            "unable to allocate shared memory",
            "Error while creating shared memory segment",
            Mark("/dev/shm", r"No space left on device.*/dev/shm|/dev/shm.*No space left on device"),
            "unable to mmap",
        ),
        over=("disk_full", "rank_crashed", "nccl_error"),
    ),
    Rule(
        "swapping",
        "The machine swaps",
        "RAM is full and pages come back from disk at every step: orders of magnitude slower than RAM.",
        less_ram,
        causes=("swapping",),
        certainty="likely",
        kind="symptom",
        general_remedy="free RAM, lower compute.offload_layers, or use zram (`make provision`)",
    ),
)
