"""Typicality: how much an image looks like the images of a task, as a number with a defined meaning.

The pooled features of a task's images are modelled as one Gaussian whose covariance has a few wide directions and is
the same in all others (probabilistic PCA; Tipping and Bishop, 1999). The squared Mahalanobis distance of an image's
features is looked up in a table, made from distances of held-out images of the task. The result, `typicality`, is the
share of held-out images that look less typical: 0.5 is average, 0.01 is rarer than 99 of 100.

The model recognises foreign images: pictures of another subject, an empty frame, a broken camera. An unseen class of
the same subject often looks typical.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..format.names import TYPICALITY, TYPICALITY_PREFIX
from ..short_repr import short_repr

RANK = 32  # directions that are kept; 64 refuse half a percent more foreign images, for twice the size
SHRINKAGE = 0.1  # added to every variance, in units of their mean
TAIL = tuple(10.0**-exponent for exponent in range(2, 9))  # probabilities beyond the held-out images
QUANTILES = 33
FOLDS, MANY_FOLDS, FEW_IMAGES = 10, 20, 500  # more folds where each training part would miss much


@dataclass(frozen=True)
class Typicality:
    """Gaussian of a task's features, and the table that turns distances into shares.

    Attributes:
        mean: float32 (D,).
        basis: float32 (R, D), orthonormal directions.
        log_precision: float32 (R + 1,), log of the inverse variance along each direction, and in all others.
        table: float32 (2, Q), log distances in rising order, and the log of the share of held-out images beyond.
    """

    mean: Tensor
    basis: Tensor
    log_precision: Tensor
    table: Tensor

    __repr__ = short_repr

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in a `karst/1` file."""
        return {TYPICALITY_PREFIX + name: getattr(self, name) for name in TYPICALITY}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Typicality | None":
        """Return the model in an adapter's tensors, or None if the file has none."""
        if f"{TYPICALITY_PREFIX}mean" not in tensors:
            return None
        return cls(*(tensors[TYPICALITY_PREFIX + name].float() for name in TYPICALITY))

    def distances(self, features: Tensor) -> Tensor:
        """Return squared Mahalanobis distances (B,) of features (B, D)."""
        centred = features.float() - self.mean
        along = centred @ self.basis.T  # (B, R)
        rest = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0)
        precision = self.log_precision.exp()
        return along.square() @ precision[:-1] + rest * precision[-1]

    def shares(self, distances: Tensor) -> Tensor:
        """Return typicality in [0, 1], (B,), for squared distances (B,)."""
        return lookup(self.table, distances)

    def __call__(self, features: Tensor) -> Tensor:
        """Return typicality in [0, 1], (B,), of features (B, D)."""
        return self.shares(self.distances(features))


def lookup(table: Tensor, distances: Tensor) -> Tensor:
    """Interpolate log shares between the table's log distances; 0 beyond its end."""
    log_distance, log_share = table
    at = distances.clamp_min(1e-30).log()
    right = torch.searchsorted(log_distance, at.contiguous()).clamp(1, len(log_distance) - 1)
    x0, x1 = log_distance[right - 1], log_distance[right]
    y0, y1 = log_share[right - 1], log_share[right]
    part = ((at - x0) / (x1 - x0)).clamp(0, 1)
    return torch.where(at > log_distance[-1], 0.0, (y0 + part * (y1 - y0)).exp())


def fit_typicality(features: Tensor) -> Typicality:
    """Fit the Gaussian to all images, and the table to the distance that each image has when it is left out.

    Args:
        features: (n, D) pooled features of a task's images, n at least 2.
    """
    return replace(fit_gaussian(features), table=distance_table(left_out_distances(features)))


def fit_gaussian(features: Tensor) -> Typicality:
    """Return the Gaussian of features (n, D), with an empty table."""
    mean, variance, basis, added = _spectrum(features.double())
    n, width = features.shape
    rank = min(RANK, n - 1, width)
    rest = float(variance[rank:].sum()) / max(width - rank, 1)
    log_precision = -torch.cat([variance[:rank] + added, variance.new_tensor([rest + added])]).log()
    return Typicality(mean.float(), basis[:rank].float().contiguous(), log_precision.float(), torch.empty(2, 0))


def left_out_distances(features: Tensor) -> Tensor:
    """Return squared distances (n,) of features (n, D), each from a Gaussian that has not seen the image.

    While every direction is kept, one factorisation gives all of them: leaving an image out moves the mean and takes
    one rank-one term from the covariance (Sherman-Morrison). With more images, folds leave out a few at a time.
    """
    x = features.double()
    n, width = x.shape
    if min(n - 1, width) <= RANK:
        mean, variance, basis, added = _spectrum(x)
        distance = ((x - mean) @ basis.T).square() @ (1 / (variance + added))
        a = n / (n - 1)
        return distance * a / (1 - a * distance / n).clamp_min(1e-9)
    held_out = torch.empty(n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    folds = MANY_FOLDS if n <= FEW_IMAGES else FOLDS
    for fold in range(folds):
        left, kept = order[fold::folds], torch.ones(n, dtype=torch.bool)
        kept[left] = False
        held_out[left] = fit_gaussian(features[kept]).distances(features[left]).double()
    return held_out


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the mean (D,), variances in falling order, their directions as rows, and what is added to variances."""
    n, width = x.shape
    mean = x.mean(0)
    centred = x - mean
    if n <= width:
        _, singular, basis = torch.linalg.svd(centred, full_matrices=False)
        variance = singular.square() / n
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
        variance, basis = values.flip(0).clamp_min(0), vectors.T.flip(0)
    return mean, variance, basis, SHRINKAGE * float(variance.sum()) / width or 1.0


def distance_table(held_out: Tensor) -> Tensor:
    """Return the table (2, Q) of squared distances (n,) of held-out images.

    A normal tail of the log distances follows the largest one.
    """
    logs = held_out.clamp_min(1e-30).log().sort().values
    n = len(logs)
    ranks = torch.linspace(0, n - 1, min(n, QUANTILES)).round().long()
    distance = logs[ranks].tolist()
    share = [(n - int(rank)) / (n + 1) for rank in ranks]
    centre, spread = float(logs.mean()), max(float(logs.std()), 1e-3)
    for p in TAIL:
        if p < share[-1]:
            beyond = centre + spread * float(torch.special.ndtri(torch.tensor(1 - p, dtype=torch.float64)))
            distance.append(max(beyond, distance[-1] + 1e-3 * spread))
            share.append(p)
    rising = [0, *(i for i in range(1, len(distance)) if distance[i] > distance[i - 1])]  # equal images: one entry
    return torch.tensor([[distance[i] for i in rising], [torch.log(torch.tensor(share[i])) for i in rising]])
