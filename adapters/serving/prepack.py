"""Frozen layers in the memory format that a CPU computes fastest.

On a CPU in float32, oneDNN multiplies faster when the weights lie in its own blocked format. Frozen weights are
converted once. The hidden activation of an MLP is computed in place. Both change only rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone import Site

_MLP = ["fc1", "act", "drop1", "norm", "fc2", "drop2"]  # timm's Mlp, where only `act` reads the output of `fc1`


def prepack_layers(model: nn.Module, sites: Sequence[Site]) -> None:
    """Replace the sites of a model, and the activations between them, by faster ones that share no weight.

    The weights are then in memory once, as soon as the caller drops the original model. The result has no autograd
    and cannot be moved to another device or dtype.

    Args:
        model: its modules are replaced, its weights are not changed.
        sites: layers that the forward pass calls, instead of only reading their weight.
    """
    for site in sites:
        parent_name, _, name = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = parent.get_submodule(name)
        if type(linear) is nn.Linear and _can_prepack(linear.weight):
            setattr(parent, name, _PrepackedLinear(linear))
        in_mlp = name == "fc1" and [child for child, _ in parent.named_children()] == _MLP
        if in_mlp and type(parent.act) is nn.GELU:
            parent.act = _InPlaceGELU(parent.act.approximate)


class _PrepackedLinear(nn.Module):
    """A frozen linear layer on oneDNN's inner product, with the operator that torch.compile emits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Plain attributes: the packed weight is opaque, so it can be neither a parameter nor a buffer.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        return y


class _InPlaceGELU(nn.Module):
    """GELU that overwrites its input."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self._approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten.gelu_.default(x, approximate=self._approximate)
        return y


def _can_prepack(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
