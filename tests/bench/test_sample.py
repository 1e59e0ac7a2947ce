"""Host RAM counts what is shared once; kernels fall into their classes."""

import subprocess
import sys
import time

import pytest

from recipe.bench import profile
from recipe.bench.sample import GIB, Sampler, Samples, TreeMemory, open_gpus

MIB = 2**20
# 64 MiB of its own and 96 MiB that it shares with a child; both have touched all of it.
HUNGRY = """
import mmap, os, sys, time
own = bytearray(os.urandom(1)) * (64 * 2**20)
shared = mmap.mmap(-1, 96 * 2**20)
shared.write(b"x" * len(shared))
if os.fork() == 0:
    sum(shared[i] for i in range(0, len(shared), 4096))
    print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hungry():
    process = subprocess.Popen([sys.executable, "-c", HUNGRY], stdout=subprocess.PIPE, text=True)
    child = None
    try:
        assert process.stdout.readline() == "ready\n"
        (child,) = TreeMemory(process.pid)._pids()[1:]
        yield process.pid
    finally:
        subprocess.run(["kill", *map(str, filter(None, (child, process.pid)))], check=False)
        process.wait()


def test_memory_of_a_tree_counts_shared_pages_once(hungry):
    found = TreeMemory(hungry).read()
    # The child has a copy-on-write view of `own`: anonymous pages stand in both, as long as neither writes.
    assert 64 * MIB <= found.anonymous < 2 * 64 * MIB + 64 * MIB
    assert found.shared == pytest.approx(96 * MIB, rel=0.05)


def test_the_sampler_keeps_the_peak(hungry):
    with Sampler(hungry, []) as samples:
        time.sleep(0.7)
    assert samples.peak.total > 160 * MIB and samples.utilisation == []
    assert 0.1 * GIB < samples.peak.total < 1 * GIB


def test_a_tree_that_is_gone_has_no_memory():
    process = subprocess.Popen(["true"])
    process.wait()
    assert TreeMemory(process.pid).read().total == 0


def test_utilisation_is_that_of_the_timed_steps():
    samples = Samples(utilisation=[(1.0, 0.0), (2.0, 90.0), (3.0, 100.0), (4.0, 0.0)])
    assert samples.mean_utilisation(1.5, 3.5) == 95
    assert samples.mean_utilisation(5.0, 6.0) is None


def test_a_gpu_that_nobody_knows_is_none():
    assert open_gpus([]) is None and open_gpus(["GPU-00000000-no-such-gpu"]) is None


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)", "dequantise"),
        ("_dequantize_nf4_kernel", "dequantise"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "nccl"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies"),
        (
            "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "copies",
        ),
        ("split_with_sizes_copy_out_contiguous_no_cast_kernel", "copies"),
        ("triton_poi_fused__to_copy_mul_silu_0", "triton/elementwise"),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>>",
            "triton/elementwise",
        ),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "triton/elementwise"),
        ("_swiglu_kernel", "triton/elementwise"),
        ("_rms_norm_backward_kernel", "triton/elementwise"),
        ("something_else", "other"),
    ],
)
def test_kernels_fall_into_their_classes(kernel, expected):
    assert profile.class_of(kernel) == expected


def test_a_profile_adds_up():
    spans = [("a_gemm", 0.0, 2000.0), ("Memcpy HtoD", 1000.0, 2000.0), ("a_gemm", 5000.0, 1000.0)]
    assert profile.covered(spans) == 4000.0
    kernels = profile.totals((name, 1, duration / 1e3) for name, _, duration in spans)
    found = profile.grouped(kernels, step_ms=6.0, busy_ms=4.0)
    assert {entry["class"]: entry["ms"] for entry in found["classes"] if entry["ms"]} == {
        "matmul": 3,
        "copies": 2,
    }
    assert found["top"][0] == {"kernel": "a_gemm", "class": "matmul", "calls": 2, "ms": 3.0, "share": 0.6}
