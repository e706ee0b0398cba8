"""Rows of a forward pass whose images belong to several adapters each.

An adapter leaves the frozen backbone's path at its first adapted block. Up to there an image has one shared row for all
of its adapters; at that block the adapter gets a copy of the row for itself. Heads on the frozen features need only the
shared row, up to the end.

Rows with an adapter of their own come first, so that a layer changes only the leading rows of its output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Split(NamedTuple):
    """Change of the rows before a block."""

    rows: list[int]  # for each row from this block on, the row that it was before
    own: int  # rows with an adapter of their own, from this block on


@dataclass(frozen=True)
class RowPlan:
    """The rows of a pass.

    Attributes:
        start: image of each row at the model's input.
        own: number of leading rows there that have an adapter of their own.
        splits: block -> change of the rows before it.
        adapters: (image, position among its adapters) of each row with an adapter of its own, in the rows' final order.
        shared: images whose shared row reaches the end, in the order of these rows behind the others.
    """

    start: list[int]
    own: int
    splits: Mapping[int, Split]
    adapters: list[tuple[int, int]]
    shared: list[int]

    def passes(self, blocks: int) -> float:
        """Return the work in units of one image's pass through all blocks; what adapters add is not counted."""
        if not blocks:
            return float(len(self.start))
        rows, total = len(self.start), 0
        for block in range(blocks):
            rows = len(self.splits[block].rows) if block in self.splits else rows
            total += rows
        return total / blocks


def plan_rows(firsts: Sequence[Sequence[int]], heads: Sequence[bool], blocks: int) -> RowPlan:
    """Return the rows of a pass over images with several adapters each.

    Args:
        firsts: for each image the first adapted block of each of its adapters: -1 where something before block 0 is
            adapted, `blocks` for an adapter that is only a head.
        heads: whether heads on the frozen features classify the image too.
        blocks: number of blocks.
    """
    # A single adapter has the row for itself from the start, which costs nothing more and copies nothing.
    firsts = [
        [-1] if len(own) == 1 and not head and own[0] < blocks else own for own, head in zip(firsts, heads, strict=True)
    ]
    own = sorted(
        (first, image, position)
        for image, own_firsts in enumerate(firsts)
        for position, first in enumerate(own_firsts)
        if first < blocks
    )
    last = [
        blocks if head else max(own_firsts, default=blocks)  # the block before which the shared row ends
        for own_firsts, head in zip(firsts, heads, strict=True)
    ]
    shared = [image for image in range(len(firsts)) if last[image] >= 0]
    count = sum(first < 0 for first, _, _ in own)
    start = [image for _, image, _ in own[:count]] + shared
    splits: dict[int, Split] = {}
    own_at_start = count
    for block in sorted({first for first, _, _ in own if first >= 0}):
        position_of = {image: count + i for i, image in enumerate(shared)}
        leaving = [image for first, image, _ in own if first == block]
        shared = [image for image in shared if last[image] > block]
        rows = [*range(count), *(position_of[image] for image in leaving), *(position_of[image] for image in shared)]
        count += len(leaving)
        splits[block] = Split(rows, count)
    return RowPlan(start, own_at_start, splits, [(image, position) for _, image, position in own], shared)
