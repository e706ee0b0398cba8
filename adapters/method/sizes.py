"""Sizes of C, A and B for a layer (`kronecker.py` names the axes). No torch: gateways check adapters with them."""

import math


def factorise(dim: int, factor: int) -> tuple[int, int]:
    """Split a dimension into (factor, dim / factor), smaller first; where factor does not divide it, into the
    divisor pair closest to it.

    >>> factorise(768, 8), factorise(768, 96), factorise(20, 8)
    ((8, 96), (8, 96), (4, 5))
    """
    if dim % factor:
        divisors = [d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0]
        factor = min(divisors, key=lambda d: (abs(d - factor), -d))
    small, large = sorted((factor, dim // factor))
    return small, large


def shapes(
    d_in: int, d_out: int, splits: int, *, kernels: int, rank: int, factor: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of C, A and B for one layer."""
    p, a = factorise(d_out // splits, factor)
    q, b = factorise(d_in, factor)
    return (kernels, p, q), (kernels, splits, a, rank), (kernels, rank, b)
