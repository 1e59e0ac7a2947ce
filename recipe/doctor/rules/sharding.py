"""FSDP, LoRA and quantised weights that do not go together."""

from __future__ import annotations

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.rules.numbers import NAN_LOSS, nan_steps, spike
from recipe.doctor.scan import LOSSES, Line, Mark

UNEQUAL = "expects uniform original parameter dtype"
FLATTEN = "Must flatten tensors with uniform dtype"
OURS = "or use `make train`, which cuts and gathers packed layers as plain bytes"


WHOLE_MODEL = (
    "pytorch_model_fsdp",
    "save_fsdp_model",
    "FULL_STATE_DICT",
    "model-00001-of-",
)


def _frozen_base_saved(case: Case) -> list[Line]:
    """No room left while whole model files were being written."""
    full = case.found("No space left on device") + case.found("Disk quota exceeded")
    return full and [*full[:2], *[line for mark in WHOLE_MODEL for line in case.found(mark)][:2]]


RULES = (
    Rule(
        "uint8_storage",
        "4-bit weights are stored as uint8, which FSDP cannot shard",
        "FSDP shards floating parameters of one dtype per unit. accelerate leaves uint8 weights out, so that each GPU "
        "holds the whole model (accelerate issue 3983, PR 3987); without accelerate it fails as here.",
        f"set bnb_4bit_quant_storage to the dtype that FSDP gathers in (torch.bfloat16), {OURS}",
        marks=(
            Mark(UNEQUAL, rf"{UNEQUAL}.*torch\.uint8"),
            Mark(FLATTEN, rf"{FLATTEN}.*torch\.uint8"),
            "Cannot flatten integer dtype tensors",
            Mark("Params4bit", r"(?i)(exclud|ignor)\w{,9}.{,200}Params4bit|Params4bit.{,200}(exclud|ignor)"),
        ),
        over=("mixed_dtypes", "cuda_out_of_memory", "out_of_memory_before_step_1"),
    ),
    Rule(
        "mixed_dtypes",
        "Parameters of several dtypes are in one FSDP unit",
        "LoRA in fp32 beside a bf16 base, or quant storage of another dtype than the rest: FSDP keeps a unit in one "
        "tensor, which has one dtype.",
        "give all the same dtype (torch_dtype = bnb_4bit_quant_storage = bf16, adapters cast to it), or wrap the LoRA "
        f"layers apart (peft.utils.other.fsdp_auto_wrap_policy); {OURS}",
        marks=(FLATTEN, UNEQUAL),
    ),
    Rule(
        "mixed_requires_grad",
        "Frozen and trained parameters are in one FSDP unit",
        "FSDP1 with use_orig_params=False keeps a unit in one tensor, which is trained as a whole or not at all.",
        "set fsdp_use_orig_params: true, or wrap LoRA layers apart (peft.utils.other.fsdp_auto_wrap_policy)",
        marks=(
            "Must flatten tensors with uniform `requires_grad`",
            "Must flatten tensors with uniform requires_grad",
        ),
    ),
    Rule(
        "optimizer_8bit",
        "An 8-bit optimizer was given sharded parameters",
        "bitsandbytes' 8-bit states are quantised in blocks that sharding cuts; it does not know DTensor, and with "
        "offload its states explode (the article's table).",
        "use 32-bit AdamW (optim='adamw_torch_fused'): for LoRA its states are small, 1.5 GiB for 70B over all GPUs",
        marks=(
            Mark("optimizer_update_8bit", r"optimizer_update_8bit.{,300}(DTensor|Error|got mixed)"),
            Mark("train.optimizer", r"train\.optimizer is .?adamw_8bit"),
        ),
        over=("mixed_tensors", "request", "loss_spike", "nan_loss", "gradient_explosion"),
    ),
    Rule(
        "eight_bit_adam_explodes",
        "Training with 8-bit Adam under sharding or offload has blown up",
        "Block-wise 8-bit states are unreliable where their parameters are sharded or offloaded (the article's table).",
        "use 32-bit AdamW (optim='adamw_torch_fused') and start again from a checkpoint before the spike",
        find=lambda case: nan_steps(case) or spike(case),
        reads=(*NAN_LOSS, *LOSSES),
        needs=(Mark("8bit", r"(adamw|paged_adamw|adam)_(bnb_)?8bit|AdamW8bit"),),
        certainty="likely",
        when="unfinished",
        over=("nan_loss", "loss_spike", "gradient_explosion"),
    ),
    Rule(
        "mixed_tensors",
        "Sharded and plain tensors were mixed in one operation",
        "Parameters became DTensors after something had kept or made plain ones (an optimizer of before, a buffer, a cast).",
        "shard first, then build the optimizer and add what belongs to the model; update accelerate and peft together",
        marks=("got mixed torch.Tensor and DTensor",),
    ),
    Rule(
        "lora_fsdp_resume",
        "A LoRA run under FSDP cannot be resumed",
        "The checkpoint holds adapters only, the resuming trainer looks for a whole model (transformers issues 28320 and "
        "31892).",
        "train with `make train`, whose checkpoints hold LoRA, optimizer and data position and are resumed by the same "
        "RUN=; or load the adapters with PeftModel.from_pretrained(..., is_trainable=True) and give up the optimizer",
        marks=(
            "Can't find a valid checkpoint at",
            Mark("load_sharded_checkpoint", r"load_sharded_checkpoint"),
            Mark(
                "Missing key(s) in state_dict",
                r"Missing key\(s\) in state_dict.*(lora|base_model|_fsdp_wrapped)",
            ),
            "can't find pytorch_model_fsdp",
        ),
        certainty="likely",
        over=("missing_file",),
    ),
    Rule(
        "half_adapter",
        "The saved adapter has not all of its values",
        "FSDP2 with PEFT and FULL_STATE_DICT kept only rank 0's slices: half of the adapter is lost on two GPUs "
        "(accelerate PR 4206); under ZeRO-3 the same shows as shapes of 0 (peft issue 1443).",
        "update accelerate, save again from a live model, and compare by `make export-adapters`, which loads the adapters "
        "in plain PEFT and compares the held-out loss",
        marks=(
            Mark("size mismatch for", r"size mismatch for .*lora_[AB].*torch\.Size\(\["),
            Mark("lora_", r"(?i)missing (adapter )?keys?.*lora_[AB]"),
            "held-out loss differs",
        ),
        certainty="likely",
    ),
    Rule(
        "frozen_base_in_checkpoint",
        "The disk was filled by copies of the frozen base model",
        "A trainer that saves the whole model writes 37 GB for 70B in NF4 at every checkpoint, of which LoRA is 0.4 GB.",
        "save adapters only (`make train` never writes the base), lower save_total_limit, and delete old checkpoints",
        find=_frozen_base_saved,
        reads=("No space left on device", "Disk quota exceeded"),
        needs=WHOLE_MODEL,
        certainty="likely",
        over=("disk_full",),
    ),
    Rule(
        "no_input_gradients",
        "Nothing in the loss needs a gradient",
        "Reentrant gradient checkpointing cuts the graph where a layer's input needs no gradient, as with a frozen "
        "embedding under LoRA; or no adapter is trained at all.",
        "model.enable_input_require_grads() before PEFT, or gradient_checkpointing_kwargs={'use_reentrant': False}; see "
        "that print_trainable_parameters() is not 0",
        marks=("does not require grad and does not have a grad_fn",),
    ),
    Rule(
        "recomputed_otherwise",
        "A checkpointed layer computed something else the second time",
        "What is recomputed for the backward must be what the forward computed: caches, random numbers or modules "
        "moved in between (trl issue 4314).",
        "set use_cache=False, use_reentrant=True, and enable checkpointing after FSDP has wrapped the model",
        marks=(
            "torch.utils.checkpoint.CheckpointError",
            "A different number of tensors was saved during the original forward",
            "Recomputed values for the following tensors have different metadata",
        ),
    ),
    Rule(
        "meta_weights",
        "Weights were never loaded",
        "Parameters are still on the meta device, which has shapes and no values: a rank other than 0 under "
        "cpu_ram_efficient_loading, or a module that the loader did not reach.",
        "set fsdp_sync_module_states: true with fsdp_cpu_ram_efficient_loading, or use to_empty() and load",
        marks=(
            "Cannot copy out of meta tensor",
            "is on the meta device",
            "on the meta device, because they were not in",
        ),
    ),
    Rule(
        "unknown_layer_class",
        "FSDP was told to wrap a layer class that the model has not",
        "fsdp_transformer_layer_cls_to_wrap names the decoder layer of another family.",
        "remove fsdp_transformer_layer_cls_to_wrap (the model names its own), or set it to its class (LlamaDecoderLayer, "
        "Qwen2DecoderLayer, ...)",
        marks=("Could not find the transformer layer class",),
    ),
    Rule(
        "quantised_elsewhere",
        "A quantised model was loaded on another device than it trains on",
        "4-bit weights are made on the device that loads them and cannot be moved by the trainer.",
        "device_map={'': int(os.environ['LOCAL_RANK'])} without FSDP; none with FSDP",
        marks=(
            "loaded in 8-bit or 4-bit precision on a different device",
            "`.to` is not supported for `4-bit`",
            "FP4 quantization state not initialized",
        ),
    ),
    Rule(
        "quantised_without_adapters",
        "A quantised model cannot be trained without adapters",
        "4-bit weights have no gradients; only adapters on top of them are trained.",
        "attach LoRA first: get_peft_model(model, LoraConfig(...)), or pass peft_config to the trainer",
        marks=(
            "cannot perform fine-tuning on purely quantized models",
            "You cannot fine-tune purely quantized",
        ),
    ),
)
