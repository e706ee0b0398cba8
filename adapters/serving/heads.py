"""Many heads on the same features: one product for all of them.

A task without kernels is a head on the frozen features. A thousand such tasks share one row of a forward pass and need
no slots. Stacked, their heads and their typicality cost two products of the features.

Axes: K classes of all heads together, H heads, D features, R directions of all typicality models together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..method.typicality import Typicality
from ..short_repr import short_repr
from .slot_memory import Packed
from .typicality import direction_weights, offsets_of


class HeadScores(NamedTuple):
    """Answers of all heads to one image."""

    logits: Tensor  # (K,), in the backbone's dtype; the classes of one head behind those of another
    typicality: NDArray[np.float64]  # (H,), in [0, 1]; NaN for a head without typicality


class Heads:
    """The heads of several adapters without kernels, stacked on the device. `Bank.heads` makes it.

    Attributes:
        classes: number of classes of each head.
    """

    __repr__ = short_repr

    def __init__(self, adapters: Sequence[Packed], width: int, device: torch.device) -> None:
        """
        Args:
            adapters: at least one; heads only.
            width: D.

        Raises:
            ValueError: no adapter, or one that changes the backbone's features.
        """
        if not adapters:
            raise ValueError("got no adapter; pass at least one")
        for i, packed in enumerate(adapters):
            if not packed.is_head:
                raise ValueError(f"adapter {i} changes the backbone's features, so it is not only a head; put it")
        self.classes = [packed.classes for packed in adapters]
        parts = [packed.flat.split([packed.classes * width, packed.classes]) for packed in adapters]
        self._weight = torch.cat([weight for weight, _ in parts]).view(-1, width).to(device)
        self._bias = torch.cat([bias for _, bias in parts]).to(device)
        self._starts = np.cumsum([0, *self.classes[:-1]])
        found = [(i, p.typicality) for i, p in enumerate(adapters) if p.typicality is not None]
        self._typicality = _StackedTypicality([model for _, model in found], device) if found else None
        self._with_typicality = [i for i, _ in found]

    @property
    def size_bytes(self) -> int:
        """Memory of the stacked numbers, in bytes."""
        extra = self._typicality.size_bytes if self._typicality is not None else 0
        return self._weight.nbytes + self._bias.nbytes + extra

    @torch.inference_mode()
    def score(self, features: Tensor) -> HeadScores:
        """Return the answers of all heads to one image's frozen features (D,)."""
        logits = torch.addmv(self._bias, self._weight, features)
        typicality = np.full(len(self.classes), np.nan)
        if self._typicality is not None:
            typicality[self._with_typicality] = self._typicality.shares(features.float())
        return HeadScores(logits, typicality)

    def probabilities(self, logits: Tensor) -> NDArray[np.float32]:
        """Return the softmax of each head's own logits, float32 (K,), NaN where a head's numbers overflow."""
        x: NDArray[np.float32] = logits.float().cpu().numpy()
        with np.errstate(all="ignore"):
            x = np.exp(x - np.repeat(np.maximum.reduceat(x, self._starts), self.classes))
            found: NDArray[np.float32] = x / np.repeat(np.add.reduceat(x, self._starts), self.classes)
        return found


class _StackedTypicality:
    """The typicality models of several adapters (see `DeviceTypicality`): one product gives all distances."""

    def __init__(self, models: Sequence[Typicality], device: torch.device) -> None:
        self._rows = torch.cat([torch.cat([m.basis, m.mean[None]]) for m in models]).to(device)  # (R, D)
        self._offsets = torch.cat([offsets_of(m) for m in models]).to(device)
        self._weights = torch.cat([direction_weights(m) for m in models]).to(device)
        lengths = torch.tensor([len(m.basis) + 1 for m in models])
        self._model_of = torch.arange(len(models)).repeat_interleave(lengths).to(device)
        self._means = (lengths.cumsum(0) - 1).to(device)  # each model's last row
        self._rest = torch.stack([m.log_precision[-1].exp() for m in models]).to(device)
        # Tables of different lengths, padded: no distance is beyond infinity.
        longest = max(m.table.shape[1] for m in models)
        self._distances = np.full((len(models), longest + 1), np.inf)
        self._shares = np.zeros((len(models), longest + 1))
        for i, model in enumerate(models):
            points = model.table.shape[1]
            self._distances[i, :points], self._shares[i, :points] = model.table.numpy()
            self._shares[i, points:] = self._shares[i, points - 1]
        self._last = np.array([float(m.table[0, -1]) for m in models])

    @property
    def size_bytes(self) -> int:
        return int(self._rows.nbytes + self._distances.nbytes + self._shares.nbytes)

    def shares(self, features: Tensor) -> NDArray[np.float64]:
        """Return the typicality of float32 features (D,) by each model."""
        found = torch.addmv(self._offsets, self._rows, features)
        along = torch.zeros_like(self._rest).index_add_(0, self._model_of, found.square() * self._weights)
        distances = along + (features.square().sum() - 2 * found[self._means]) * self._rest
        at = np.log(np.maximum(distances.cpu().numpy().astype(float), 1e-30))
        rows = np.arange(len(at))
        below = np.maximum((self._distances <= at[:, None]).sum(1) - 1, 0)
        low, high = self._distances[rows, below], self._distances[rows, below + 1]
        part = np.clip((at - low) / (high - low), 0.0, 1.0)
        first, second = self._shares[rows, below], self._shares[rows, below + 1]
        found_shares: NDArray[np.float64] = np.where(at <= self._last, np.exp(first + part * (second - first)), 0.0)
        return found_shares
