"""Where a bank keeps the numbers of its adapters: every slot of every site, and what one batch needs of them.

Axes: B adapters of a batch, N kernels, R rank, S splits, p x q the sides of C, a = d_out / (S p), b = d_in / q.

The numbers of all sites lie side by side in three tensors, so that a batch gathers what it needs with three
copies, not with three for each site. Kernels and ranks are outer axes: those that no adapter uses stay behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import kronecker
from .backbone import Backbone

_SCALES = ("scale", "shift", "in_scale", "in_shift")


@dataclass(frozen=True)
class SiteNumbers:
    """The numbers of one site for every adapter of a batch: views into the three gathered tensors."""

    c: Tensor  # (B N, 2 q, 2 p), as `kronecker.add_` takes it; carries the adapter's gain
    a: Tensor  # (B, N R, S a)
    b: Tensor  # (B, N R, b)
    scale: Tensor  # (B, 1, d_out), or (B, 1, 0) where KARST does not re-scale; likewise the rest
    shift: Tensor
    in_scale: Tensor  # (B, 1, d_in)
    in_shift: Tensor


class Stacks:
    """The numbers of all sites in a fixed number of slots."""

    def __init__(self, backbone: Backbone, slots: int, *, max_rank: int, max_kernels: int, factor: int) -> None:
        self._sites = backbone.sites
        self._c_shapes, self._c_sizes, self._factor_sizes, self._scale_sizes = [], [], [], []
        for site in self._sites:
            (_, p, q), (_, s, a, _), (_, _, b) = kronecker.shapes(
                site.d_in, site.d_out, site.splits, kernels=1, rank=1, factor=factor
            )
            self._c_shapes.append((2 * q, 2 * p))
            self._c_sizes.append(4 * q * p)
            self._factor_sizes += [s * a, b]
            d_out, d_in = site.d_out * site.rescale_out, site.d_in * site.rescale_in
            self._scale_sizes += [d_out, d_out, d_in, d_in]
        max_rank += max_rank % 2  # `kronecker.add_` wants an even R
        to: dict[str, Any] = {"device": backbone.device, "dtype": backbone.dtype}
        self._c = torch.zeros(slots, max_kernels, sum(self._c_sizes), **to)
        self._factors = torch.zeros(slots, max_kernels, max_rank, sum(self._factor_sizes), **to)  # A and B
        self._scales = torch.zeros(slots, 1, sum(self._scale_sizes), **to)
        modules = dict(backbone.model.named_modules())
        self._norms = tuple(norm.name for norm in backbone.norms)
        self._norm_sizes = [size for norm in backbone.norms for size in (norm.width, norm.width)]
        frozen = [t for name in self._norms for t in (modules[name].weight, modules[name].bias)]
        self._frozen_norms = torch.cat(frozen) if frozen else torch.zeros(0, **to)
        self._tuned_norms = torch.zeros(slots, 1, sum(self._norm_sizes), **to)

    def write(self, slot: int, layers: dict[str, dict[str, Tensor]], gain: float) -> tuple[int, int]:
        """Overwrite a slot with the layers of an adapter: zeros, ones or the backbone's own numbers where it has none.

        Returns:
            The largest N and the largest R of its layers.
        """
        for stack in (self._c, self._factors, self._scales):
            stack[slot].zero_()
        kernels = rank = 0
        for site, c, a, b, *scales in self._split(self._c[slot], self._factors[slot], self._scales[slot]):
            parts = {name: t.to(c.device, torch.float32) for name, t in layers.get(site.name, {}).items()}
            for name, out in zip(_SCALES, scales, strict=True):
                out.copy_(parts[name]) if name in parts else out.fill_(name.endswith("scale"))
            if "karst_c" in parts:
                n, s, rows, r = parts["karst_a"].shape
                c[:n].copy_(kronecker.doubled(parts["karst_c"] * gain).flatten(1))
                a[:n, :r].copy_(parts["karst_a"].permute(0, 3, 1, 2).reshape(n, r, s * rows))
                b[:n, :r].copy_(parts["karst_b"])
                kernels, rank = max(kernels, n), max(rank, r)
        self._tuned_norms[slot].copy_(self._frozen_norms)
        for name, (weight, bias) in self._split_norms(self._tuned_norms[slot]).items():
            parts = layers.get(name, {})
            if "norm_weight" in parts:
                weight.copy_(parts["norm_weight"])
                bias.copy_(parts["norm_bias"])
        return kernels, rank

    def gather(self, index: Tensor, kernels: int, rank: int) -> dict[str, SiteNumbers]:
        """The first N kernels and R ranks of the slots in `index` (B,), for each site by its name."""
        rank += rank % 2
        c = self._c[:, :kernels].index_select(0, index).flatten(0, 1)  # (B N, sum of 4 q p)
        factors = self._factors[:, :kernels, :rank].index_select(0, index).flatten(1, 2)  # (B, N R, sum of S a + b)
        scales = self._scales.index_select(0, index)
        return {
            site.name: SiteNumbers(own.view(-1, *shape), *rest)
            for shape, (site, own, *rest) in zip(self._c_shapes, self._split(c, factors, scales), strict=True)
        }

    def gather_norms(self, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias, (B, 1, d) each, of every norm layer for the slots in `index` (B,)."""
        return self._split_norms(self._tuned_norms.index_select(0, index))

    def _split_norms(self, numbers: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Norm layer -> weight and bias: views of the last axis."""
        parts = numbers.split(self._norm_sizes, -1) if self._norm_sizes else ()
        return dict(zip(self._norms, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def _split(self, c: Tensor, factors: Tensor, scales: Tensor) -> Iterator[tuple[Any, ...]]:
        """(site, C, A, B, scale, shift, in_scale, in_shift) of each site: views of the last axes."""
        c_parts = c.split(self._c_sizes, -1)
        factor_parts = iter(factors.split(self._factor_sizes, -1))
        scale_parts = iter(scales.split(self._scale_sizes, -1))
        return zip(self._sites, c_parts, *[factor_parts] * 2, *[scale_parts] * 4, strict=True)
