"""The formulas of KARST as pure functions (arXiv 2502.06779, section 2; docs/method.md).

    dW = g * sum_i C_i (kron) (A_i B_i)

Axes: N kernels, S splits of the output (3 for a fused qkv, else 1), R rank, p x q the sides of C,
a = d_out / (S p), b = d_in / q, T rows. Shapes: C (N, p, q), A (N, S, a, R), B (N, R, b).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import factorise as factorise
from .sizes import shapes as shapes

_CACHED = 2**20  # numbers; a layer output up to this size stays in the processor's cache


def delta(c: Tensor, a: Tensor, b: Tensor, gain: float = 1.0) -> Tensor:
    """Return dW explicitly: (d_out, d_in), splits stacked along the output. Faster forms are tested against it."""
    m = torch.einsum("nsar,nrb->nsab", a, b)
    w = torch.einsum("npq,nsab->spaqb", c, m)  # C outermost: row = p * a_size + a, column = q * b_size + b
    splits, p, rows, q, columns = w.shape
    return gain * w.reshape(splits * p * rows, q * columns)


def apply(x: Tensor, c: Tensor, a: Tensor, b: Tensor, gain: float = 1.0) -> Tensor:
    """Return dW x without an explicit dW, by (C kron M) x = vec(C X M^T); `add_` is faster.

    Args:
        x: (..., d_in)

    Returns:
        (..., d_out)
    """
    rows = x.reshape(-1, c.shape[2], b.shape[2])  # (T, q, b)
    h = torch.einsum("npq,tqb,nrb->tpnr", c * gain, rows, b)
    y = torch.einsum("tpnr,nsar->tspa", h, a)
    return y.reshape(*x.shape[:-1], -1)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor, a: Tensor, b: Tensor, gain: float = 1.0
) -> Tensor:
    """Return (W0 + dW) x + b0 for training: W0 and b0 are frozen; x, C, A and B have gradients.

    The forward pass and the gradient of x use an explicit W0 + dW, which is small beside a batch's rows. The gradients
    of C, A and B use the vec trick: through dW they would cost as much as the forward pass.

    Args:
        x: (..., d_in); with more than two axes, the first is the batch.
        weight: (d_out, d_in)
        bias: (d_out,)

    Returns:
        (..., d_out), in the weight's dtype or autocast's.
    """
    y: Tensor = _Linear.apply(x, weight, bias, c, a, b, gain)
    return y


class _Linear(torch.autograd.Function):
    """The autograd function of `linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor, a: Tensor, b: Tensor, gain: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x = x.to(dtype)
        ctx.save_for_backward(
            x, weight, c, a, b
        )  # W0 + dW is computed again: storing it costs more memory than it saves time
        ctx.gain = gain
        return F.linear(x, _explicit_weight(weight, c, a, b, gain, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, c, a, b = ctx.saved_tensors
        dx = dy @ _explicit_weight(weight, c, a, b, ctx.gain, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, *_gradients(x, dy, c, a, b, ctx.gain), None


def _explicit_weight(weight: Tensor, c: Tensor, a: Tensor, b: Tensor, gain: float, dtype: torch.dtype) -> Tensor:
    return (weight + delta(c, a, b, gain)).to(dtype)


def _gradients(x: Tensor, dy: Tensor, c: Tensor, a: Tensor, b: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of C, A and B by the vec trick, one image at a time, so that sums over rows stay short.

    Args:
        x: (B.., d_in)
        dy: (B.., d_out), of the same dtype. Sums over images are in the dtype of the parameters.
    """
    kernels, p, q = c.shape
    _, splits, a_size, rank = a.shape
    images = x.shape[0] if x.ndim > 2 else 1
    x_rows = x.reshape(images, -1, b.shape[2])  # (B, T q, b)
    dy_rows = dy.reshape(images, -1, splits, p * a_size)
    dy_splits = [dy_rows[:, :, s].reshape(images, -1, a_size) for s in range(splits)]  # (B, T p, a) each
    c_own, a_own, b_own = ((t * g).to(x.dtype) for t, g in ((c, gain), (a, 1), (b, 1)))
    a_splits = a_own.permute(1, 0, 3, 2).reshape(splits, kernels * rank, a_size)

    bx = torch.bmm(_each(b_own.flatten(0, 1), images), x_rows.transpose(1, 2))  # (B, N R, T q)
    adys = [torch.bmm(_each(own, images), rows.mT) for own, rows in zip(a_splits, dy_splits, strict=True)]
    ady = torch.stack(adys).sum(0) if splits > 1 else adys[0]  # (B, N R, T p)
    bx, ady = (t.view(images * kernels, -1, side) for t, side in ((bx, q), (ady, p)))  # (B N, R T, q), (B N, R T, p)
    c_all = _each(c_own, images).flatten(0, 1)  # (B N, p, q)
    cbx = torch.bmm(bx, c_all.transpose(1, 2)).view(images, kernels * rank, -1)  # (B, N R, T p)
    cady = torch.bmm(ady, c_all).view(images, kernels * rank, -1)  # (B, N R, T q)

    dc = torch.bmm(ady.transpose(1, 2), bx).view(images, kernels, p, q).sum(0, dtype=c.dtype) * gain
    das = [torch.bmm(cbx, rows).sum(0, dtype=a.dtype).view(kernels, rank, a_size) for rows in dy_splits]
    da = torch.stack(das, 1).transpose(2, 3)  # (N, S, a, R)
    db = torch.bmm(cady, x_rows).sum(0, dtype=b.dtype).view(b.shape)
    return dc, da, db


def _each(matrix: Tensor, images: int) -> Tensor:
    """Return the matrix repeated for each image, as a view."""
    return matrix.expand(images, *matrix.shape)


def add_(y: Tensor, x: Tensor, c: Tensor, a: Tensor, b: Tensor, splits: int) -> None:
    """Add dW x to y in place, with a separate dW for each of B images; no autograd.

    Args:
        y: (B.., d_out), contiguous, with image-major rows.
        x: (B.., d_in), with image-major rows.
        c: (B N, 2 q, 2 p), as `double_` writes it, multiplied by the gain.
        a: (B, N R, S a).
        b: (B, N R, b), with an even R.
    """
    images, _, columns = a.shape
    a_size = columns // splits
    h = _mix(x.reshape(images, -1, b.shape[2]), c, b)  # (B, T p, N R)
    if splits == 1:
        y.view(images, -1, a_size).baddbmm_(h, a)
        return
    # In y's rows the splits are outside p, so the product cannot be added directly.
    if y.numel() <= _CACHED:
        out = torch.bmm(h, a).view(images, -1, y.shape[-1] // columns, splits, a_size)  # (B, T, p, S, a)
        y.view(images, -1, splits, y.shape[-1] // columns, a_size).add_(out.transpose(2, 3))
        return
    y = y.view(images, -1, splits, y.shape[-1] // splits)  # (B, T, S, p a)
    for s, part in enumerate(a.split(a_size, dim=2)):  # one split at a time stays in the cache
        y[:, :, s] += torch.bmm(h, part).view(images, -1, y.shape[3])


def double_(out: Tensor, c: Tensor) -> None:
    """Write C transposed, twice on a block diagonal, so that one product handles two rows.

    Half of the numbers are zeros, but the product is three times as fast: MKL is slow for matrices of 8 columns.

    Args:
        out: (N, 2 q, 2 p), all zeros.
        c: (N, p, q)
    """
    own = c.transpose(1, 2)
    _, q, p = own.shape
    out[:, :q, :p] = own
    out[:, q:, p:] = own


def _mix(x: Tensor, c: Tensor, b: Tensor) -> Tensor:
    """Apply B, then C. Rows are the last axis in between, so no permutation is needed.

    Args:
        x: (B, T q, b)
        c: (B N, 2 q, 2 p) or (B N, q, p)
        b: (B, N R, b)

    Returns:
        (B, T p, N R), a transposed view; A multiplies it next.
    """
    images, ranks, _ = b.shape
    h = torch.bmm(b, x.transpose(1, 2))  # (B, N R, T q)
    h = torch.bmm(h.view(len(c), -1, c.shape[1]), c)  # (B N, R T / 2, 2 p)
    return h.view(images, ranks, -1).transpose(1, 2)
