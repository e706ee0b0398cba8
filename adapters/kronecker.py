"""The math of KARST as pure functions (arXiv 2502.06779, section 2; notation of KARST.md).

    dW = g * sum_i C_i (kron) (A_i B_i)

Axes: N kernels, S splits of the output (3 for a fused qkv, else 1), R rank, p x q the sides of C,
a = d_out / (S p), b = d_in / q, T rows. Shapes: C (N, p, q), A (N, S, a, R), B (N, R, b).
"""

import math

import torch
from torch import Tensor


def factorise(dim: int, factor: int) -> tuple[int, int]:
    """Split a dimension in two: (factor, dim / factor), smaller first, if factor divides it; else the divisor
    pair closest to it.

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
    """The shapes of C, A and B for one layer."""
    p, a = factorise(d_out // splits, factor)
    q, b = factorise(d_in, factor)
    return (kernels, p, q), (kernels, splits, a, rank), (kernels, rank, b)


def delta(c: Tensor, a: Tensor, b: Tensor, gain: float = 1.0) -> Tensor:
    """dW written out: (d_out, d_in), splits stacked along the output. The reference for everything else."""
    m = torch.einsum("nsar,nrb->nsab", a, b)
    w = torch.einsum("npq,nsab->spaqb", c, m)  # C outermost: row = p * a_size + a, column = q * b_size + b
    splits, p, rows, q, columns = w.shape
    return gain * w.reshape(splits * p * rows, q * columns)


def apply(x: Tensor, c: Tensor, a: Tensor, b: Tensor, gain: float = 1.0) -> Tensor:
    """dW x without writing dW out, the vec trick: (C kron M) x = vec(C X M^T).

    Args:
        x: (..., d_in).

    Returns:
        (..., d_out)
    """
    kernels, p, q = c.shape
    _, splits, a_size, rank = a.shape
    b_size = b.shape[2]
    rows = x.reshape(-1, q * b_size)  # (T, q b)
    h = rows.reshape(-1, b_size) @ b.reshape(kernels * rank, b_size).T  # (T q, N R)
    h = h.view(-1, q, kernels, rank).permute(2, 1, 0, 3).reshape(kernels, q, -1)  # (N, q, T R)
    h = torch.bmm(c * gain, h)  # (N, p, T R)
    h = h.view(kernels, p, -1, rank).permute(2, 1, 0, 3).reshape(-1, kernels * rank)  # (T p, N R)
    y = h @ a.permute(0, 3, 1, 2).reshape(kernels * rank, splits * a_size)  # (T p, S a)
    y = y.view(-1, p, splits, a_size).transpose(1, 2)  # (T, S, p, a)
    return y.reshape(*x.shape[:-1], splits * p * a_size)
