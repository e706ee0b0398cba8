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
        x: (..., d_in); with more than two axes, the first is a batch of B.

    Returns:
        (..., d_out)
    """
    kernels, p, q = c.shape
    _, splits, a_size, rank = a.shape
    # The same numbers for each of B images: the gradients' long sums over rows, too, become one short one an image.
    images = x.shape[0] if x.ndim > 2 else 1
    x_rows = x.reshape(images, -1, b.shape[2])  # (B, T q, b)
    even = rank * x_rows.shape[1] // q % 2 == 0
    c = doubled(c * gain) if even else (c * gain).transpose(1, 2)
    c = c.expand(images, *c.shape).flatten(0, 1)  # (B N, 2 q, 2 p)
    a = a.permute(0, 3, 1, 2).reshape(kernels * rank, splits * a_size)  # (N R, S a)
    h = _mix(x_rows, c, b.flatten(0, 1).expand(images, -1, -1))  # (B, T p, N R)
    y = torch.bmm(h, a.expand(images, -1, -1)).view(-1, p, splits, a_size)  # (B T, p, S, a)
    return y.transpose(1, 2).reshape(*x.shape[:-1], splits * p * a_size)


def add_(y: Tensor, x: Tensor, c: Tensor, a: Tensor, b: Tensor, splits: int) -> None:
    """y += dW x in place, where each of B images has a dW of its own; no autograd.

    Args:
        y: (B.., d_out), contiguous; rows are image-major, whatever the axes.
        x: (B.., d_in), likewise.
        c: (B N, 2 q, 2 p), as `doubled` makes it, with the gain in it.
        a: (B, N R, S a).
        b: (B, N R, b), with an even R.
    """
    images, _, columns = a.shape
    a_size = columns // splits
    h = _mix(x.reshape(images, -1, b.shape[2]), c, b)  # (B, T p, N R)
    if splits == 1:
        y.view(images, -1, a_size).baddbmm_(h, a)
        return
    # y's rows have the splits outside p, so it takes an addition of its own; a split at a time stays in the cache.
    y = y.view(images, -1, splits, y.shape[-1] // splits)  # (B, T, S, p a)
    for s, part in enumerate(a.split(a_size, dim=2)):
        y[:, :, s] += torch.bmm(h, part).view(images, -1, y.shape[3])


def doubled(c: Tensor) -> Tensor:
    """C transposed and twice on a diagonal, (N, p, q) -> (N, 2 q, 2 p), so that one product takes two rows.

    Half of the numbers are zeros, and yet it is three times as fast: MKL is poor at matrices with 8 columns.
    """
    return torch.kron(torch.eye(2, device=c.device, dtype=c.dtype), c.transpose(1, 2).contiguous())


def _mix(x: Tensor, c: Tensor, b: Tensor) -> Tensor:
    """What A multiplies: B, then C. Rows are the last axis in between, so that nothing needs to be permuted.

    x (B, T q, b), c (B N, 2 q, 2 p) or (B N, q, p), b (B, N R, b) -> (B, T p, N R), a transposed view.
    """
    images, ranks, _ = b.shape
    h = torch.bmm(b, x.transpose(1, 2))  # (B, N R, T q)
    h = torch.bmm(h.view(len(c), -1, c.shape[1]), c)  # (B N, R T / 2, 2 p)
    return h.view(images, ranks, -1).transpose(1, 2)
