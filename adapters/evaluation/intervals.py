"""Intervals of accuracies, and thresholds of label sets. No torch: gateways compute them for replies."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964  # of a two-sided 95 % interval


def accuracy_interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy (Wilson, JASA 1927); it stays within [0, 1] and holds for few images."""
    if images == 0:
        return 0.0, 1.0
    share, z2 = right / images, Z_95**2
    centre = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = Z_95 / (1 + z2 / images) * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_gain(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the mean gain in accuracy over the same images, bool (m,) each, and its standard error."""
    gained = after.astype(float) - before.astype(float)
    return float(gained.mean()), float(gained.std(ddof=1)) / math.sqrt(len(gained)) if len(gained) > 1 else 1.0


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
