"""The plain way beside the fused one: transformers' decoder layer with PEFT's LoRA, its backward by autograd.

Slower and larger, and it shares no arithmetic with layer.py: what both agree on is right. `compute.kernels: plain`
chooses it.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from recipe.engine.layer import Kept, Pass
from recipe.engine.layout import BLOCK, MODULES, NESTED_BLOCK, Weight
from recipe.engine.lora import LoraView
from recipe.engine.nf4 import NF4Linear
from recipe.engine.weights import LayerView


class PlainLayer:
    """Runs each layer of `layers` (transformers' own modules on the meta device) on the tensors of a LayerView."""

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self._code: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, layer: LayerView, step: Pass, keep: frozenset[str]):
        """x (tokens, hidden) -> output; all that is kept is the random state, for the same dropout in the backward."""
        kept = {"extra_cpu": torch.get_rng_state()}
        if x.is_cuda:
            kept["extra_cuda"] = torch.cuda.get_rng_state(x.device)
        return self._run(x, layer, self._lora(layer.lora), step), kept

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, kept: Kept, layer: LayerView, step: Pass, sink: LoraView
    ) -> torch.Tensor:
        """grad (tokens, hidden) -> gradient of x; LoRA's are added to `sink`."""
        leaf = x.detach().requires_grad_()
        lora = {name: tensor.detach().requires_grad_() for name, tensor in self._lora(layer.lora).items()}
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.enable_grad():
            torch.set_rng_state(kept["extra_cpu"])
            if x.is_cuda:
                torch.cuda.set_rng_state(kept["extra_cuda"], x.device)
            out = self._run(leaf, layer, lora, step)
        dx, *gradients = torch.autograd.grad(out, [leaf, *lora.values()], grad)
        sums = self._lora(sink)
        for name, gradient in zip(lora, gradients, strict=True):
            sums[name].add_(gradient)
        return dx

    def _run(self, x: torch.Tensor, layer: LayerView, lora: dict[str, torch.Tensor], step: Pass):
        module = self.layers[layer.index]
        module.train(step.dropout > 0)  # PEFT's dropout goes by this mode, and evaluation has none
        tensors = dict(layer.small)
        for name in list(tensors):
            folder, _, key = name.rpartition(".")
            if key == "bias" and isinstance(module.get_submodule(folder), BaseTunerLayer):
                tensors[f"{folder}.base_layer.bias"] = tensors.pop(name)
        for name, place in MODULES.items():
            linear = module.get_submodule(place)
            adapted = isinstance(linear, BaseTunerLayer)
            if adapted:
                linear._disable_adapters = (
                    not lora
                )  # its setter would also take the parameters out of training
                linear = linear.base_layer
            assert isinstance(linear, NF4Linear)
            weight = layer.weight(name)
            linear.quant_state = quant_state(weight, x.dtype)
            tensors[f"{place}.base_layer.weight" if adapted else f"{place}.weight"] = weight.packed.view(
                -1, 1
            )
        documents = step.documents
        out = torch.func.functional_call(
            module,
            {**tensors, **lora},
            (x[None],),
            {
                "position_embeddings": (step.cosine[None], step.sine[None]),
                "attention_mask": None,
                "cu_seq_lens_q": documents.bounds,
                "cu_seq_lens_k": documents.bounds,
                "max_length_q": documents.longest,
                "max_length_k": documents.longest,
            },
        )
        return (out[0] if isinstance(out, tuple) else out)[0]

    @staticmethod
    def _lora(view: LoraView) -> dict[str, torch.Tensor]:
        """By the names that PEFT gives them within a layer."""
        named = {}
        for group, members in view.members.items():
            for module in members:
                rows = view.columns_of(group, module)
                named[f"{MODULES[module]}.lora_A.default.weight"] = view.a[group][rows]
                named[f"{MODULES[module]}.lora_B.default.weight"] = view.b[module]
        return named


def quant_state(weight: Weight, dtype: torch.dtype) -> QuantState:
    """bitsandbytes' description of a matrix; `dtype` is what it is dequantised to."""
    device = weight.packed.device
    common = {
        "code": get_4bit_type("nf4", device=device),
        "blocksize": BLOCK,
        "quant_type": "nf4",
        "dtype": dtype,
    }
    if weight.nested is None:
        return QuantState(absmax=weight.absmax, shape=torch.Size(weight.shape), **common)
    inner = QuantState(
        absmax=weight.nested.absmax, blocksize=NESTED_BLOCK, code=weight.nested.code, dtype=torch.float32
    )
    offset = torch.tensor(weight.nested.offset, device=device)
    return QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), offset=offset, state2=inner, **common
    )
