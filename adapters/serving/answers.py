"""Adapters of one pass, and their answers: from pooled features to logits and typicality.

Axes: K classes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..short_repr import short_repr
from .heads import Heads, HeadScores
from .row_plan import RowPlan
from .typicality import DeviceTypicality, typicality_of


class Slot(NamedTuple):
    """Handle of an adapter in a bank; each `put` has a new generation, so a stale handle never matches."""

    number: int
    generation: int


@dataclass(frozen=True)
class Resident:
    """The parts of an adapter in a slot that are not in the slot memory."""

    generation: int
    kernels: int
    rank: int
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: frozenset[str]
    first_block: int  # see `Bank.first_block`
    head_weight: Tensor  # (K, D)
    head_bias: Tensor  # (K,)
    typicality: DeviceTypicality | None

    __repr__ = short_repr


class Scores(NamedTuple):
    """Logits of one image, and its typicality."""

    logits: Tensor  # (K,), in the backbone's dtype
    typicality: float | None  # in [0, 1]; None where the adapter has no typicality


class ImageTasks(NamedTuple):
    """The adapters that classify one image: those in slots, and heads on the frozen features."""

    slots: Sequence[Slot] = ()
    heads: Heads | None = None


class ImageScores(NamedTuple):
    """Answers to one image."""

    scores: list[Scores]  # one for each slot
    heads: HeadScores | None  # where the image has heads


def answers(
    tasks: Sequence[ImageTasks],
    residents: Sequence[Sequence[Resident]],
    plan: RowPlan,
    pooled: Tensor,
    *,
    typicality: bool,
) -> list[ImageScores]:
    """Return the answers to each image.

    Args:
        residents: the adapters in each image's slots.
        pooled: features of the plan's rows at the end of the pass, (B, D).
        typicality: False leaves it out of the answers of slots.
    """
    rows = {at: row for row, at in enumerate(plan.adapters)}
    frozen = {image: len(rows) + i for i, image in enumerate(plan.shared)}
    places = [(image, i) for image, own in enumerate(residents) for i in range(len(own))]
    asked = [(residents[image][i], rows.get((image, i), frozen.get(image, 0))) for image, i in places]
    logits = [torch.addmv(resident.head_bias, resident.head_weight, pooled[row]) for resident, row in asked]
    shares: Sequence[float | None] = [None] * len(asked)
    if typicality and asked:
        shares = typicality_of([resident.typicality for resident, _ in asked], pooled[[row for _, row in asked]])
    scores = iter([Scores(row, share) for row, share in zip(logits, shares, strict=True)])
    return [
        ImageScores(
            [next(scores) for _ in own],
            None if image.heads is None else image.heads.score(pooled[frozen[i]]),
        )
        for i, (image, own) in enumerate(zip(tasks, residents, strict=True))
    ]
