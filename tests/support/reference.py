"""Slow and obvious computations that check the fast ones."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def written_out(c: Floats, a: Floats, b: Floats, gain: float) -> Floats:
    """Return dW = gain * sum_i C_i (kron) (A_i B_i), with the splits of the output stacked."""
    kernels, splits = a.shape[:2]
    return np.concatenate(
        [gain * sum(np.kron(c[i], a[i, s] @ b[i]) for i in range(kernels)) for s in range(splits)], axis=0
    )
