"""A frozen linear layer in int8: weights with a scale per output channel, activations with a scale per token.

    y = scale_w * (scale_z * (codes_z @ codes_w) + low_z * sum(codes_w)) + wide_x @ wide_w + bias

z are the rotated input features, without the few wide ones, which stay float32 (`rounding`). They are unsigned and
counted from their token's smallest number, so that 256 codes cover them and zero. A class token can have 16 bits: 8 for
its features, and 8 for what these leave over.
"""

import torch
from torch import Tensor, nn

from .. import cpu_operators
from .rounding import Rotation, round_weight

UINT8_MAX = 255
CHUNK_NUMBERS = 256 * 1024  # that are worked on at once, to stay in a core's second-level cache
SMALLEST_SCALE = 1e-30  # a token of zeros would divide by zero


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights and 8-bit activations; sums are exact, scales and bias float32."""

    def __init__(self, linear: nn.Linear, inputs: Tensor | None = None, *, class_token: bool = False) -> None:
        """
        Args:
            linear: float32, on a CPU.
            inputs: float32 (n, d_in), examples of its inputs; None as in `round_weight`.
            class_token: inputs are (B, T, d_in), and token 0 of each image gets 16 bits: in a model that pools by it,
                its errors reach the features undamped.
        """
        super().__init__()
        self._class_token = class_token
        weight = linear.weight.detach()
        codes, self._scales, self._rotation = round_weight(weight, inputs)
        self._packed = cpu_operators.int8_pack(codes)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        sums = codes.sum(1, dtype=torch.float32) * self._scales
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        # Weights of 1, of a token's low, and of its wide features.
        self._rest = torch.cat([bias[None], sums[None], weight[:, self._rotation.wide].T])

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        flat = x.reshape(-1, x.shape[-1])
        codes, scales, rest = quantise_rows(flat, self._rotation)
        if self._class_token:  # what its codes leave over gets codes of its own, in further rows of the same product
            first = slice(0, len(flat), x.shape[-2])
            left = self._rotation.of_inputs(flat[first]).sub_(rest[first, 1:2]).sub_(codes[first] * scales[first])
            finer_codes, finer_scales, finer_lows = _quantise(left)
            codes = torch.cat([codes, finer_codes])
        sums = cpu_operators.int8_linear(codes, self._packed, self._scales, self._zeros)
        y, finer = sums[: len(flat)], sums[len(flat) :]
        for part, scale, one_low_wide in zip(*(_chunks(tensor, y) for tensor in (y, scales, rest)), strict=True):
            part.mul_(scale).addmm_(one_low_wide, self._rest)
        if self._class_token:
            y[first] += finer.mul_(finer_scales).addmm_(finer_lows, self._rest[1:2])
        return y.view(*x.shape[:-1], y.shape[-1])


def _quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a few float32 rows (n, d) as codes, uint8 (n, d), scales and lows, (n, 1), as `quantise_rows` does."""
    lows = x.amin(1, keepdim=True)
    scales = x.amax(1, keepdim=True).sub_(lows).mul_(1 / UINT8_MAX).clamp_min_(SMALLEST_SCALE)
    return ((x - lows) / scales).add_(0.5).to(torch.uint8), scales, lows


def quantise_rows(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 rows (n, d) in 8 bits: low + codes * scales is close to the rotated rows.

    Returns:
        codes, uint8 (n, d); scales, float32 (n, 1); and float32 (n, 2 + k): 1, low, and the k wide features.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales, rest = torch.empty(len(x), 1), torch.empty(len(x), 2 + len(rotation.wide))
    rest[:, 0] = 1
    parts, side = _chunks(x, x), len(rotation.block)
    scaled, rotated = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    for part, out, scale, others in zip(parts, *(_chunks(tensor, x) for tensor in (codes, scales, rest)), strict=True):
        y, z, low = scaled[: len(part)], rotated[: len(part)], others[:, 1:2]
        torch.mul(part, rotation.factors, out=y)
        torch.mm(y.view(-1, side), rotation.block, out=z.view(-1, side))
        torch.amin(z, 1, keepdim=True, out=low)
        torch.sub(z.amax(1, keepdim=True), low, out=scale).mul_(1 / UINT8_MAX)
        others[:, 2:] = part.index_select(1, rotation.wide)
        steps = scale.clamp_min_(SMALLEST_SCALE).reciprocal()
        z.mul_(steps).add_(0.5 - low * steps)  # + 0.5, because the next copy rounds down
        out.copy_(y.view(torch.int32).copy_(z))  # by int32: torch converts float32 to uint8 one number at a time
    return codes, scales, rest


def _chunks(tensor: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor (n, ..) by rows, so that the same rows of `like` (n, d) are at most `CHUNK_NUMBERS` numbers."""
    chunks: tuple[Tensor, ...] = tensor.split(max(1, CHUNK_NUMBERS // like.shape[1]))
    return chunks
