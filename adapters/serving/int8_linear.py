"""A frozen linear layer in int8: weights with a scale per output channel, activations with a scale per token.

    y = scale_w * (scale_x * (codes_x @ codes_w) + low_x * sum(codes_w)) + wide_x @ wide_w + bias

The few input features with the largest numbers, here called wide, stay float32: otherwise a token's scale, and with it
the rounding of all other features, would follow from them (the idea of LLM.int8, arXiv 2208.07339). The other
activations are unsigned and counted from their token's smallest number, so that 256 codes cover them and zero.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..backbone import watch
from . import cpu_operators

WIDE = 8  # input features in float32: on a ViT-S/14 more cost time and hardly change the output
INT8_MAX = 127
UINT8_MAX = 255
CHUNK_NUMBERS = 256 * 1024  # that are worked on at once, to stay in a core's second-level cache
SMALLEST_SCALE = 1e-30  # a token of zeros would divide by zero
PROBES = 4  # images that find the widest features
PROBE_CELLS = 8  # random cells along an image's side, smoothly joined


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights and 8-bit activations; sums are exact, scales and bias float32."""

    def __init__(self, linear: nn.Linear, wide: Tensor) -> None:
        """
        Args:
            linear: float32, on a CPU.
            wide: indices of the input features that stay float32, int64 (k,).
        """
        super().__init__()
        weight = linear.weight.detach()
        codes, self._scales = quantise_weight(weight.index_fill(1, wide, 0))
        self._packed = cpu_operators.int8_pack(codes)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        sums = codes.sum(1, dtype=torch.float32) * self._scales
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        self._wide = wide
        self._rest = torch.cat([bias[None], sums[None], weight[:, wide].T])  # weights of 1, a token's low, and `wide`

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        flat = x.reshape(-1, x.shape[-1])
        codes, lows, scales = quantise_rows(flat, self._wide)
        y = cpu_operators.int8_linear(codes, self._packed, self._scales, self._zeros)
        rest = torch.cat([torch.ones_like(lows), lows, flat.index_select(1, self._wide)], 1)
        for part, scale, one_low_wide in zip(*(_chunks(tensor, y) for tensor in (y, scales, rest)), strict=True):
            part.mul_(scale).addmm_(one_low_wide, self._rest)
        return y.view(*x.shape[:-1], y.shape[-1])


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float32 weight (d_out, d_in) as int8, and the scales (d_out,) of its rows."""
    scales = (weight.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def quantise_rows(x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 rows (n, d) as codes, uint8 (n, d), with x close to lows + codes * scales; both are (n, 1).

    The features `wide`, int64 (k,), count as zeros.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8)
    lows, scales = torch.empty(len(x), 1), torch.empty(len(x), 1)
    narrow_only = torch.ones(x.shape[1]).index_fill_(0, wide, 0)
    parts = _chunks(x, x)
    narrow, rounded = (torch.empty(parts[0].shape, dtype=dtype) for dtype in (torch.float32, torch.int32))
    for part, out, low, scale in zip(parts, *(_chunks(tensor, x) for tensor in (codes, lows, scales)), strict=True):
        y, integers = narrow[: len(part)], rounded[: len(part)]
        torch.mul(part, narrow_only, out=y)
        torch.amin(y, 1, keepdim=True, out=low)
        torch.sub(y.amax(1, keepdim=True), low, out=scale).mul_(1 / UINT8_MAX)
        steps = scale.clamp_min_(SMALLEST_SCALE).reciprocal()
        y.mul_(steps).add_(0.5 - low * steps)  # + 0.5, because the next copy rounds down
        out.copy_(integers.copy_(y))  # by int32: torch converts float32 to uint8 one number at a time
    return codes, lows, scales


def _chunks(tensor: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor (n, ..) by rows, so that the same rows of `like` (n, d) are at most `CHUNK_NUMBERS` numbers."""
    chunks: tuple[Tensor, ...] = tensor.split(max(1, CHUNK_NUMBERS // like.shape[1]))
    return chunks


def widest_inputs(model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """Return the input features of each layer with the largest numbers over random images, int64 (`WIDE` or fewer,).

    In a trained ViT the same few features are large for almost every image, also for noise.
    """
    channels, height, width = input_size
    cells = torch.randn(PROBES, channels, PROBE_CELLS, PROBE_CELLS, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(cells, (height, width), mode="bicubic")
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest = args[0].abs().flatten(0, -2).amax(0)
            found[name] = largest.topk(min(WIDE, len(largest))).indices

        return hook

    watch(model, pixels, [(model.get_submodule(name), note(name)) for name in names])
    return found
