"""One decoder layer, forward and backward by hand: nothing is computed or kept that no gradient needs.

The frozen matrices need no gradient, so a layer's backward is the gradients of its inputs and of LoRA. Written out:
LoRA's products are accumulated into the base outputs; q, k, v and gate, up share one pass over their input; the MLP
runs in chunks of tokens, so that its wide activations never exist for all of them; down_proj is never recomputed; and
whatever a plan keeps of a layer's forward (`Keep`) is not computed again. `plain.py` is the same by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipe.engine import kernels
from recipe.engine.attention import Attended, Attention, Documents
from recipe.engine.kernels import Dropout
from recipe.engine.lora import LoraView
from recipe.engine.products import mm32
from recipe.engine.weights import LayerView
from recipe.plan.shapes import ModelShape

GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward share. dropout: probability, and the number that its masks are drawn from."""

    documents: Documents
    cosine: torch.Tensor
    sine: torch.Tensor
    dropout: float = 0.0
    draw: int = 0


Kept = dict[str, torch.Tensor]


class Workspace:
    """Room for dequantised matrices, made once: `slots` of the largest. Three hold a whole MLP."""

    def __init__(self, shape: ModelShape, slots: int, device: torch.device, dtype: torch.dtype):
        largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
        self._slots = [torch.empty(largest, device=device, dtype=dtype) for _ in range(slots)]
        self._holds: list[tuple[int, str] | None] = [None] * slots
        self._order = list(range(slots))

    def matrix(self, layer: LayerView, name: str) -> torch.Tensor:
        """(out, in) in the compute dtype; valid until as many others as there are slots were asked for."""
        key, weight = (layer.index, name), layer.weight(name)
        outputs, inputs = weight.shape
        place = self._holds.index(key) if key in self._holds else self._order[0]
        out = self._slots[place][: outputs * inputs].view(outputs, inputs)
        if self._holds[place] != key:
            kernels.dequantize_nf4(weight.packed, weight.absmax, weight.nested, out)
            self._holds[place] = key
        self._order.remove(place)
        self._order.append(place)
        return out


class FusedLayer:
    """The arithmetic of every layer of a model.

    windows: the sliding window of each layer, or None. mlp_chunk: tokens of the MLP at once.
    """

    def __init__(
        self,
        shape: ModelShape,
        eps: float,
        scale: float,
        attention: Attention,
        windows: list[int | None],
        workspace: Workspace,
        mlp_chunk: int,
    ):
        self.shape, self.eps, self.scale = shape, eps, scale
        self.attention, self.windows = attention, windows
        self.workspace, self.mlp_chunk = workspace, mlp_chunk

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, layer: LayerView, step: Pass, keep: frozenset[str]):
        """x (tokens, hidden) -> output (tokens, hidden), and what was kept. x itself is left as it is."""
        kept: Kept = {}
        q, k, v = self._qkv(x, layer, step)
        attended = self.attention.forward(q, k, v, step.documents, self.windows[layer.index])
        if "qkv" in keep:
            kept |= {"q": q, "k": k, "v": v}
        del q, k, v
        if "attention" in keep:
            kept |= {"out": attended.out} | {f"extra{i}": t for i, t in enumerate(attended.extra)}
        middle = self._middle(x, attended.out, layer, step)
        del attended
        out = middle
        if "middle" in keep:
            kept["middle"] = middle
            out = middle.clone()
        if "gate_up" in keep:
            kept["gate"], kept["up"] = (
                x.new_empty(x.shape[0], self.shape.intermediate) for _ in ("gate", "up")
            )
        for rows in self._chunks(x.shape[0]):
            part = out[rows]
            n2 = kernels.rms_norm(part, layer.small["post_attention_layernorm.weight"], self.eps)
            down = self._down(n2, layer, "gate_up", step, rows.start)
            gate, up = (
                self._base(n2, layer, name, kept[key][rows] if key in kept else None)
                for name, key in (("gate_proj", "gate"), ("up_proj", "up"))
            )
            lora = [self._low_rank(layer, "gate_up", name, down) for name in ("gate_proj", "up_proj")]
            h = kernels.swiglu(gate, up, lora[0], lora[1], out=None if "gate_up" in keep else gate)
            del gate, up
            self._add_base(part, h, layer, "down_proj")
            self._add_lora(part, layer, "down", "down_proj", self._down(h, layer, "down", step, rows.start))
        return out, kept

    def _chunks(self, tokens: int) -> list[slice]:
        return [
            slice(start, min(start + self.mlp_chunk, tokens)) for start in range(0, tokens, self.mlp_chunk)
        ]

    def _qkv(self, x: torch.Tensor, layer: LayerView, step: Pass, plain: dict | None = None):
        """Rotated q, k, and v as (tokens, heads, head_dim). `plain` collects q and k before their norms (Qwen3)."""
        n1 = kernels.rms_norm(x, layer.small["input_layernorm.weight"], self.eps)
        down = self._down(n1, layer, "qkv", step)
        heads = []
        for name in ("q_proj", "k_proj", "v_proj"):
            y = self._base(n1, layer, name)
            self._add_lora(y, layer, "qkv", name, down)
            y = y.view(x.shape[0], -1, self.shape.head_dim)
            norm = layer.small.get(f"self_attn.{name[0]}_norm.weight")
            if norm is not None:
                if plain is not None:
                    plain[name] = y
                y = kernels.rms_norm(y.flatten(0, 1), norm, self.eps).view(y.shape)
            if name != "v_proj":
                kernels.rope_(y, step.cosine, step.sine)
            heads.append(y)
        return heads

    def _middle(self, x: torch.Tensor, attended: torch.Tensor, layer: LayerView, step: Pass) -> torch.Tensor:
        """The residual stream between attention and MLP."""
        o = attended.flatten(1)
        middle = x.clone()
        self._add_base(middle, o, layer, "o_proj")
        self._add_lora(middle, layer, "o", "o_proj", self._down(o, layer, "o", step))
        return middle

    def _base(self, x, layer: LayerView, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """x @ W.T, and the bias where there is one."""
        matrix, bias = self.workspace.matrix(layer, name), _bias(layer, name)
        if bias is None:
            return torch.mm(x, matrix.t(), out=out)
        return torch.addmm(bias, x, matrix.t(), out=out)

    def _add_base(self, out: torch.Tensor, x: torch.Tensor, layer: LayerView, name: str) -> None:
        out.addmm_(x, self.workspace.matrix(layer, name).t())
        bias = _bias(layer, name)
        if bias is not None:
            out.add_(bias)

    # -- LoRA -----------------------------------------------------------------------------------------------------

    def _down(self, x, layer: LayerView, group: str, step: Pass, row0: int = 0) -> torch.Tensor | None:
        """scale * dropout(x) @ A.T for all adapters that read x: (tokens, ranks); None where none does."""
        if group not in layer.lora.a:
            return None
        down = kernels.lora_down(x, layer.lora.a[group], _dropout(layer, group, step), row0)
        return down if self.scale == 1 else down.mul_(self.scale)

    def _low_rank(self, layer: LayerView, group: str, name: str, down: torch.Tensor | None):
        if down is None or name not in layer.lora.b:
            return None
        return down[:, layer.lora.columns_of(group, name)], layer.lora.b[name]

    def _add_lora(self, out, layer: LayerView, group: str, name: str, down: torch.Tensor | None) -> None:
        low_rank = self._low_rank(layer, group, name, down)
        if low_rank is not None:
            out.addmm_(low_rank[0], low_rank[1].t())

    def _group_backward(
        self,
        grads: dict[str, torch.Tensor],
        x: torch.Tensor,
        layer: LayerView,
        group: str,
        step: Pass,
        sink: LoraView,
        row0: int = 0,
        down: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradients of the outputs by module -> gradient of x, LoRA's added to `sink`."""
        dx: torch.Tensor | None = None
        for name, grad in grads.items():
            matrix = self.workspace.matrix(layer, name)
            dx = grad @ matrix if dx is None else dx.addmm_(grad, matrix)
        assert dx is not None
        self._lora_backward(dx, grads, x, layer, group, step, sink, row0, down)
        return dx

    def _lora_backward(self, dx, grads, x, layer: LayerView, group: str, step: Pass, sink, row0=0, down=None):
        """What LoRA adds to the gradient of x, in place, and its own gradients."""
        if group not in layer.lora.a:
            return
        if down is None:
            down = self._down(x, layer, group, step, row0)
        ddown = self._ddown(grads, layer, group)
        for name in layer.lora.members[group]:
            sink.b[name].add_(mm32(grads[name].t(), down[:, layer.lora.columns_of(group, name)]))
        dropout = _dropout(layer, group, step)
        sink.a[group].add_(kernels.lora_down_grad(ddown, x, dropout, row0))
        kernels.lora_down_input_grad_(dx, ddown, layer.lora.a[group], dropout, row0)

    def _ddown(self, grads: dict[str, torch.Tensor], layer: LayerView, group: str) -> torch.Tensor:
        """Gradient of dropout(x) @ A.T for all adapters of a group."""
        members = layer.lora.members[group]
        first = grads[members[0]]
        ddown = first.new_empty(first.shape[0], layer.lora.rank * len(members))
        for name in members:
            torch.mm(grads[name], layer.lora.b[name], out=ddown[:, layer.lora.columns_of(group, name)])
        return ddown if self.scale == 1 else ddown.mul_(self.scale)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, kept: Kept, layer: LayerView, step: Pass, sink: LoraView
    ) -> torch.Tensor:
        """grad (tokens, hidden) of the output -> gradient of x; LoRA's are added to `sink`. Overwrites grad and kept."""
        window = self.windows[layer.index]
        plain: dict[str, torch.Tensor] = {}
        normed = any(f"self_attn.{name}_norm.weight" in layer.small for name in "qk")
        if "q" in kept and not normed:
            q, k, v = kept.pop("q"), kept.pop("k"), kept.pop("v")
        else:
            q, k, v = self._qkv(x, layer, step, plain)
        if "out" in kept:
            attended = Attended(
                kept.pop("out"), tuple(kept[f"extra{i}"] for i in range(len(kept)) if f"extra{i}" in kept)
            )
        else:
            attended = self.attention.forward(q, k, v, step.documents, window)
        middle = kept.pop("middle") if "middle" in kept else self._middle(x, attended.out, layer, step)
        for rows in self._chunks(x.shape[0]):
            self._mlp_backward(grad, middle, rows, kept, layer, step, sink)
        del middle
        kept.clear()
        # grad is now that of the residual stream between attention and MLP.
        o = attended.out.flatten(1)
        do = self._group_backward({"o_proj": grad}, o, layer, "o", step, sink).view(q.shape)
        grads = self.attention.backward(do, q, k, v, attended, step.documents, window)
        del do, o, attended, q, k, v
        by_name = dict(zip(("q_proj", "k_proj", "v_proj"), grads, strict=True))
        del grads
        for name in ("q_proj", "k_proj"):
            by_name[name] = by_name[name].contiguous()
            kernels.rope_(by_name[name], step.cosine, step.sine, inverse=True)
            norm = layer.small.get(f"self_attn.{name[0]}_norm.weight")
            if norm is not None:
                before = plain.pop(name)
                by_name[name] = kernels.rms_norm_backward(
                    by_name[name].flatten(0, 1), before.flatten(0, 1), norm, self.eps, None
                ).view(before.shape)
        n1 = kernels.rms_norm(x, layer.small["input_layernorm.weight"], self.eps)
        flat = {name: tensor.flatten(1) for name, tensor in by_name.items()}
        del by_name
        dn1 = self._group_backward(flat, n1, layer, "qkv", step, sink)
        del flat, n1
        return kernels.rms_norm_backward(dn1, x, layer.small["input_layernorm.weight"], self.eps, grad)

    def _mlp_backward(
        self, grad, middle, rows: slice, kept: Kept, layer: LayerView, step: Pass, sink
    ) -> None:
        """The MLP's part for some tokens: grad[rows] of the layer's output becomes that of `middle`."""
        part, dout, row0 = middle[rows], grad[rows], rows.start
        n2 = kernels.rms_norm(part, layer.small["post_attention_layernorm.weight"], self.eps)
        down = self._down(n2, layer, "gate_up", step, row0)
        names = ("gate_proj", "up_proj")
        gate, up = (
            kept[key][rows] if key in kept else self._base(n2, layer, name)
            for name, key in zip(names, ("gate", "up"), strict=True)
        )
        dh = dout @ self.workspace.matrix(layer, "down_proj")
        if "down" in layer.lora.a:
            ddown = self._ddown({"down_proj": dout}, layer, "down")
            dropout = _dropout(layer, "down", step)
            kernels.lora_down_input_grad_(dh, ddown, layer.lora.a["down"], dropout, row0)
        low_rank = [self._low_rank(layer, "gate_up", name, down) for name in names]
        dgate, dup, h = kernels.swiglu_backward_(dh, gate, up, *low_rank)
        if "down" in layer.lora.a:
            hdown = self._down(h, layer, "down", step, row0)
            sink.b["down_proj"].add_(mm32(dout.t(), hdown))
            sink.a["down"].add_(kernels.lora_down_grad(ddown, h, dropout, row0))
        del dh, h
        grads = {"gate_proj": dgate, "up_proj": dup}
        del gate, up, dgate, dup
        dn2 = self._group_backward(grads, n2, layer, "gate_up", step, sink, row0, down)
        del grads
        dout.copy_(
            kernels.rms_norm_backward(
                dn2, part, layer.small["post_attention_layernorm.weight"], self.eps, dout
            )
        )


def _bias(layer: LayerView, name: str) -> torch.Tensor | None:
    folder = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return layer.small.get(f"{folder}.{name}.bias")


def _dropout(layer: LayerView, group: str, step: Pass) -> Dropout | None:
    """The mask of a group's input. Adapters that read the same input share it; each still drops its share."""
    if step.dropout == 0:
        return None
    number = (step.draw << 16) + layer.index * 4 + ("qkv", "o", "gate_up", "down").index(group)
    mixed = _mix64(number * GOLDEN)
    return Dropout(step.dropout, (mixed & 0xFFFFFFFF, mixed >> 32))


def _mix64(value: int) -> int:
    """splitmix64's finaliser: neighbouring numbers give unrelated keys."""
    value &= 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ value >> shift) * factor) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
