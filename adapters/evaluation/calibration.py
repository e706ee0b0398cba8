"""Calibration on scores of images that a classifier has not seen: temperature, label sets, intervals.

"Left-out scores" are leave-one-out scores, or the scores of held-out images of k-fold cross-validation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEWTON_STEPS = 30
TOLERANCE = 1e-6
Z_95 = 1.959964  # of a two-sided 95 % interval
COVERAGES = tuple(percent / 100 for percent in (*range(50, 100), 99.5))


def fit_temperature(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Return the inverse temperature that makes the probabilities fit best, and their negative log-likelihood.

    The likelihood is concave in the inverse temperature; Newton's method finds its maximum.

    Args:
        scores: float64 (n, K), logits up to a factor.
        targets: int64 (n,).
        weights: (n,), of the images; they need not sum to 1. None: equal weights.
    """
    if weights is None:
        weights = torch.ones(len(scores), dtype=torch.float64)
    kept = weights > 0
    scores, targets, weights = scores[kept], targets[kept], weights[kept] / weights[kept].sum()
    finite = torch.where(scores.isfinite(), scores, scores[scores.isfinite()].min())
    finite = finite - finite.amax(1, keepdim=True)
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


def accuracy_interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy (Wilson, JASA 1927); it stays within [0, 1] and holds for few images."""
    if images == 0:
        return 0.0, 1.0
    share, z2 = right / images, Z_95**2
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = Z_95 / (1 + z2 / images) * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the mean gain in accuracy over the same images, bool (m,) each, and its standard error."""
    gained = after.double() - before.double()
    return float(gained.mean()), float(gained.std()) / math.sqrt(len(gained)) if len(gained) > 1 else 1.0


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


def coverage_threshold(table: Sequence[Sequence[float]], coverage: float) -> float:
    """Return the probability at or above which labels belong to the set of this coverage.

    Args:
        table: from `coverage_table`.
        coverage: in [0.5, 0.995]; between two entries the larger one holds.

    Raises:
        ValueError: a coverage outside of the table.
    """
    for known, threshold in table:
        if known >= coverage - 1e-9:
            if coverage < table[0][0] - 1e-9:
                break
            return threshold
    raise ValueError(f"coverage {coverage} is not between {table[0][0]} and {table[-1][0]}")
