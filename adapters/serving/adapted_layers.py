"""The layers of a bank's model: frozen ones, plus the parts of the adapters in the current forward pass."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Site
from ..method import kronecker
from ..short_repr import short_repr
from .row_plan import Split
from .slot_memory import SiteNumbers


@dataclass
class Batch:
    """Numbers of the adapters in the current forward pass, and the rows that they change.

    The leading rows have an adapter each, the others are the frozen backbone's. A batch with one adapter repeats its
    numbers for each row: one product per row is faster than one product over all rows, whose long thin matrices do not
    fit the processor's cache.

    Attributes:
        numbers: of each site, for all rows that have an adapter at the end of the pass, in their order.
        kronecker: sites where any of these adapters has a dW.
        rescaled: sites that any of them re-scales.
        norms: weight and bias, (B, 1, d), of each norm layer that any of them tunes.
        adapters: number of rows that have an adapter at the end.
        rows, own: all rows at this moment, and the leading ones with an adapter; `split` changes them.
        splits: block -> change of the rows before it.
    """

    numbers: dict[str, SiteNumbers]
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: dict[str, tuple[Tensor, Tensor]]
    adapters: int
    rows: int
    own: int
    splits: Mapping[int, Split]

    __repr__ = short_repr

    def split(self, x: Tensor, block: int) -> Tensor:
        """Return the input of a block, its images along the first axis, with the rows from this block on."""
        change = self.splits.get(block)
        if change is None:
            return x
        self.rows, self.own = len(change.rows), change.own
        return x.index_select(0, torch.tensor(change.rows, device=x.device))

    def of(self, site: str) -> SiteNumbers:
        """Return a site's numbers for the rows that have an adapter at this moment."""
        numbers, own = self.numbers[site], self.own
        if own == self.adapters:
            return numbers
        kernels = len(numbers.c) // self.adapters
        return SiteNumbers(numbers.c[: own * kernels], *(part[:own] for part in numbers[1:]))

    def leading(self, x: Tensor) -> Tensor:
        """Return the part of a tensor, with image-major rows, that has adapters at this moment: a view."""
        return x if self.own == self.rows else x[: len(x) * self.own // self.rows]


class CurrentPass(threading.local):
    """The forward pass that this thread computes with a bank's model. Threads compute passes at the same time.

    Attributes:
        batch: adapters of the pass; None for the frozen backbone alone.
    """

    batch: Batch | None = None
    _give_way: Callable[[], None] | None = None

    @contextmanager
    def of(self, batch: Batch | None, give_way: Callable[[], None] | None) -> Iterator[None]:
        """Start a pass.

        Args:
            give_way: called before each block.
        """
        self.batch, self._give_way = batch, give_way
        try:
            yield
        finally:
            self.batch = self._give_way = None

    def pause(self) -> None:
        """Give way to other passes. The hook of each block calls this."""
        if self._give_way is not None:
            self._give_way()


class AdaptedLinear(nn.Module):
    """A site: its frozen layer, plus KARST's part for each row of the current batch that has an adapter."""

    def __init__(self, frozen: nn.Module, site: Site, current: CurrentPass) -> None:
        super().__init__()
        self._forward: Callable[[Tensor], Tensor] = (
            frozen.forward
        )  # skips `nn.Module.__call__`: there are no hooks, and the calls are many and short
        self._site = site
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        """Map (B.., d_in) to (B.., d_out)."""
        current, site = self._current.batch, self._site
        if current is None or not current.own:
            return self._forward(x)
        own = current.of(site.name)
        rescaled = site.name in current.rescaled
        if rescaled and site.rescale_in:
            if current.own == current.rows:
                x = _rescaled(x, own.in_scale, own.in_shift)
            else:
                x = x.clone(memory_format=torch.contiguous_format)
                _rescaled(current.leading(x), own.in_scale, own.in_shift, in_place=True)
        y = self._forward(x)
        if site.name in current.kronecker:
            kronecker.add_(current.leading(y), current.leading(x), own.c, own.a, own.b, site.splits)
        if rescaled and site.rescale_out:
            _rescaled(current.leading(y), own.scale, own.shift, in_place=True)
        return y


def hook_norm(norm: nn.Module, name: str, current: CurrentPass) -> None:
    """Make a norm layer use each row's own weight and bias, where its adapter tunes the layer."""

    def tune(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        batch = current.batch
        if batch is None or not batch.own or name not in batch.norms:
            return None
        weight, bias = (part[: batch.own] for part in batch.norms[name])
        x = batch.leading(args[0])
        tuned = _rescaled(F.layer_norm(x, layer.normalized_shape, eps=layer.eps), weight, bias, in_place=True)
        if batch.own == batch.rows:
            return tuned
        batch.leading(y).copy_(tuned)
        return None

    norm.register_forward_hook(tune)


def hook_block(block: nn.Module, number: int, current: CurrentPass) -> None:
    """Make a block give way to other passes, and start with the rows that the current batch has from this block on."""

    def split(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        current.pause()
        batch = current.batch
        if batch is None or number not in batch.splits:
            return None
        return batch.split(args[0], number), *args[1:]

    block.register_forward_pre_hook(split)


def _rescaled(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool = False) -> Tensor:
    """Return x * scale + shift with separate vectors per image: x (B.., d), scale and shift (B, 1, d)."""
    rows = x.reshape(len(scale), -1, x.shape[-1])  # (B, T, d)
    y: Tensor = torch.addcmul(shift, rows, scale, out=rows if in_place else None)
    return y.view(x.shape)
