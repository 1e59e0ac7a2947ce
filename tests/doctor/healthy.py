"""Programs of stock libraries that go well, however their output may look. As failing.py, one function each."""

import sys
import traceback


def _steps(loss=2.0):
    import torch

    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    for step in range(12):
        layer(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(
            {"loss": f"{loss - step / 10:.4f}", "grad_norm": "0.52", "learning_rate": "1e-4", "epoch": "0.1"}
        )
    print({"train_runtime": "1.2", "train_loss": f"{loss:.4f}"})


def two_ranks():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(2))
    _steps()
    dist.destroy_process_group()


def caught():
    """Failures that the program itself deals with: a batch too large, a mirror that does not answer."""
    for error in (
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. Trying half of the batch"),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
        FileNotFoundError("[Errno 2] No such file or directory: 'cache.json'"),
    ):
        try:
            raise error
        except (RuntimeError, OSError):
            traceback.print_exc()
    _steps()


def warnings_of_libraries():
    import os
    import warnings

    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # which would silence one of them
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.encode_batch(["a", "b"])
    if os.fork() == 0:
        tokenizer.encode_batch(["a", "b"])  # tokenizers warns of a deadlock that it avoids
        os._exit(0)
    os.wait()
    warnings.warn("None of the inputs have requires_grad=True. Gradients will be None", stacklevel=1)
    print("Token indices sequence length is longer than the specified maximum sequence length (1500 > 1024)")
    print(
        "[W socket.cpp:764] [c10d] The IPv6 network addresses of (host, 29500) cannot be retrieved (gai error: -2 - Name "
        "or service not known)."
    )
    print("Setting `pad_token_id` to `eos_token_id`:0 for open-end generation.")
    _steps()


def overflow_once():
    """fp16 with a loss scale: a step's gradients overflow, are dropped, and training goes on."""
    print({"loss": "2.31", "grad_norm": "nan", "learning_rate": "1e-4"})
    print({"loss": "nan", "grad_norm": "nan", "learning_rate": "1e-4"})
    _steps()


def data_with_such_words():
    print(
        "sample: my training ended with CUDA error: device-side assert triggered, and Segmentation fault (core dumped)?"
    )
    print(
        "sample: Hernandez was killed; finance; nan bread; loss: a financial loss; Error: none; NCCL WARN none"
    )
    _steps()


def noisy_loss():
    for loss in (2.0, 0.4, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.3, 0.6, 0.2, 0.5, 0.3):
        print({"loss": f"{loss}", "grad_norm": "3.2"})


def failed_before():
    """A log to which a second attempt was appended: the first one's end is still near, and a bar has gone on."""
    print("Traceback (most recent call last):\nRuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB")
    print(
        "E1128 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0 (pid: 7)"
    )
    print("Killed")
    from tqdm import tqdm

    for _ in tqdm(range(5), disable=False, mininterval=0):
        pass


def eight_bit_overflow_once():
    """8-bit AdamW in fp16: the first step's gradients overflow, as they may, and large ones are clipped."""
    print("optim: adamw_8bit")
    print({"loss": "2.31", "grad_norm": "inf", "learning_rate": "1e-4"})
    print({"loss": "2.30", "grad_norm": "4021.3", "learning_rate": "1e-4"})
    _steps()


def begun_again():
    """Two trainings in one log: the second one's losses are far above those that the first had reached."""
    for epoch in range(1, 13):
        print({"loss": f"{2.0 / epoch:.3f}", "grad_norm": "0.5", "epoch": f"{epoch / 12:.2f}"})
    for epoch in range(1, 7):
        print({"loss": "2.9", "grad_norm": "0.5", "epoch": f"{epoch / 12:.2f}"})


if __name__ == "__main__":
    import forked

    forked.main(globals(), sys.argv[1:])
