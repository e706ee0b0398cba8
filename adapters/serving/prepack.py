"""Frozen layers in the memory format that a CPU computes fastest.

Frozen weights are converted once, each kind of layer into its own form (`frozen_forms`). The hidden activation of an
MLP is computed in place. In float32 both change only rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone import Site
from .frozen_forms import FrozenForms, build, kind_of

_MLP = ["fc1", "act", "drop1", "norm", "fc2", "drop2"]  # timm's Mlp, where only `act` reads the output of `fc1`


def prepack_layers(model: nn.Module, sites: Sequence[Site], forms: FrozenForms) -> None:
    """Replace the sites of a model, and the activations between them, by faster ones that share no weight.

    The weights are then in memory once, as soon as the caller drops the original model. The result has no autograd
    and cannot be moved to another device or dtype.

    Args:
        model: its modules are replaced, its weights are not changed.
        sites: layers that the forward pass calls, instead of only reading their weight.
        forms: of each kind of site.
    """
    for site in sites:
        parent_name, _, name = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = parent.get_submodule(name)
        if type(linear) is nn.Linear:
            setattr(parent, name, build(linear, forms.chosen[kind_of(site)]))
        on_cpu = linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32
        in_mlp = on_cpu and name == "fc1" and [child for child, _ in parent.named_children()] == _MLP
        if in_mlp and type(parent.act) is nn.GELU:
            parent.act = _InPlaceGELU(parent.act.approximate)


class _InPlaceGELU(nn.Module):
    """GELU that overwrites its input."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self._approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten.gelu_.default(x, approximate=self._approximate)
        return y
