"""An adapter merged into its backbone: the slow, obvious reference of the engine."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..method import kronecker
from .names import KRONECKER

if TYPE_CHECKING:
    from .file import Adapter


def merge(adapter: "Adapter", backbone: Backbone) -> nn.Module:
    """Return a new timm module with an adapter and its head merged in. See `Adapter.merge`."""
    adapter.check(backbone)
    model: Any = copy.deepcopy(backbone.model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer, parts in adapter.layers.items():
            parts = {name: t.to(backbone.device).double() for name, t in parts.items()}
            if "norm_weight" in parts:
                modules[layer].weight.copy_(parts["norm_weight"])
                modules[layer].bias.copy_(parts["norm_bias"])
            else:
                _merge_layer(modules[layer], parts, adapter.config.effective_gain)
        model.reset_classifier(adapter.num_classes)
        heads = model.get_classifier()
        # A distilled DeiT averages the logits of two heads, so both get the adapter's head.
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.to(device=backbone.device, dtype=backbone.dtype)
            head.weight.copy_(adapter.tensors["head.weight"])
            head.bias.copy_(adapter.tensors["head.bias"])
    merged: nn.Module = model.eval().requires_grad_(False)
    return merged


def _merge_layer(linear: nn.Linear, parts: dict[str, Tensor], gain: float) -> None:
    """Merge in float64 and cast once at the end: faster implementations are tested against this one."""
    weight = linear.weight.double()
    bias = linear.bias.double() if linear.bias is not None else weight.new_zeros(weight.shape[0])
    if "karst_c" in parts:
        c, a, b = (parts[name] for name in KRONECKER)
        weight = weight + kronecker.delta(c, a, b, gain)
    if "in_scale" in parts:
        bias = bias + weight @ parts["in_shift"].expand(weight.shape[1])
        weight = weight * parts["in_scale"]
    if "scale" in parts:
        weight = parts["scale"].expand(weight.shape[0])[:, None] * weight
        bias = parts["scale"] * bias + parts["shift"]
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype))
    if linear.bias is not None or bias.any():
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
