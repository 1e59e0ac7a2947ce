"""Specs and results as the tests need them."""

from recipe.bench import table
from recipe.bench.spec import TINY, Spec


def a_row(**changes):
    """As a GPU gives it."""
    return {
        "variant": "ours",
        "name": changes.get("variant", "ours"),
        "checkpoint": None,
        "status": "measured",
        "note": None,
        "tokens": 8192,
        "document_tokens": None,
        "dropout": 0.05,
        "micro_batches": 1,
        "details": {"offloaded_layers": 46, "kept": "x"},
        "cap_gib": 22.5,
        "tokens_per_second": 1097.4,
        "tokens_per_second_min": 1080.2,
        "tokens_per_second_max": 1102.0,
        "seconds_per_micro_batch": 7.4651,
        "peak_allocated_gib": 21.52,
        "peak_reserved_gib": 21.71,
        "allocator_retries": 0,
        "host_ram_gib": 136.42,
        "gpu_utilisation_percent": 99.6,
        "matmul_tflops": 785.3,
        "share_of_roofline": 0.6,
        "profile": None,
        **changes,
    }


def a_document(*rows):
    return {
        "machine": {"gpus": ["NVIDIA H100 80GB <HBM3>"] * 2, "cpu": "x"},
        "versions": dict.fromkeys(("torch", "bitsandbytes", "peft", "transformers"), "2.11.0+cu130"),
        "model": {"name": "a & b", "layers": 80, "parameters": 70553706496, "flop_per_token": 4.24e11},
        "results": list(rows),
        "ratios": table.ratios(list(rows)),
    }


def a_spec(**changes):
    values = {
        "variant": "trl",
        "model_shape": "x",
        "shape": TINY,
        "tokens": 100,
        "document_tokens": None,
        "cap_gib": 22.5,
        "gpus": 1,
        "ranks": 1,
        "offload": "auto",
        "dropout": 0.05,
        "steps": 1,
    }
    return Spec(**{**values, **changes})
