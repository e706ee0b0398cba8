"""The frozen layers of a model that only serves, in the form in which its device computes them fastest.

On a CPU in float32, `F.linear` reads the weights as they lie; oneDNN is faster when they lie in the order of its own
blocks, and frozen weights need to be brought there only once. The hidden activation of an MLP is computed in place.
Both change rounding at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone import Site

_MLP = ["fc1", "act", "drop1", "norm", "fc2", "drop2"]  # timm's: nobody else has what `act` gets


def quicken(model: nn.Module, sites: Sequence[Site]) -> None:
    """Exchange the sites of a model, and the activations between them.

    Its weights are shared with nobody afterwards, so whoever lets go of the original model has them in memory once.
    No autograd, and no `to` of another device or dtype.

    Args:
        model: changed in place; none of its weights are.
        sites: each is called by the model's forward pass, and does not only lend its weight.
    """
    for site in sites:
        parent_name, _, name = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = parent.get_submodule(name)
        if type(linear) is nn.Linear and _prepacks(linear.weight):
            setattr(parent, name, _PrepackedLinear(linear))
        in_mlp = name == "fc1" and [child for child, _ in parent.named_children()] == _MLP
        if in_mlp and type(parent.act) is nn.GELU:
            parent.act = _InPlaceGELU(parent.act.approximate)


class _PrepackedLinear(nn.Module):
    """A frozen linear layer by oneDNN's inner product, with the operator that torch.compile takes for it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Plain attributes: the packed weight is opaque, so it cannot be a parameter or buffer.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")


class _InPlaceGELU(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self._approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_.default(x, approximate=self._approximate)


def _prepacks(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
