"""Closed-form classifier on frozen features: shrunken linear discriminant analysis, chosen by exact leave-one-out.

Each class has a mean; all classes share one covariance, shrunk towards a multiple of the identity. The classifier is
linear, so it is an ordinary head (Friedman, "Regularized Discriminant Analysis", JASA 1989). Every class has the same
prior, independent of its number of images.

Leaving one image out changes its class mean and takes one rank-one term from the scatter matrix. The Sherman-Morrison
formula gives the scores of all n left-out images from one factorisation, so the amount of shrinkage and the
temperature of the probabilities are both chosen on images that the classifier has not seen.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.calibration import fit_confidence, fit_temperature
from ..short_repr import short_repr

COARSE = tuple(range(-3, 4))  # log10 of the shrinkage, in units of the mean eigenvalue
FINE = (0.5, 0.25)  # steps around the best so far


@dataclass(frozen=True)
class InstantHead:
    """Linear classifier and the leave-one-out scores that it was chosen by.

    Attributes:
        weight: float32 (K, D), on the backbone's pooled features; the temperature is folded in.
        bias: float32 (K,).
        scores: float64 (n, K), calibrated logits of each image from the classifier of all others; -inf for the own
            class of an image that is alone in it.
        shrinkage: added to the scatter's eigenvalues, in units of their mean.
    """

    weight: Tensor
    bias: Tensor
    scores: Tensor
    shrinkage: float

    __repr__ = short_repr


def fit_head(features: Tensor, targets: Tensor, classes: int) -> InstantHead:
    """Fit the classifier.

    Args:
        features: (n, D) pooled features of the frozen backbone, any float dtype.
        targets: int64 (n,), class numbers below `classes`; every class has an image.
        classes: K.

    Raises:
        ValueError: a class has no image, or no class has two.
    """
    counts = torch.bincount(targets, minlength=classes).double()
    if int(counts.min()) == 0:
        raise ValueError(f"class {int(counts.argmin())} has no image; every class needs at least one")
    if int(counts.max()) < 2:
        raise ValueError("no class has two images; at least one class needs two")
    x = features.double()
    centre = x.mean(0)
    x = x - centre
    means = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, targets, x) / counts[:, None]
    projected = _Projected(x, means, targets, counts)
    weights = 1 / (classes * counts)[targets]  # of one image, so that every class weighs the same
    weights[counts[targets] == 1] = 0

    def loss(exponent: float) -> float:
        return fit_temperature(projected.left_out(float(10.0**exponent)), targets, weights)[1]

    losses = {float(exponent): loss(exponent) for exponent in COARSE}
    for step in FINE:
        middle = min(losses, key=lambda exponent: losses[exponent])
        losses |= {exponent: loss(exponent) for exponent in (middle - step, middle + step)}
    shrinkage: float = 10.0 ** min(losses, key=lambda exponent: losses[exponent])
    scores = projected.left_out(shrinkage)
    beta = fit_confidence(scores, targets, weights)
    weight, bias = projected.head(shrinkage)
    weight, bias = weight * beta, bias * beta
    return InstantHead(weight.float(), (bias - weight @ centre).float(), scores * beta, shrinkage)


class _Projected:
    """Centred features in the eigenbasis of the scatter within classes, S = V diag(e) V^T."""

    def __init__(self, x: Tensor, means: Tensor, targets: Tensor, counts: Tensor) -> None:
        residuals = x - means[targets]
        n, width = x.shape
        if n < width:  # S has at most n eigenvalues above zero: find them on the n x n side
            _, singular, rows = torch.linalg.svd(residuals, full_matrices=False)
            eigenvalues, basis = singular.square(), rows.T
        else:
            eigenvalues, basis = torch.linalg.eigh(residuals.T @ residuals)
        self._eigenvalues, self._basis = eigenvalues.clamp_min(0), basis
        self._mean_eigenvalue = float(eigenvalues.sum()) / width or 1.0
        self._means, self._targets = means, targets
        self._leverage = counts[targets] / (counts[targets] - 1).clamp_min(1)  # c / (c - 1)
        self._alone = counts[targets] == 1
        self._degrees = max(n - len(means), 1)
        self._x, self._m, self._r = x @ basis, means @ basis, residuals @ basis
        # The parts outside of the basis, where S is zero: images and means have such parts.
        self._x_rest, self._m_rest = x - self._x @ basis.T, means - self._m @ basis.T
        self._outside = n < width

    def head(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Return weight (K, D) and bias (K,) for centred features, before calibration."""
        inverse, rest = self._inverse(shrinkage)
        weight = (self._m * inverse) @ self._basis.T
        if self._outside:
            weight = weight + self._m_rest * rest
        return weight * self._degrees, -(weight * self._means).sum(1) / 2 * self._degrees

    def left_out(self, shrinkage: float) -> Tensor:
        """Return scores (n, K): minus half the squared distance to each mean, without the image itself."""
        inverse, rest = self._inverse(shrinkage)
        x, m, r = self._x * inverse.sqrt(), self._m * inverse.sqrt(), self._r * inverse.sqrt()
        distances = x.square().sum(1)[:, None] - 2 * x @ m.T + m.square().sum(1)
        along = (x * r).sum(1)[:, None] - r @ m.T  # (x - m_k)^T S^-1 r
        if self._outside:
            outer_x, outer_m = self._x_rest * math.sqrt(rest), self._m_rest * math.sqrt(rest)
            distances = distances + (
                outer_x.square().sum(1)[:, None] - 2 * outer_x @ outer_m.T + outer_m.square().sum(1)
            )
        own = r.square().sum(1)
        a = self._leverage
        rows = torch.arange(len(x))
        distances[rows, self._targets] = a.square() * own
        along[rows, self._targets] = a * own
        # S without the image is S - a r r^T, still positive: 1 - a r^T S^-1 r > 0
        distances = distances + (a / (1 - a * own).clamp_min(1e-12))[:, None] * along.square()
        scores: Tensor = -distances / 2 * self._degrees
        scores[rows[self._alone], self._targets[self._alone]] = -torch.inf
        return scores

    def _inverse(self, shrinkage: float) -> tuple[Tensor, float]:
        added = shrinkage * self._mean_eigenvalue
        return 1 / (self._eigenvalues + added), 1 / added
