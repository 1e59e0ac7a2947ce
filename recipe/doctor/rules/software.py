"""Packages, drivers and libraries that are missing or do not fit each other."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Mark

MISSING = (
    Mark("No module named", r"No module named '?[\w.]+'?"),
    "PackageNotFoundError",
    Mark("ImportError", r"ImportError: .*(requires|needs|Please install|pip install|not installed)"),
    Mark("ImportError", r"ImportError: Using .*requires"),
)


def install(case: Case) -> str:
    for line in case.found(MISSING[0]):
        if named := re.search(r"No module named '?([\w.]+)", line.text):
            return (
                f"`make setup` installs what the lock names; for a program of your own `pip install` what has the module "
                f"{named[1].split('.')[0]} into the environment that it runs in"
            )
    return "`make setup` installs what the lock names; for a program of your own, pip install what the line names"


RULES = (
    Rule(
        "driver_too_old",
        "The NVIDIA driver is too old for this torch",
        "A CUDA build needs a driver of its generation: torch 2.11 and later from PyPI are CUDA 13 and need branch 580.",
        "`make provision` (driver 580 or newer), then reboot; or a torch built for the CUDA that `nvidia-smi` shows",
        marks=(
            Mark("driver on your system is too old", r"NVIDIA driver on your system is too old"),
            "CUDA driver version is insufficient for CUDA runtime version",
            "cudaErrorInsufficientDriver",
            "unsupported toolchain",
        ),
        over=("no_gpu", "nccl_error"),
    ),
    Rule(
        "driver_just_updated",
        "The driver was updated under the running system",
        "The loaded kernel module and the library on disk are of two versions.",
        "reboot, or unload and load the nvidia modules",
        marks=("Driver/library version mismatch",),
        over=("no_gpu", "nccl_versions_differ", "nccl_error"),
    ),
    Rule(
        "cpu_build_of_torch",
        "This torch was built without CUDA",
        "The CPU wheel is installed where a GPU was asked for.",
        "`FLAVOUR=gpu make setup`, or install torch from the index of a CUDA build; `python -m torch.utils.collect_env` "
        "tells which is there",
        marks=("Torch not compiled with CUDA enabled", "not linked with support for cuda devices"),
        over=("no_gpu",),
    ),
    Rule(
        "no_kernel_for_this_gpu",
        "torch has no code for this GPU",
        "The build was made for other compute capabilities: too old a torch for a new card, or too new a one for an old card.",
        "install a torch whose list has the card: `python -c 'import torch; print(torch.cuda.get_arch_list())'`; RTX 50 cards "
        "need CUDA 12.8 or newer",
        marks=(
            "no kernel image is available for execution on the device",
            Mark(
                "is not compatible with the current PyTorch", r"with CUDA capability sm_\d+ is not compatible"
            ),
        ),
    ),
    Rule(
        "no_gpu",
        "No GPU is visible",
        "No driver is loaded, CUDA_VISIBLE_DEVICES hides the GPUs, or the container was started without them.",
        "`nvidia-smi` on the host first; in a container `docker run --device nvidia.com/gpu=all` (`make provision` sets CDI up); "
        "see that CUDA_VISIBLE_DEVICES is not empty",
        marks=(
            "Found no NVIDIA driver on your system",
            "No CUDA GPUs are available",
            "could not select device driver",
            "no CUDA-capable device is detected",
            "invalid device ordinal",
            "Failed to initialize NVML",
            "nvidia-container-cli: initialization error",
            "unresolvable CDI devices",
            "CUDA unknown error",
            "doesn't support bf16/gpu",
            "RuntimeError: No CUDA",
        ),
        certainty="likely",  # torch warns of it on any machine without GPUs
    ),
    Rule(
        "cuda_library_init",
        "cuBLAS or cuDNN could not start",
        "Mostly GPU memory that is full, at times another copy of the library found first by LD_LIBRARY_PATH.",
        "free GPU memory (`nvidia-smi`), unset LD_LIBRARY_PATH, and reinstall torch's own nvidia-* packages",
        marks=(
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUBLAS_STATUS_NOT_INITIALIZED",
            "CUDNN_STATUS_NOT_INITIALIZED",
            "CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH",
            "Unable to load any of {libcudnn",
            Mark("libcudnn", r"(Could not load|cannot open).*libcudnn|libcudnn\S*: cannot open"),
            Mark("libcublas", r"libcublas\S*: (cannot open|undefined symbol)|undefined symbol.*libcublas"),
        ),
        certainty="likely",
    ),
    Rule(
        "bitsandbytes_without_cuda",
        "bitsandbytes has no library for this CUDA",
        "Its wheel brings one library per CUDA version, and none fits the torch that is installed.",
        "`pip install -U bitsandbytes`, then `python -m bitsandbytes`; BNB_CUDA_VERSION chooses another of its libraries",
        marks=(
            "CUDA Setup failed despite",
            "Configured CUDA binary not found",
            Mark("libbitsandbytes_cpu.so", r"libbitsandbytes_cpu\.so: undefined symbol"),
            "CUDA Setup failed",
            "bitsandbytes library load error",
        ),
        certainty="likely",
        over=("missing_package", "version_mismatch"),
    ),
    Rule(
        "attention_not_supported",
        "FlashAttention is not installed or not for this GPU",
        "flash-attn needs an Ampere card or newer and a wheel built for this torch.",
        "attn_implementation='sdpa' (`--set compute.attention=sdpa`): torch's own kernels are near it",
        marks=(
            "FlashAttention2 has been toggled on, but it cannot be used",
            "FlashAttention only supports Ampere GPUs or newer",
            Mark("flash_attn", r"flash_attn\w*\.so.*undefined symbol|flash_attn.*seems to be not installed"),
        ),
        over=("missing_package", "version_mismatch"),
    ),
    Rule(
        "bf16_not_supported",
        "This GPU has no bf16",
        "Cards before Ampere compute in fp16 only.",
        "--set compute.dtype=fp16; in other programs fp16=True instead of bf16=True, with fp16 quant storage",
        marks=(
            "Your setup doesn't support bf16",
            "bf16 is only supported on",
            "doesn't support bf16/gpu",
            Mark("compute.dtype is", r"compute\.dtype is .?bf16"),
        ),
        over=("no_gpu",),
    ),
    Rule(
        "version_mismatch",
        "Installed packages do not fit each other",
        "One of them was updated alone: a name has gone, a version is refused, or a compiled extension is of another torch.",
        "`pip check`; install one set of versions that fit (`make setup` takes those of the lock)",
        marks=(
            Mark("cannot import name", r"ImportError: cannot import name"),
            Mark(
                "is required for a normal functioning",
                r"is required for a normal functioning of this module, but found",
            ),
            Mark("undefined symbol", r"undefined symbol: _Z\w+"),
            "A module that was compiled using NumPy 1.x cannot be run in",
            "numpy.dtype size changed",
            Mark("got an unexpected keyword argument", r"TypeError: .*got an unexpected keyword argument"),
            Mark(
                "has no attribute",
                r"AttributeError: module '(torch|transformers|accelerate|peft|trl)\S*' has no attribute",
            ),
            "does not recognize this architecture",
            Mark("GLIBC", r"version `GLIBC\w*_[\d.]+' not found"),
        ),
        certainty="likely",
    ),
    Rule(
        "missing_package",
        "A Python package is missing",
        "It is not in the environment that the program runs in.",
        install,
        marks=MISSING,
        general_remedy="`make setup`, or pip install it into the environment that the program runs in",
    ),
)
