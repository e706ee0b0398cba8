"""Calibration on scores of images that a classifier has not seen: temperature, label sets, intervals.

"Left-out scores" are leave-one-out scores, or the scores of held-out images of k-fold cross-validation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

NEWTON_STEPS = 30
TOLERANCE = 1e-6
MAX_RATIO = 4.0  # of the two inverse temperatures that `fit_confidence` takes the middle of
COVERAGES = tuple(percent / 100 for percent in (*range(50, 100), 99.5))


def fit_temperature(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Return the inverse temperature that makes the probabilities fit best, and their negative log-likelihood.

    The likelihood is concave in the inverse temperature; Newton's method finds its maximum.

    Args:
        scores: float64 (n, K), logits up to a factor.
        targets: int64 (n,).
        weights: (n,), of the images; they need not sum to 1. None: equal weights.
    """
    finite, targets, weights = _usable(scores, targets, weights)
    own = finite.gather(1, targets[:, None])[:, 0]
    # Smoothed targets (Platt, 1999): otherwise scores that are all right would have no finite best temperature.
    smoothing = 1 / (len(finite) + 2)
    own = (1 - smoothing) * own + smoothing * finite.mean(1)
    spread = float((weights * (finite.logsumexp(1) - own)).sum())
    log_beta = -math.log(max(spread, 1e-12))  # losses of order 1
    low, high = log_beta - 30, log_beta + 30
    for _ in range(NEWTON_STEPS):
        beta = math.exp(log_beta)
        p = torch.softmax(finite * beta, 1)
        mean = (p * finite).sum(1)
        slope = float((weights * (mean - own)).sum()) * beta
        variance = (p * finite.square()).sum(1) - mean.square()
        curve = float((weights * variance).sum()) * beta**2 + abs(slope)  # positive: each step goes downhill
        low, high = (low, log_beta) if slope > 0 else (log_beta, high)
        moved = log_beta - max(min(slope / max(curve, 1e-300), 2.0), -2.0)
        if not low <= moved <= high:
            moved = (low + high) / 2
        if abs(moved - log_beta) < TOLERANCE:
            break
        log_beta = moved
    beta = math.exp(log_beta)
    return beta, float((weights * ((finite * beta).logsumexp(1) - own * beta)).sum())


def fit_confidence(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> float:
    """Return the inverse temperature at which confidence, the largest probability, is as often right as it says.

    It is the geometric mean of two: that of the best likelihood, and that whose mean confidence equals the accuracy.
    The first is drawn towards the few images whose true label looks impossible; the second has the noise of n answers
    that are right or wrong. In both one answer in 2 (n + 1) counts as wrong, for the second label, so that scores that
    are all right have a finite temperature.

    Args:
        scores, targets, weights: as in `fit_temperature`.
    """
    finite, targets, weights = _usable(scores, targets, weights)
    rows, wrong = torch.arange(len(finite)), 0.5 / (len(finite) + 1)
    others = finite.clone()
    others[rows, targets] = -torch.inf
    own = (1 - wrong) * finite[rows, targets] + wrong * others.amax(1)
    right = float(weights @ (finite.argmax(1) == targets).double()) * (1 - 2 * wrong) + wrong
    middle = -math.log(max(float(weights @ (finite.logsumexp(1) - own)), 1e-12))

    def too_sharp(log_beta: float) -> bool:
        return float(weights @ ((finite * math.exp(log_beta)).softmax(1) * finite).sum(1)) > float(weights @ own)

    def too_confident(log_beta: float) -> bool:
        return float(weights @ (finite * math.exp(log_beta)).softmax(1).amax(1)) > right

    likely = _bisect(too_sharp, middle - 30, middle + 30)
    spread = math.log(MAX_RATIO)
    return math.exp((likely + _bisect(too_confident, likely - spread, likely + spread)) / 2)


def _bisect(is_above: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `is_above` turns true between `low` and `high`, or one of these."""
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def _usable(scores: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return finite scores with a largest one of 0, targets and weights with the sum 1, of images with a weight."""
    if weights is None:
        weights = torch.ones(len(scores), dtype=torch.float64)
    kept = weights > 0
    scores, targets, weights = scores[kept], targets[kept], weights[kept] / weights[kept].sum()
    finite = torch.where(scores.isfinite(), scores, scores[scores.isfinite()].min())
    return finite - finite.amax(1, keepdim=True), targets, weights


def coverage_table(probabilities: Tensor, targets: Tensor) -> list[tuple[float, float]]:
    """Return pairs (coverage, threshold): labels at or above the threshold cover that share of images.

    Split conformal prediction with the true label's probability as its score (Sadinle, Lei and Wasserman, JASA 2019):
    these are the smallest sets on average. The threshold is 0, and the set is every label, where the left-out images
    are too few for a coverage.

    Args:
        probabilities: (n, K) of left-out images.
        targets: int64 (n,).
    """
    own = probabilities.gather(1, targets[:, None])[:, 0].sort(descending=True).values.tolist()
    n = len(own)
    table = []
    for coverage in COVERAGES:
        rank = math.ceil((n + 1) * coverage)
        table.append((coverage, own[rank - 1] if rank <= n else 0.0))
    return table
