"""Typicality of a mixed batch, from the pooled features that the pass has computed anyway."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..method.typicality import Typicality


class DeviceTypicality:
    """An adapter's typicality on the device: one product of the features gives all that a distance needs."""

    def __init__(self, model: Typicality, device: torch.device) -> None:
        self._rows = torch.cat([model.basis, model.mean[None]]).to(device)  # (R + 1, D)
        self._offsets = offsets_of(model).to(device)
        self._rest = float(model.log_precision[-1].exp())
        self._weights = direction_weights(model).to(device)
        self._table = model.table.numpy().astype(float)

    def distance(self, features: Tensor, square: Tensor) -> Tensor:
        """Return the squared distance, 0-d, of float32 features (D,) whose squared norm is `square`."""
        found = torch.addmv(self._offsets, self._rows, features)
        return found.square() @ self._weights + (square - 2 * found[-1]) * self._rest

    def share(self, distance: float) -> float:
        """Return the typicality in [0, 1] for a squared distance."""
        log_distance, log_share = self._table
        at = math.log(max(distance, 1e-30))
        return math.exp(np.interp(at, log_distance, log_share)) if at <= log_distance[-1] else 0.0


def offsets_of(model: Typicality) -> Tensor:
    """Return what is added to the products of features with the basis and the mean, (R + 1,)."""
    return torch.cat([-(model.basis @ model.mean), -model.mean.square().sum()[None] / 2])


def direction_weights(model: Typicality) -> Tensor:
    """Return the weight of each squared product in a distance, (R + 1,), zero for the mean.

    |f - m|^2 is weighted by the last precision; each direction adds its difference to it.
    """
    precision = model.log_precision.exp()
    return torch.cat([precision[:-1] - precision[-1], torch.zeros(1)])


def typicality_of(models: Sequence[DeviceTypicality | None], pooled: Tensor) -> list[float | None]:
    """Return the typicality of pooled features (B, D), each by its own adapter's model; None where there is none."""
    if not any(models):
        return [None] * len(models)
    rows = pooled.float()
    squares = rows.square().sum(1)
    distances = [
        model.distance(row, square) if model else squares.new_zeros(())
        for model, row, square in zip(models, rows, squares, strict=True)
    ]
    found = torch.stack(distances).tolist()  # one copy from the device
    return [model.share(distance) if model else None for model, distance in zip(models, found, strict=True)]
