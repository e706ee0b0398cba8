"""Where a bank keeps the numbers of its adapters: one contiguous row a slot, and what one batch needs of them.

Axes: B adapters of a batch, N kernels, R rank, S splits, p x q the sides of C, a = d_out / (S p), b = d_in / q.

`pack` brings an adapter's numbers into the order of a row, without padding, in host memory: one copy takes them to the
device. A row has four parts, and in each the sites lie side by side: C (N, ..), A and B (N, R, ..), re-scaling, norms.
So a batch gathers what it needs with one copy a part, not one a site, and what no adapter of it uses (kernels and
ranks are outer axes) stays behind.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone import Backbone
from ..format.file import Adapter, by_layer
from ..format.header import Layout, keep
from ..method import kronecker

MOST_PLANS, PLAN_BYTES = 16, 8 * 1024**2  # that are kept: at most 128 MiB, whatever tenants upload
_SCALES = ("scale", "shift", "in_scale", "in_shift")


class SiteNumbers(NamedTuple):
    """The numbers of one site for every adapter of a batch: views into the gathered tensors."""

    c: Tensor  # (B N, 2 q, 2 p), as `kronecker.add_` takes it; carries the adapter's gain
    a: Tensor  # (B, N R, S a)
    b: Tensor  # (B, N R, b)
    scale: Tensor  # (B, 1, d_out), or (B, 1, 0) where KARST does not re-scale; likewise the rest
    shift: Tensor
    in_scale: Tensor  # (B, 1, d_in)
    in_shift: Tensor


@dataclass(frozen=True)
class Packed:
    """An adapter ready for a slot, in host memory: its numbers in one piece, and what a batch must know of it."""

    flat: Tensor  # 1-D, in the backbone's dtype: C, A and B, re-scaling, norms, head; pinned if the bank is on CUDA
    kernels: int  # the largest N of its layers
    rank: int  # their largest R, made even
    classes: int
    kronecker: frozenset[str]  # sites with a dW
    rescaled: frozenset[str]  # sites with a scale and shift, on the output or on the input
    norms: frozenset[str]  # norm layers with numbers of its own

    @property
    def size_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


class _Plan(NamedTuple):
    """How adapters of one layout are packed."""

    source: Tensor  # int32, as long as the flat numbers: where each is in (0, the file's numbers, the stacks' defaults)
    gained: int  # how many of the first are C's, which the gain multiplies
    packed: dict[str, Any]  # the rest of `Packed`


class Stacks:
    """The numbers of all sites in a fixed number of slots."""

    def __init__(self, backbone: Backbone, slots: int, *, max_rank: int, max_kernels: int, factor: int) -> None:
        self._sites = backbone.sites
        self._width = backbone.width
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
        # One, zero, one, zero, ...: what re-scales nothing.
        no_scales = torch.tensor([1.0, 0.0] * (2 * len(self._sites))).repeat_interleave(torch.tensor(self._scale_sizes))
        modules = dict(backbone.model.named_modules())
        self._norms = tuple(norm.name for norm in backbone.norms)
        self._norm_sizes = [size for norm in backbone.norms for size in (norm.width, norm.width)]
        frozen = [t for name in self._norms for t in (modules[name].weight, modules[name].bias)]
        # What stands where an adapter brings no numbers of its own.
        self._defaults = torch.cat([no_scales, *(numbers.cpu().float() for numbers in frozen)])
        self._plans: dict[Layout, _Plan] = {}

        max_rank += max_rank % 2  # `kronecker.add_` wants an even R
        sizes = self._sizes(max_kernels, max_rank)
        self._device, self._dtype = backbone.device, backbone.dtype
        self._rows = torch.zeros(slots, sum(sizes), device=self._device, dtype=self._dtype)
        c, factors, self._scales, self._tuned_norms = self._rows.split(sizes, 1)
        self._c = c.unflatten(1, (max_kernels, -1))
        self._factors = factors.unflatten(1, (max_kernels, max_rank, -1))
        # Copies to a GPU run beside the passes.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def pack(self, adapter: Adapter | None) -> Packed:
        """An adapter's numbers in the order of a row; None is one that changes nothing and has no head.

        A layer that an adapter does not have gets zeros, ones or the backbone's own numbers.
        """
        if adapter is None:
            plan, numbers, gain = self._plan({}), torch.zeros(0), 1.0
        else:
            plan = self._plan_of(adapter.layout)
            numbers, gain = adapter.numbers, adapter.config.effective_gain
        flat = torch.cat([torch.zeros(1), numbers, self._defaults]).index_select(0, plan.source)
        flat[: plan.gained] *= gain
        flat = flat.to(self._dtype)
        return Packed(flat if self._stream is None else flat.pin_memory(), **plan.packed)

    def _plan_of(self, layout: Layout) -> _Plan:
        """The plan of adapters of a layout, made for the first of them."""
        plan = self._plans.get(layout)
        if plan is None:
            plan = self._plan(layout.tensors)
            if plan.source.nbytes <= PLAN_BYTES:
                keep(self._plans, layout, plan, MOST_PLANS)
        return plan

    def _plan(self, shapes: Mapping[str, tuple[int, ...]]) -> _Plan:
        """Where each number of a row comes from, of adapters whose tensors have these shapes and order.

        The same steps as for an adapter's numbers would be, with the place of each in its stead.
        """
        counts = [math.prod(shape) for shape in shapes.values()]
        places = torch.arange(1, sum(counts) + 1).split(counts or [0])
        tensors = {name: p.view(shape) for (name, shape), p in zip(shapes.items(), places, strict=bool(shapes))}
        defaults = torch.arange(sum(counts) + 1, sum(counts) + 1 + len(self._defaults))
        no_scales, frozen_norms = defaults.split([sum(self._scale_sizes), sum(self._norm_sizes)])

        layers = by_layer(tensors)
        with_dw = {name: parts["karst_a"].shape for name, parts in layers.items() if "karst_c" in parts}
        kernels = max((shape[0] for shape in with_dw.values()), default=0)
        rank = max((shape[3] for shape in with_dw.values()), default=0)
        rank += rank % 2
        classes = shapes["head.bias"][0] if shapes else 0
        sizes = [*self._sizes(kernels, rank), classes * self._width, classes]
        index = torch.zeros(sum(sizes), dtype=torch.int64)  # 0: where there is none
        c, factors, scales, norms, weight, bias = index.split(sizes)
        scales.copy_(no_scales)
        split = self._split(
            c.view(kernels, sum(self._c_sizes)), factors.view(kernels, rank, sum(self._factor_sizes)), scales
        )
        for (site, c_out, a_out, b_out, *scale_outs), shape in zip(split, self._c_shapes, strict=True):
            parts = layers.get(site.name, {})
            for name, out in zip(_SCALES, scale_outs, strict=True):
                if name in parts:
                    out.copy_(parts[name])
            if "karst_c" in parts:
                n, s, rows, r = parts["karst_a"].shape
                kronecker.double_(c_out[:n].view(n, *shape), parts["karst_c"])
                a_out[:n, :r].unflatten(2, (s, rows)).copy_(parts["karst_a"].permute(0, 3, 1, 2))
                b_out[:n, :r].copy_(parts["karst_b"])
        norms.copy_(frozen_norms)
        for name, (norm_weight, norm_bias) in self._split_norms(norms).items():
            parts = layers.get(name, {})
            if "norm_weight" in parts:
                norm_weight.copy_(parts["norm_weight"])
                norm_bias.copy_(parts["norm_bias"])
        if shapes:
            weight.copy_(tensors["head.weight"].flatten())
            bias.copy_(tensors["head.bias"])
        return _Plan(
            index.int(),
            gained=len(c),
            packed={
                "kernels": kernels,
                "rank": rank,
                "classes": classes,
                "kronecker": frozenset(with_dw),
                "rescaled": frozenset(name for name, parts in layers.items() if {"scale", "in_scale"} & parts.keys()),
                "norms": frozenset(name for name, parts in layers.items() if "norm_weight" in parts),
            },
        )

    def write(self, slot: int, packed: Packed) -> tuple[Tensor, Tensor]:
        """Overwrite a whole slot; it holds all of the adapter when this returns.

        Returns:
            The head's weight (K, D) and bias (K,), on the device. They lie outside of the row: K has no bound.
        """
        if self._stream is not None:  # after whatever was asked of the GPU before, such as a pass that reads the slot
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # None: does nothing
            flat = packed.flat.to(self._device, non_blocking=True)
            head = packed.classes * self._width
            c, factors, scales, norms, weight, bias = flat.split(
                [*self._sizes(packed.kernels, packed.rank), head, packed.classes]
            )
            self._rows[slot].zero_()
            if packed.kernels:
                self._c[slot, : packed.kernels].copy_(c.view(packed.kernels, -1))
                self._factors[slot, : packed.kernels, : packed.rank].copy_(
                    factors.view(packed.kernels, packed.rank, -1)
                )
            self._scales[slot].copy_(scales)
            self._tuned_norms[slot].copy_(norms)
            # Clones: a view would keep all of the flat copy.
            result = weight.view(packed.classes, self._width).clone(), bias.clone()
        if self._stream is not None:
            self._stream.synchronize()
        return result

    def gather(self, index: Tensor, kernels: int, rank: int) -> dict[str, SiteNumbers]:
        """The first N kernels and R ranks (an even number) of the slots in `index` (B,), for each site by its name."""
        c = self._c[:, :kernels].index_select(0, index).flatten(0, 1)  # (B N, sum of 4 q p)
        factors = self._factors[:, :kernels, :rank].index_select(0, index).flatten(1, 2)  # (B, N R, sum of S a + b)
        scales = self._scales.index_select(0, index)[:, None]
        return {
            site.name: SiteNumbers(own.view(-1, *shape), *rest)
            for shape, (site, own, *rest) in zip(self._c_shapes, self._split(c, factors, scales), strict=True)
        }

    def gather_norms(self, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias, (B, 1, d) each, of every norm layer for the slots in `index` (B,)."""
        return self._split_norms(self._tuned_norms.index_select(0, index)[:, None])

    def _sizes(self, kernels: int, rank: int) -> list[int]:
        """How many numbers the parts of a row have."""
        return [
            kernels * sum(self._c_sizes),
            kernels * rank * sum(self._factor_sizes),
            sum(self._scale_sizes),
            sum(self._norm_sizes),
        ]

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
