"""The review queue of a dataset: images without a label, labels that are probably wrong, near-duplicates, feedback.

A call looks at a bounded number of images, so a dataset of 100,000 takes no longer than one of 10,000. Features come
from the store; the arithmetic runs in the thread of fits, never on the event loop.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...admission.authentication import Caller
from ...admission.quotas import REVIEWS, REVIEWS_QUEUED
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...dataset_schemas import (
    GROUP_IMAGES,
    DatasetImage,
    Feedback,
    FeedbackGiven,
    NearDuplicatePage,
    NearDuplicates,
    ReviewImage,
    ReviewKind,
    ReviewQueue,
)
from ...registry.datasets.index import DatasetIndex
from ...schemas import Prediction
from ..label_sets import best
from ..usage.counter import UsageCounter
from .features import FeatureService
from .keeping import Keeper
from .near_duplicates import groups_of, relative_rows
from .review_order import FEW, margins_of, suspects_first, typical_first, uncertain_first, unit_rows

if TYPE_CHECKING:
    from adapters.training.instant import InstantHead

UNLABELLED = 4000  # newest images without a label that one call looks at
LABELLED = 4000  # images with a label, the newest of each
LABELS = 400
COMPARED = 10_000  # newest images that one call compares for near-duplicates
SUGGESTIONS = 3  # labels of an image


@dataclass(frozen=True)
class _Head:
    """A classifier of the labels that the dataset has."""

    labels: list[str]
    fitted: "InstantHead"

    def probabilities(self, features: NDArray[np.float16]) -> NDArray[np.float32]:
        import torch

        rows = torch.from_numpy(features.astype(np.float32))
        found: NDArray[np.float32] = (rows @ self.fitted.weight.T + self.fitted.bias).softmax(1).numpy()
        return found


class ReviewService:
    """Review of the tasks of a caller's own tenant. Raises `NotFound` for another tenant's task."""

    def __init__(
        self, index: DatasetIndex, features: FeatureService, keeper: Keeper, usage: UsageCounter, fits: TenantThreads
    ) -> None:
        """
        Args:
            fits: thread pool whose threads run torch with one thread each.
        """
        self._index = index
        self._features = features
        self._keeper = keeper
        self._usage = usage
        self._fits = fits
        self._limit = TenantConcurrencyLimit(REVIEWS, REVIEWS + REVIEWS_QUEUED)

    async def review(self, caller: Caller, name: str, kind: ReviewKind, count: int) -> ReviewQueue:
        """Return images to review, most useful first.

        Args:
            kind: `unlabelled`, or `errors` for images whose label is probably wrong.

        Raises:
            LimitReached: too many calls of the tenant.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        task = caller.own_task(name)
        async with self._limit.acquire(caller.tenant):
            labelled = await self._labelled(caller.tenant, task)
            free: list[DatasetImage] = []
            if kind == "unlabelled":
                free = await self._index.newest(caller.tenant, task, unlabelled=True, limit=UNLABELLED)
            digests = [image.digest for image in (*labelled, *free)]
            rows = await self._features.of(caller.tenant, digests)
            labelled = [image for image in labelled if image.digest in rows]
            free = [image for image in free if image.digest in rows]
            fits = self._fits.of(caller.tenant)
            if kind == "errors":
                images = await run_blocking(fits, _suspects, labelled, rows, count)
            else:
                images = await run_blocking(fits, _useful, labelled, free, rows, count)
        return ReviewQueue(task=name, kind=kind, images=images, considered=len(labelled if kind == "errors" else free))

    async def near_duplicates(self, caller: Caller, name: str, start: int, count: int) -> NearDuplicatePage:
        """Return groups of near-duplicates, those across splits first, then the most similar.

        Args:
            start: number of groups on earlier pages.

        Raises:
            LimitReached: too many calls of the tenant.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        task = caller.own_task(name)
        async with self._limit.acquire(caller.tenant):
            images = await self._index.newest(caller.tenant, task, limit=COMPARED)
            rows = await self._features.stored(caller.tenant, [image.digest for image in images], settled=True)
            images = [image for image in images if image.digest in rows]
            groups = await run_blocking(self._fits.of(caller.tenant), _near_duplicates, images, rows)
        end = start + count
        return NearDuplicatePage(
            task=name,
            considered=len(images),
            total=len(groups),
            total_across_splits=sum(group.across_splits for group in groups),
            groups=groups[start:end],
            next=str(end) if end < len(groups) else None,
        )

    async def feedback(self, caller: Caller, name: str, feedback: Feedback) -> FeedbackGiven:
        """Give an image of the dataset its true label."""
        task = caller.own_task(name)
        await self._keeper.settled(caller.tenant, task, feedback.image)
        before = (await self._index.find(caller.tenant, task, feedback.image)).label
        await self._index.change(
            caller, caller.tenant, task, [feedback.image], label=feedback.label, relabel=True, split=None
        )
        image = await self._index.find(caller.tenant, task, feedback.image)
        if image.answer is None:
            return FeedbackGiven(image=image, correct=None)
        correct = image.answer.label == feedback.label
        if before != feedback.label:  # the same feedback again is no second correction
            self._usage.reviewed(caller.tenant, task, correct=correct)
        return FeedbackGiven(image=image, correct=correct)

    async def _labelled(self, tenant: str, task: str) -> list[DatasetImage]:
        """Return the newest images of each label, equally many of each at most."""
        found = await self._index.describe(tenant, task)
        labels = [str(count.label) for count in found.labels if count.train + count.test][:LABELS]
        images: list[DatasetImage] = []
        for label in labels:
            images += await self._index.newest(tenant, task, label=label, limit=max(2, LABELLED // len(labels)))
        return images


def _fit(images: Sequence[DatasetImage], rows: Mapping[str, NDArray[np.float16]]) -> _Head | None:
    """Return a classifier; None if there are too few labels.

    Runs in the thread of fits, whose first call imports torch.
    """
    counts = Counter(str(image.label) for image in images)
    if len(counts) < 2 or max(counts.values()) < 2:
        return None
    import torch

    from adapters.training.instant import fit_head

    labels = sorted(counts)
    numbers = {label: i for i, label in enumerate(labels)}
    features = torch.from_numpy(np.stack([rows[image.digest] for image in images]).astype(np.float32))
    return _Head(labels, fit_head(features, torch.tensor([numbers[str(image.label)] for image in images]), len(labels)))


def _useful(
    labelled: Sequence[DatasetImage],
    free: Sequence[DatasetImage],
    rows: Mapping[str, NDArray[np.float16]],
    count: int,
) -> list[ReviewImage]:
    """Return images without a label: typical ones while few have labels, uncertain ones later."""
    if not free:
        return []
    head = _fit(labelled, rows)
    features = np.stack([rows[image.digest] for image in free])
    if head is None or len(labelled) < FEW * len(head.labels):
        both = np.stack([rows[image.digest] for image in (*labelled, *free)])
        places = typical_first(unit_rows(both), np.arange(len(both)) < len(labelled), count) - len(labelled)
    else:
        places = uncertain_first(unit_rows(features), head.probabilities(features), count)
    chosen = [free[place] for place in places]
    if head is None:
        return [ReviewImage(image=image, suggestions=_answered(image), margin=None) for image in chosen]
    probabilities = head.probabilities(features[places])
    return [
        ReviewImage(image=image, suggestions=best(head.labels, row, SUGGESTIONS), margin=round(float(margin), 6))
        for image, row, margin in zip(chosen, probabilities, margins_of(probabilities), strict=True)
    ]


def _answered(image: DatasetImage) -> list[Prediction]:
    """Return what the hub answered when it kept the image."""
    return [Prediction(label=image.answer.label, score=image.answer.score)] if image.answer else []


def _suspects(
    labelled: Sequence[DatasetImage], rows: Mapping[str, NDArray[np.float16]], count: int
) -> list[ReviewImage]:
    """Return images whose label a classifier of all other images does not expect, most suspicious first."""
    counts = Counter(image.label for image in labelled)
    images = [image for image in labelled if counts[image.label] > 1]  # the label of one image has no other images
    head = _fit(images, rows)
    if head is None:
        return []
    left_out = head.fitted.scores.softmax(1).float().numpy()
    targets = np.array([head.labels.index(str(image.label)) for image in images])
    return [
        ReviewImage(
            image=images[place],
            suggestions=best(head.labels, left_out[place], SUGGESTIONS),
            margin=round(float(left_out[place][targets[place]] - left_out[place].max()), 6),
        )
        for place in suspects_first(left_out, targets)[:count]
    ]


def _near_duplicates(images: Sequence[DatasetImage], rows: Mapping[str, NDArray[np.float16]]) -> list[NearDuplicates]:
    """Return all groups in the order of their pages."""
    if not images:
        return []
    groups, nearest = groups_of(relative_rows(np.stack([rows[image.digest] for image in images])))
    found = []
    for first in np.flatnonzero(np.bincount(groups) > 1):
        places = np.flatnonzero(groups == first)
        members = [images[int(place)] for place in places]
        found.append(
            NearDuplicates(
                size=len(members),
                similarity=round(float(nearest[places].max()), 4),
                across_splits=len({image.use for image in members if image.label is not None}) > 1,
                images=members[:GROUP_IMAGES],
            )
        )
    return sorted(found, key=lambda group: (not group.across_splits, -group.similarity, group.images[0].digest))
