"""Device memory for the adapters of a bank: one contiguous row per slot.

Axes: B adapters of a batch, N kernels, R rank, S splits, p x q the sides of C, a = d_out / (S p), b = d_in / q.

`pack` writes an adapter's numbers in the order of a row, without padding, in host memory; one copy then takes them to
the device. A row has four parts: C (N, ..), A and B (N, R, ..), re-scaling, norms. In each part the sites lie side by
side, so a batch gathers with one copy per part instead of one per site. Kernels and ranks are the outer axes, so the
unused ones are not copied.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..format.file import Adapter, by_layer
from ..format.layouts import Layout
from ..format.names import TYPICALITY, TYPICALITY_PREFIX
from ..method import kronecker
from ..method.typicality import Typicality
from ..short_repr import short_repr

ALIGNMENT_BYTES = 64  # of a CPU's memory, as torch aligns it
NOTHING = [0, 0, 0, 0]  # sizes of the parts of a row, for an adapter that is only a head
_SCALES = ("scale", "shift", "in_scale", "in_shift")


class SiteNumbers(NamedTuple):
    """The numbers of one site for each adapter of a batch: views into the gathered tensors."""

    c: Tensor  # (B N, 2 q, 2 p), as `kronecker.add_` takes it; multiplied by the adapter's gain
    a: Tensor  # (B, N R, S a)
    b: Tensor  # (B, N R, b)
    scale: Tensor  # (B, 1, d_out), or (B, 1, 0) where KARST does not re-scale the site
    shift: Tensor
    in_scale: Tensor  # (B, 1, d_in), or (B, 1, 0)
    in_shift: Tensor


@dataclass(frozen=True)
class Packed:
    """An adapter in host memory, ready for a slot: its numbers in one tensor, and the sizes that a batch needs."""

    # 1-D, in the backbone's dtype: C, A and B, re-scaling, norms, head; of an adapter that is only a head, the head.
    # Pinned if the bank is on CUDA.
    flat: Tensor
    kernels: int  # the largest N of its layers
    rank: int  # their largest R, made even
    classes: int
    kronecker: frozenset[str]  # sites with a dW
    rescaled: frozenset[str]  # sites with a scale and shift, on the output or on the input
    norms: frozenset[str]  # norm layers that the adapter tunes
    typicality: Typicality | None = None  # float32

    __repr__ = short_repr

    @property
    def is_head(self) -> bool:
        """Whether the adapter is only a head on the frozen backbone's features."""
        return not (self.kronecker or self.rescaled or self.norms)

    @property
    def size_bytes(self) -> int:
        """Size of the numbers in host memory, in bytes."""
        extra = sum(tensor.nbytes for tensor in self.typicality.tensors.values()) if self.typicality else 0
        return self.flat.nbytes + extra


class PackingPlan(NamedTuple):
    """Where each number of a row comes from, for adapters of one layout."""

    source: Tensor  # int32, as long as `Packed.flat`: indices into (0, the file's numbers, the default numbers)
    c_numbers: int  # count of C's numbers, at the start; the gain multiplies them
    sizes: dict[str, Any]  # further fields of `Packed`
    typicality: tuple[tuple[slice, tuple[int, ...]], ...] = ()  # place in the file's numbers, and shape


class SlotMemory:
    """The numbers of all sites and norm layers in a fixed number of slots."""

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
        # One, zero, one, zero, ...: a scale of 1 and a shift of 0.
        no_scales = torch.tensor([1.0, 0.0] * (2 * len(self._sites))).repeat_interleave(torch.tensor(self._scale_sizes))
        modules = dict(backbone.model.named_modules())
        self._norms = tuple(norm.name for norm in backbone.norms)
        self._norm_sizes = [size for norm in backbone.norms for size in (norm.width, norm.width)]
        frozen = [t for name in self._norms for t in (modules[name].weight, modules[name].bias)]
        # The numbers of a row where an adapter has none.
        self._defaults = torch.cat([no_scales, *(numbers.cpu().float() for numbers in frozen)])
        self._unchanged = self._defaults.to(backbone.device, backbone.dtype).split(
            [sum(self._scale_sizes), sum(self._norm_sizes)]
        )

        max_rank += max_rank % 2  # `kronecker.add_` needs an even R
        sizes = self._sizes(max_kernels, max_rank)
        self._device, self._dtype = backbone.device, backbone.dtype
        self._rows = _zeros(slots, sum(sizes), self._device, self._dtype)
        c, factors, self._scales, self._tuned_norms = self._rows.split(sizes, 1)
        self._c = c.unflatten(1, (max_kernels, -1))
        self._factors = factors.unflatten(1, (max_kernels, max_rank, -1))
        # On a stream of their own, copies to a GPU overlap with forward passes.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def pack(self, adapter: Adapter, plan: PackingPlan) -> Packed:
        """Return an adapter's numbers in the order of a row.

        Args:
            plan: made for the adapter's layout.
        """
        return self._pack(adapter.numbers, adapter.config.effective_gain, plan)

    def pack_zeros(self) -> Packed:
        """Return an adapter that changes nothing and has no head."""
        return self._pack(torch.zeros(0), 1.0, self._plan({}))

    def _pack(self, numbers: Tensor, gain: float, plan: PackingPlan) -> Packed:
        flat = torch.cat([torch.zeros(1), numbers, self._defaults]).index_select(0, plan.source)
        flat[: plan.c_numbers] *= gain
        flat = flat.to(self._dtype)
        typicality = None
        if plan.typicality:  # copies: views would keep all numbers of the file in memory
            typicality = Typicality(*(numbers[place].view(shape).clone() for place, shape in plan.typicality))
        return Packed(flat if self._stream is None else flat.pin_memory(), typicality=typicality, **plan.sizes)

    def plan(self, layout: Layout) -> PackingPlan:
        """Return the packing plan for adapters of a layout, whose layers must fit the backbone.

        A layer that the adapter lacks gets zeros, ones, or the backbone's own norm.
        """
        return self._plan(layout.tensors)

    def _plan(self, shapes: Mapping[str, tuple[int, ...]]) -> PackingPlan:
        """Pack indices instead of numbers: each index says where its number is in `PackingPlan.source`'s tensors."""
        counts = [math.prod(shape) for shape in shapes.values()]
        indices = torch.arange(1, sum(counts) + 1).split(counts or [0])
        tensors = {name: i.view(shape) for (name, shape), i in zip(shapes.items(), indices, strict=bool(shapes))}
        defaults = torch.arange(sum(counts) + 1, sum(counts) + 1 + len(self._defaults))
        no_scales, frozen_norms = defaults.split([sum(self._scale_sizes), sum(self._norm_sizes)])

        layers = by_layer(tensors)
        with_dw = {name: parts["karst_a"].shape for name, parts in layers.items() if "karst_c" in parts}
        kernels = max((shape[0] for shape in with_dw.values()), default=0)
        rank = max((shape[3] for shape in with_dw.values()), default=0)
        rank += rank % 2
        classes = shapes["head.bias"][0] if shapes else 0
        # A slot gets the default numbers by itself where the adapter is only a head.
        sizes = self._sizes(kernels, rank) if layers else NOTHING
        index = torch.zeros(sum(sizes) + classes * (self._width + 1), dtype=torch.int64)  # index 0 is the number 0
        c, factors, scales, norms, weight, bias = index.split([*sizes, classes * self._width, classes])
        if layers:
            scales.copy_(no_scales)
            norms.copy_(frozen_norms)
            factors = factors.view(kernels, rank, sum(self._factor_sizes))
            self._place(layers, c.view(kernels, sum(self._c_sizes)), factors, scales, norms)
        if shapes:
            weight.copy_(tensors["head.weight"].flatten())
            bias.copy_(tensors["head.bias"])
        typicality: tuple[tuple[slice, tuple[int, ...]], ...] = ()
        if f"{TYPICALITY_PREFIX}mean" in tensors:
            own = [tensors[TYPICALITY_PREFIX + name] for name in TYPICALITY]
            starts = [int(t.flatten()[0]) - 1 for t in own]
            typicality = tuple((slice(i, i + t.numel()), tuple(t.shape)) for i, t in zip(starts, own, strict=True))
        return PackingPlan(
            index.int(),
            c_numbers=len(c),
            sizes={
                "kernels": kernels,
                "rank": rank,
                "classes": classes,
                "kronecker": frozenset(with_dw),
                "rescaled": frozenset(name for name, parts in layers.items() if {"scale", "in_scale"} & parts.keys()),
                "norms": frozenset(name for name, parts in layers.items() if "norm_weight" in parts),
            },
            typicality=typicality,
        )

    def _place(
        self, layers: Mapping[str, Mapping[str, Tensor]], c: Tensor, factors: Tensor, scales: Tensor, norms: Tensor
    ) -> None:
        """Write the numbers of layers into the parts of a row."""
        split = self._split(c, factors, scales)
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
        for name, (norm_weight, norm_bias) in self._split_norms(norms).items():
            parts = layers.get(name, {})
            if "norm_weight" in parts:
                norm_weight.copy_(parts["norm_weight"])
                norm_bias.copy_(parts["norm_bias"])

    def write(self, slot: int, packed: Packed) -> tuple[Tensor, Tensor]:
        """Overwrite a whole slot, and wait until the copy is complete.

        Returns:
            The head's weight (K, D) and bias (K,) on the device. They are not in the row, since K has no limit.
        """
        if self._stream is not None:  # a pass that still reads the slot must end first
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # does nothing for None
            flat = packed.flat.to(self._device, non_blocking=True)
            sizes = NOTHING if packed.is_head else self._sizes(packed.kernels, packed.rank)
            head = packed.classes * self._width
            c, factors, scales, norms, weight, bias = flat.split([*sizes, head, packed.classes])
            if packed.is_head:
                scales, norms = self._unchanged
            self._rows[slot].zero_()
            if packed.kernels:
                self._c[slot, : packed.kernels].copy_(c.view(packed.kernels, -1))
                self._factors[slot, : packed.kernels, : packed.rank].copy_(
                    factors.view(packed.kernels, packed.rank, -1)
                )
            self._scales[slot].copy_(scales)
            self._tuned_norms[slot].copy_(norms)
            # Clones, since views would keep the whole flat copy in memory.
            result = weight.view(packed.classes, self._width).clone(), bias.clone()
        if self._stream is not None:
            self._stream.synchronize()
        return result

    def gather(self, index: Tensor, kernels: int, rank: int) -> dict[str, SiteNumbers]:
        """Return the numbers of each site, by name, for the slots in `index` (B,).

        Args:
            kernels: count of kernels to gather, from the first.
            rank: count of ranks to gather, from the first; an even number.
        """
        c = self._c[:, :kernels].index_select(0, index).flatten(0, 1)  # (B N, sum of 4 q p)
        factors = self._factors[:, :kernels, :rank].index_select(0, index).flatten(1, 2)  # (B, N R, sum of S a + b)
        scales = self._scales.index_select(0, index)[:, None]
        return {
            site.name: SiteNumbers(own.view(-1, *shape), *rest)
            for shape, (site, own, *rest) in zip(self._c_shapes, self._split(c, factors, scales), strict=True)
        }

    def gather_norms(self, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return weight and bias, (B, 1, d) each, of each norm layer, by name, for the slots in `index` (B,)."""
        return self._split_norms(self._tuned_norms.index_select(0, index)[:, None])

    def _sizes(self, kernels: int, rank: int) -> list[int]:
        """Return the number of numbers in each part of a row."""
        return [
            kernels * sum(self._c_sizes),
            kernels * rank * sum(self._factor_sizes),
            sum(self._scale_sizes),
            sum(self._norm_sizes),
        ]

    def _split_norms(self, numbers: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return weight and bias by norm layer: views of the last axis."""
        parts = numbers.split(self._norm_sizes, -1) if self._norm_sizes else ()
        return dict(zip(self._norms, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def _split(self, c: Tensor, factors: Tensor, scales: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield (site, C, A, B, scale, shift, in_scale, in_shift) for each site: views of the last axes."""
        c_parts = c.split(self._c_sizes, -1)
        factor_parts = iter(factors.split(self._factor_sizes, -1))
        scale_parts = iter(scales.split(self._scale_sizes, -1))
        return zip(self._sites, c_parts, *[factor_parts] * 2, *[scale_parts] * 4, strict=True)


def _zeros(slots: int, numbers: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros (slots, numbers). On a CPU a row takes memory once it is written: NumPy asks for pages of zeros."""
    if device.type != "cpu":
        return torch.zeros(slots, numbers, device=device, dtype=dtype)
    size_bytes = slots * numbers * dtype.itemsize
    memory = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(memory[begin : begin + size_bytes]).view(dtype).view(slots, numbers)
