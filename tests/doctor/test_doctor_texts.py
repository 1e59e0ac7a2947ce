"""Failures that need GPUs, several hosts or a cut of the power: known messages, quoted, not provoked.

They do not count for the figure of test_doctor_provoked.py. Each text ends as its program's log would.
"""

import json
import time

import psutil
import pytest

from recipe.doctor.diagnose import all_marks, diagnose
from recipe.doctor.read import read_log, read_run
from recipe.probe import PROBE_FILE
from recipe.train.run import Run

OOM = (
    "{rank}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked}. GPU {gpu} has a total capacity of {total} of "
    "which 12.00 MiB is free. {more}Of the allocated memory 20.10 GiB is allocated by PyTorch, and {idle} is reserved by "
    "PyTorch but unallocated."
)


def oom(rank="", asked="896.00 MiB", gpu=0, total="79.18 GiB", more="", idle="88.15 MiB"):
    return OOM.format(rank=rank, asked=asked, gpu=gpu, total=total, more=more, idle=idle)


TRACE = "Traceback (most recent call last):\n"
STEPS = "{'loss': 1.91, 'grad_norm': 0.4}\n{'loss': 1.85, 'grad_norm': 0.5}\n"
KILLED = "E1128 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python\n"
WATCHDOG = (
    "[rank0]:[E1128 ProcessGroupNCCL.cpp:688] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=13, "
    "OpType=_ALLGATHER_BASE, Timeout(ms)=600000) ran for 600021 milliseconds before timing out.\n"
)
NCCL = (
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, {0}, NCCL version 2.29.3\n"
)

TEXTS = {
    "GPU memory in a step": ("cuda_out_of_memory", STEPS + TRACE + oom()),
    "GPU memory while loading": (
        "out_of_memory_before_step_1",
        TRACE
        + '  File "train.py", line 9, in main\n    model = AutoModelForCausalLM.from_pretrained(\n'
        + oom(),
    ),
    "both ranks on GPU 0": (
        "model_loaded_twice",
        TRACE + "    from_pretrained(\n" + oom(rank="[rank1]: ", gpu=0),
    ),
    "70B on 24 GB cards": (
        "large_model_on_small_cards",
        "base_model: meta-llama/Meta-Llama-3-70B\n" + STEPS + TRACE + oom(total="23.65 GiB"),
    ),
    "memory in pieces": ("gpu_memory_in_pieces", STEPS + TRACE + oom(idle="4.71 GiB")),
    "killed under offload": ("offload_exceeds_ram", "fsdp_offload_params: true\n" + KILLED),
    "killed by a job's limit": (
        "killed_for_memory",
        KILLED
        + "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch. Some of the step tasks have been OOM Killed.\n",
    ),
    "small /dev/shm": (
        "shared_memory_full",
        TRACE
        + "RuntimeError: DataLoader worker (pid 41) is killed by signal: Bus error. It is possible that dataloader's workers "
        "are out of shared memory. Please try to raise your shared memory limit.",
    ),
    "8-bit Adam explodes": (
        "eight_bit_adam_explodes",
        "optim: paged_adamw_8bit\n"
        + STEPS
        + "{'loss': nan, 'grad_norm': nan}\n{'loss': nan, 'grad_norm': nan}\n",
    ),
    "resuming LoRA under FSDP": (
        "lora_fsdp_resume",
        TRACE + '  File "transformers/trainer.py", line 2093, in _load_from_checkpoint\n'
        "ValueError: Can't find a valid checkpoint at out/checkpoint-5\n",
    ),
    "half an adapter": (
        "half_adapter",
        TRACE + "RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n\tsize mismatch for "
        "base_model.model.model.layers.0.mlp.gate_proj.lora_B.default.weight: copying a param with shape torch.Size([7168, 16]) "
        "from checkpoint, the shape in current model is torch.Size([14336, 16]).\n",
    ),
    "the base in every checkpoint": (
        "frozen_base_in_checkpoint",
        TRACE
        + "    save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)\n"
        "OSError: [Errno 28] No space left on device\n",
    ),
    "two 4090s over P2P": ("p2p_hang", "NVIDIA GeForce RTX 4090\nNVIDIA GeForce RTX 4090\n" + WATCHDOG),
    "a collective that times out": ("collective_timeout", STEPS + WATCHDOG),
    "NCCL, a system call": (
        "nccl_error",
        TRACE + NCCL.format("unhandled system error (run with NCCL_DEBUG=INFO for details)"),
    ),
    "NCCL of another version": (
        "nccl_versions_differ",
        TRACE + "ImportError: libtorch_cuda.so: undefined symbol: ncclCommShrink\n",
    ),
    "an old driver": (
        "driver_too_old",
        TRACE
        + "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver\n",
    ),
    "no kernel": (
        "no_kernel_for_this_gpu",
        TRACE + "RuntimeError: CUDA error: no kernel image is available for execution on the device\n",
    ),
    "cuBLAS": (
        "cuda_library_init",
        TRACE + "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`\n",
    ),
    "a container without GPU": (
        "no_gpu",
        TRACE
        + "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU\n",
    ),
    "Xid 79": (
        "gpu_lost",
        "NVRM: Xid (PCI:0000:01:00): 79, pid=812, GPU has fallen off the bus.\n"
        + TRACE
        + NCCL.format("unhandled cuda error"),
    ),
    "Xid 31": (
        "xid",
        "NVRM: Xid (PCI:0000:01:00): 31, pid=812, MMU Fault: ENGINE GRAPHICS\n"
        + TRACE
        + "RuntimeError: CUDA error: unspecified "
        "launch failure\n",
    ),
    "ECC": ("ecc", TRACE + "RuntimeError: CUDA error: uncorrectable ECC error encountered\n"),
    "a token on a GPU": (
        "token_out_of_range",
        "Indexing.cu:1369: indexSelectLargeIndex: block: [0,0,0] Assertion `srcIndex < srcSelectDimSize` failed.\n"
        + TRACE
        + "RuntimeError: CUDA error: device-side assert triggered\n",
    ),
    "a peer that died on another host": (
        "rank_killed",
        "[rank0]: RuntimeError: [../gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:45: Connection reset by peer\n"
        + KILLED,
    ),
    "a rising loss": (
        "loss_spike",
        "".join(
            f"{{'loss': {loss}, 'learning_rate': 0.01}}\n"
            for loss in [2.1, 1.4, 1.1, 0.9, 0.8, 0.8, 3.5, 7.9, 9.0, 11.2, 10.8]
        ),
    ),
}


@pytest.mark.parametrize(("rule", "text"), TEXTS.values(), ids=TEXTS.keys())
def test_a_known_message_is_understood(rule, text, tmp_path):
    log = tmp_path / "train.log"
    log.write_text(text)
    found = diagnose(read_log(log, all_marks()))
    assert found and found[0].rule.name == rule, [diagnosis.rule.name for diagnosis in found]
    assert found[0].remedy


def run_with(folder, events, metrics=(), config="", log=""):
    folder.mkdir()
    (folder / "config.yaml").write_text(config or "train: {learning_rate: 0.001}\n")
    for name, lines in (("events.jsonl", events), ("metrics.jsonl", metrics)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.log").write_text(log)
    return [diagnosis.rule.name for diagnosis in diagnose(read_run(Run(folder), all_marks()))]


def event(kind, cause="", time=1e9, **values):
    return {"time": time, "kind": kind, "message": values.pop("message", kind), "cause": cause, **values}


CAUSES = {
    "out_of_memory": "cuda_out_of_memory",
    "out_of_host_memory": "killed_for_memory",
    "nan_loss": "nan_loss",
    "save_failed": "save_failed",
    "rank_died": "rank_died",
    "rank_hung": "rank_hung",
    "rank_behind": "rank_behind",
    "rank_stopped": "rank_stopped",
    "request": "request",
    "unexpected": "unexpected",
}


@pytest.mark.parametrize(("cause", "rule"), CAUSES.items())
def test_each_cause_of_an_error_event_has_its_rule(cause, rule, tmp_path):
    events = [event("loaded"), event("begun"), event("error", cause, exit_code=1)]
    assert run_with(tmp_path / "r", events, metrics=[{"step": 1, "loss": 2.0}])[0] == rule


def test_a_machine_that_was_started_after_the_last_sign_of_life_had_lost_its_power(tmp_path, monkeypatch):
    folder = tmp_path / "r"
    monkeypatch.setattr("psutil.boot_time", lambda: 4e9)  # no test cuts the power
    assert run_with(folder, [event("loaded"), event("begun"), event("checkpoint")]) == ["power_loss"]


def test_a_run_without_an_end_was_ended_at_once(tmp_path):
    now = 4e9  # after any boot
    assert run_with(tmp_path / "r", [event("loaded", time=now), event("begun", time=now)]) == ["no_end"]


@pytest.mark.parametrize("exit_code", [-2, 1])
def test_ranks_that_a_stop_ends_before_they_listen_are_no_failure(exit_code, tmp_path):
    """How Python ends on Ctrl-C amid imports varies; one rank may also still tell of another that is gone."""
    ends = f"KeyboardInterrupt\nfailed (exitcode: {exit_code}) local_rank: 0 (pid: 7) of binary: python\nChildFailedError: \n"
    now = time.time()
    events = [event("error", "unexpected", time=now - 1, exit_code=1), event("stopped", time=now)]
    assert run_with(tmp_path / "r", events, log=TRACE + ends) == []


def test_throttling_that_lasts_is_told_and_a_warning_of_it_alone_is_not(tmp_path):
    step = {"loss": 1.0, "temperature_celsius": [88.0, None]}
    rates = [100.0] * 6 + [50.0] * 6
    metrics = [step | {"step": i, "tokens_per_second": rate} for i, rate in enumerate(rates)]
    events = [event("loaded"), event("warning", "throttling"), event("finished")]
    for name, lines, expected in (("slow", metrics, ["throttling"]), ("steady", metrics[:6] * 2, [])):
        assert _finished(tmp_path / name, events, lines) == expected


def _finished(folder, events, metrics, log=""):
    run_with(folder, events, metrics, log=log)
    (folder / "summary.json").write_text("{}")
    return [diagnosis.rule.name for diagnosis in diagnose(read_run(Run(folder), all_marks()))]


def test_a_save_that_failed_is_told_with_its_reason_first_until_one_succeeds(tmp_path):
    begun = [event("loaded"), event("begun"), event("checkpoint")]
    refused = event(
        "warning", "save_failed", message="step 4: the checkpoint could not be written: runs: I/O"
    )
    full = (
        "step 5: the checkpoint could not be written: runs: No space left on device; step-000004 is untouched"
    )
    for name, after, expected in (
        ("goes on", [refused], ["save_failed", "no_end"]),
        ("ended", [refused, event("error", "save_failed", message=full, exit_code=1)], ["disk_full"]),
        ("over", [refused, event("checkpoint")], ["no_end"]),
    ):
        after = [line | {"time": 4e9} for line in after]  # after any boot
        assert run_with(tmp_path / name, [*begun, *after]) == expected, name


def test_steps_that_were_left_out_are_told_also_where_all_went_well(tmp_path):
    left_out = event("warning", "nan_batch", message="step 3: the loss is nan, the step was left out")
    metrics = [
        {"step": step, "loss": None if step == 3 else 2.0, "skipped": step == 3} for step in (1, 2, 3, 4)
    ]
    begun = [event("loaded"), event("begun"), left_out]
    said = (
        "{'loss': 'nan', 'grad_norm': 'nan'}\n{'loss': '2.0'}\n{'train_runtime': '9', 'train_loss': 'nan'}\n"
    )
    assert _finished(tmp_path / "well", [*begun, event("finished")], metrics, said) == ["nan_batch"]
    assert run_with(tmp_path / "ill", [*begun, event("error", "nan_loss", exit_code=1)], metrics) == [
        "nan_loss"
    ]


def test_errors_of_an_attempt_that_was_overcome_are_not_told(tmp_path):
    """Memory ran out; with other settings it went on, and was then stopped by a wrong request."""
    events = [
        event("loaded"),
        event("error", "out_of_memory", exit_code=1),
        event("loaded", time=1e9 + 500),
        event("error", "nan_loss", time=1e9 + 600),
    ]
    assert run_with(tmp_path / "r", events) == ["nan_loss"]


def test_an_error_of_an_older_version_has_no_cause_and_is_read_by_its_text(tmp_path):
    message = "GPU memory is full on rank 1: 0.88 GiB were asked for; make it fit with --set compute.offload_layers=10 (now 3)"
    folder = tmp_path / "old"
    run_with(
        folder,
        [event("loaded"), event("begun"), {"time": 1.0, "kind": "error", "message": message, "exit_code": 1}],
    )
    (first, *_) = diagnose(read_run(Run(folder), all_marks()))
    assert first.rule.name == "cuda_out_of_memory"
    assert "--set compute.offload_layers=10" in first.remedy


# What a log holds beside the failure, and would be told first if a rule took it for the cause.
BESIDE = {
    "NCCL's watchdog ends a process by SIGABRT": (
        "collective_timeout",
        STEPS + WATCHDOG + KILLED.replace("-9", "-6"),
    ),
    "a killed rank makes NCCL fail": (
        "rank_killed",
        STEPS + TRACE + NCCL.format("unhandled system error") + KILLED,
    ),
    "warnings of a container and of torch": (
        "cuda_out_of_memory",
        "UserWarning: [Errno 30] Read-only file system: '/.cache/matplotlib'\n"
        "set_mempolicy: Operation not permitted\n[Errno 13] Permission denied: '/.triton'\n"
        + STEPS
        + TRACE
        + oom(),
    ),
    "a row of data that speaks of failures": (
        "cuda_out_of_memory",
        "  row 1 (31 tokens): OSError: [Errno 28] No space left on device, what now?\n"
        + STEPS
        + TRACE
        + oom(),
    ),
    "a shell's word for a killed program": (
        "rank_killed",
        STEPS + "./train.sh: line 3:  4123 Killed                  accelerate launch train.py\n",
    ),
    "a pickle that torch refuses": (
        "pickle_refused",
        TRACE + "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded\n",
    ),
    "losses that print had in its buffer (python -m)": (
        "cuda_out_of_memory",
        TRACE + '  File "<frozen runpy>", line 198, in _run_module_as_main\n' + oom() + "\n" + STEPS,
    ),
    "a word of a row at the end": (None, STEPS + "sample: he was Killed\n" + STEPS),
}


@pytest.mark.parametrize(("rule", "text"), BESIDE.values(), ids=BESIDE.keys())
def test_what_stands_beside_is_not_told_first(rule, text, tmp_path):
    log = tmp_path / "train.log"
    log.write_text(text)
    found = [diagnosis.rule.name for diagnosis in diagnose(read_log(log, all_marks()))]
    assert found[:1] == ([rule] if rule else []), found


def test_of_the_kernel_only_what_can_be_of_this_run_is_heard():
    """Other programs' troubles stand in its log too."""
    heard = {mark.needle for mark in all_marks() if mark.kernel}
    assert {"NVRM: Xid", "GPU has fallen off the bus", "Out of memory: Killed process", "oom-kill"} <= heard
    assert not heard & {"Permission denied", "No space left on device", "Killed", "CUDA out of memory"}


@pytest.mark.parametrize("seconds_apart", [5, 5000])
def test_a_container_hears_its_hosts_kernel_of_the_time_of_the_failure_alone(
    seconds_apart, tmp_path, monkeypatch
):
    now = time.time()
    told = {
        "kind": "oom",
        "seconds": now - psutil.boot_time() - seconds_apart,
        "text": "Out of memory: Killed process 4711 (python3) total-vm:64000000kB, anon-rss:31000000kB",
    }
    probe = {"time": now, "parts": {"kernel_log": {"found": [told], "why": None}}}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    monkeypatch.setenv(PROBE_FILE, str(tmp_path / "probe.json"))
    events = [
        event("loaded", time=now - 60),
        event("begun", time=now - 50),
        event("error", "rank_died", time=now, message="rank 1 was killed by SIGKILL", exit_code=1),
    ]
    found = run_with(tmp_path / "r", events, metrics=[{"step": 1, "loss": 2.0}])
    assert found[0] == ("killed_for_memory" if seconds_apart == 5 else "rank_killed")


def test_a_kernel_log_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    why = "dmesg: Operation not permitted"
    probe = {"time": time.time(), "parts": {"kernel_log": {"found": None, "why": why}}}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    monkeypatch.setenv(PROBE_FILE, str(tmp_path / "probe.json"))
    log = tmp_path / "train.log"
    log.write_text("Traceback (most recent call last):\nValueError: no\n")
    assert any(why in line and "sudo dmesg" in line for line in read_log(log, all_marks()).looked_at)
