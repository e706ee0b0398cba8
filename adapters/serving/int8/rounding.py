"""A frozen weight in int8: which input features stay float32, the rotation of the others, and rounding with feedback.

- The few input features with the largest numbers, here called wide, stay float32: otherwise a token's scale, and with
  it the rounding of all other features, would follow from them (the idea of LLM.int8, arXiv 2208.07339).
- Of the others, larger features are divided by more, and their weights multiplied by the same (the idea of SmoothQuant,
  arXiv 2211.10438). They get random signs and are rotated in blocks by a Hadamard matrix, which makes them about
  equally large: fewer of the 256 codes are then spent on rare large numbers (the idea of QuaRot, arXiv 2404.00456).
  The weight is rotated too, so the product stays the same.
- A weight's input features are rounded one after another, and the error of each is made up for by those that follow, as
  far as the layer's inputs correlate (GPTQ, arXiv 2210.17323).
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

WIDE = 8  # input features in float32: on a ViT-S/14 more cost time and hardly change the output
ROTATED = 16  # features that a rotation mixes, where that divides d_in: 32 cost more time and hardly change the output
INT8_MAX = 127
SMOOTHING = 0.25  # a feature is divided by this power of its root mean square
SMALLEST = 0.1  # of the features' mean size; a smaller one counts as this large, since other images may have more of it
DAMPING = 0.01  # of the mean square of an input feature, added to all, so that rounding does not rely on noise
JOINT = 768  # input features at most that make up for each other's errors: time grows with the square
STEP = 128  # features after which the others are corrected


class Rotation(NamedTuple):
    """The input features of a layer (n, d) as they are rounded.

    Attributes:
        wide: features that stay float32, int64 (k,).
        factors: float32 (d,), of the features before they are rotated; 0 for `wide`.
        block: float32 (b, b), orthogonal and symmetric; b divides d.
    """

    wide: Tensor
    factors: Tensor
    block: Tensor

    def of_weight(self, weight: Tensor) -> Tensor:
        """Return a weight (d_out, d) for rotated inputs."""
        return self._turned(weight * self._inverse())

    def of_inputs(self, x: Tensor) -> Tensor:
        """Return inputs (n, d) rotated, without the wide features."""
        return self._turned(x * self.factors)

    def back(self, rotated: Tensor) -> Tensor:
        """Return the weight (d_out, d) for inputs that are not rotated, with zeros for the wide features."""
        return self._turned(rotated) * self.factors

    def _inverse(self) -> Tensor:
        return torch.where(self.factors == 0, 0, 1 / self.factors)

    def _turned(self, x: Tensor) -> Tensor:
        return (x.view(-1, len(self.block)) @ self.block).view(x.shape)


class RoundedWeight(NamedTuple):
    """A weight (d_out, d_in) in int8, whose input features are rotated.

    Attributes:
        codes: int8 (d_out, d_in).
        scales: float32 (d_out,).
        rotation: of the weight and of the layer's inputs.
    """

    codes: Tensor
    scales: Tensor
    rotation: Rotation

    def restored(self, weight: Tensor) -> Tensor:
        """Return the rounded weight without rotation, float32 (d_out, d_in), with the wide columns of `weight`."""
        narrow = self.rotation.back(self.codes * self.scales.unsqueeze(1))
        return narrow.index_copy_(1, self.rotation.wide, weight[:, self.rotation.wide])


@torch.inference_mode()
def round_weight(weight: Tensor, inputs: Tensor | None = None) -> RoundedWeight:
    """Return a weight in int8.

    Args:
        weight: float32 (d_out, d_in).
        inputs: float32 (n, d_in), examples of the layer's inputs. None takes the first features as wide and rounds to
            the nearest codes, which is enough to measure the time of a product.
    """
    rotation = _rotation(weight.shape[1], inputs)
    rotated = rotation.of_weight(weight)
    scales = (rotated.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    rotated /= scales.unsqueeze(1)
    if inputs is not None:
        seen = rotation.of_inputs(inputs)
        rows = rotated.T.contiguous()
        for part, own in zip(rows.split(JOINT), seen.split(JOINT, 1), strict=True):
            _round_with_feedback(part, own)
        rotated = rows.T.contiguous()
    codes = rotated.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return RoundedWeight(codes, scales, rotation)


def _rotation(d: int, inputs: Tensor | None) -> Rotation:
    factors = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    count = min(WIDE, d)
    wide = torch.arange(count)
    if inputs is not None:
        wide = inputs.abs().amax(0).topk(count).indices
        sizes = inputs.square().mean(0).sqrt()
        factors *= sizes.clamp_min(SMALLEST * sizes.mean() + torch.finfo(torch.float32).tiny) ** -SMOOTHING
    return Rotation(wide, factors.index_fill_(0, wide, 0), _hadamard(gcd(d, ROTATED)))


def _hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a size that is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) * 0.5**0.5
    return matrix


def _round_with_feedback(weight: Tensor, inputs: Tensor) -> None:
    """Round a transposed weight (d, d_out) in place, so that its products with inputs (n, d) change little."""
    squares = inputs.T @ inputs
    squares.diagonal().add_(DAMPING * squares.diagonal().mean() + torch.finfo(torch.float32).tiny)
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(squares)), upper=True)
    feedback /= feedback.diagonal().unsqueeze(1).clone()
    for start in range(0, len(weight), STEP):
        part, rest = weight[start : start + STEP], weight[start + STEP :]
        errors = torch.empty_like(part)
        for i, row in enumerate(part):
            exact = row.clone()
            row.round_().clamp_(-INT8_MAX, INT8_MAX)
            torch.sub(row, exact, out=errors[i])
            part[i + 1 :].addr_(feedback[start + i, start + i + 1 : start + len(part)], errors[i])
        rest.addmm_(feedback[start : start + len(part), start + len(part) :].T, errors)
