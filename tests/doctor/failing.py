"""Small programs of stock libraries that truly fail, one function each: what the doctor's tests let it read.

    python tests/doctor/failing.py NAME [ARGUMENT]                                     a program alone (or: forked.py)
    python -m torch.distributed.run --nproc_per_node 2 tests/doctor/failing.py NAME    two ranks over gloo

Nothing of the recipe is imported: the doctor must know the failures of any such program.
"""

import os
import resource
import sys


def joined():
    """Rank of this process in a group of gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank()


def mixed_dtypes():
    """LoRA in fp32 beside a bf16 base, in one FSDP1 unit."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    joined()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).bfloat16(), torch.nn.Linear(8, 8))
    FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def uint8_storage():
    """bitsandbytes' default storage of 4-bit weights beside fp32 adapters, in one FSDP unit."""
    import bitsandbytes
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    joined()
    base = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    model = torch.nn.Sequential(base, torch.nn.Linear(64, 64)).to("cpu")
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def optimizer_8bit():
    """bitsandbytes' 8-bit AdamW on parameters that FSDP2 has sharded."""
    import bitsandbytes
    import torch
    from torch.distributed.fsdp import fully_shard

    joined()
    model = torch.nn.Linear(128, 128)
    fully_shard(model)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    model(torch.ones(2, 128)).sum().backward()
    optimizer.step()


def no_input_gradients():
    """Reentrant checkpointing of a layer that only LoRA trains: its input needs no gradient."""
    import torch
    from torch.utils.checkpoint import checkpoint

    embedding, layer = torch.nn.Embedding(10, 8).requires_grad_(False), torch.nn.Linear(8, 8)
    checkpoint(layer, embedding(torch.tensor([1])), use_reentrant=True).sum().backward()


def token_out_of_range():
    import torch

    torch.nn.Embedding(10, 8)(torch.tensor([3, 12]))


def label_out_of_range():
    import torch

    torch.nn.functional.cross_entropy(torch.zeros(2, 5), torch.tensor([1, 7]))


def rank_leaves():
    """Rank 1 has less data than the others and is done first."""
    import torch
    import torch.distributed as dist

    if joined() == 1:
        print("rank 1: no batches left", flush=True)
        os._exit(0)
    for _ in range(3):
        dist.all_reduce(torch.ones(4))


def rank_crashes():
    """Rank 1 reads where nothing is: a segmentation fault, as of a broken extension."""
    import ctypes

    import torch
    import torch.distributed as dist

    if joined() == 1:
        ctypes.string_at(0)
    dist.all_reduce(torch.ones(4))


def rendezvous():
    """One of two ranks, whose peer never comes."""
    import datetime

    import torch.distributed as dist

    rank = int(os.environ.get("AS_RANK", 0))
    dist.init_process_group(
        "gloo", init_method="env://", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=2)
    )


def asks_for_cuda():
    import torch

    torch.nn.Linear(8, 8).to("cuda")


def host_memory():
    import torch

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
    torch.zeros(2**30)


def too_many_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
    print(len(files))


def disk_full():
    """/dev/full answers every write as a full disk does."""
    import torch

    with open("/dev/full", "wb", buffering=0) as file:
        file.write(bytes(torch.zeros(8).numpy()))


def file_limit(folder):
    """A checkpoint that is larger than a file may be."""
    import torch

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    torch.save({"weights": torch.zeros(2**22)}, os.path.join(folder, "checkpoint.pt"))


def missing_package():
    import liger_kernel  # noqa: F401


def old_package():
    from transformers import GreedySearchEncoderOutputOfLater  # noqa: F401


def hub():
    """A model of the hub at HF_ENDPOINT."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained("meta-llama/Llama-3.1-70B")


def pad(folder):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder)(["yes", "yes and no"], padding=True)


def template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


def damaged_checkpoint(folder):
    from safetensors.torch import load_file

    load_file(os.path.join(folder, "model.safetensors"))


def json_rows(file):
    from datasets import load_dataset

    load_dataset("json", data_files=file)


def fp16_gradients():
    """A model loaded in fp16 with a gradient scaler: its masters would have to be fp32."""
    import torch

    layer = torch.nn.Linear(8, 8).half()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    scaler.scale(layer(torch.ones(2, 8).half()).float().sum()).backward()
    scaler.unscale_(optimizer)


def meta_weights():
    import torch

    with torch.device("meta"):
        layer = torch.nn.Linear(8, 8)
    layer.to("cpu")


def recomputed_otherwise():
    """A layer that computes something else the second time, under checkpointing."""
    import torch
    from torch.utils.checkpoint import checkpoint

    calls = []

    def layer(x):
        calls.append(1)
        return (x.exp().sin() if len(calls) == 1 else x.exp()).sum()

    checkpoint(layer, torch.ones(4, requires_grad=True), use_reentrant=False).backward()


def missing_layer_class():
    """FSDP's auto-wrap policy of accelerate with the class of another family."""
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    plugin.set_auto_wrap_policy(torch.nn.Linear(8, 8))


def under_a_bar():
    """As a trainer does it: the bar is drawn once more after the traceback, as if steps went on."""
    import torch
    from tqdm import tqdm

    bar = tqdm(total=5, disable=False)
    embedding = torch.nn.Embedding(10, 8)
    for token in (1, 2, 12):
        embedding(torch.tensor([token]))
        bar.update()


def wrong_module():
    """A failure whose log speaks of others before: a cache that may not be written, a tracker that cannot be reached."""
    print("mbind: Operation not permitted")
    print("Max retries exceeded with url: /graphql (the tracker's server; it is tried again later)")
    print("NCCL WARN Call to ibv_open_device failed")
    import recipe_of_another_name  # noqa: F401


if __name__ == "__main__":
    import forked

    forked.main(globals(), sys.argv[1:])
