"""The review queue of a dataset: images without a label, labels that are probably wrong, feedback. No HTTP, no Ray.

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
from ...dataset_schemas import DatasetImage, Feedback, FeedbackGiven, ReviewImage, ReviewKind, ReviewQueue
from ...registry.datasets.index import DatasetIndex
from ...schemas import Prediction
from ..label_sets import best
from ..usage.counter import UsageCounter
from .features import FeatureService
from .keeping import Keeper
from .review_order import FEW, margins_of, suspects_first, typical_first, uncertain_first, unit_rows

if TYPE_CHECKING:
    from adapters.training.instant import InstantHead

UNLABELLED = 4000  # newest images without a label that one call looks at
LABELLED = 4000  # images with a label, the newest of each
LABELS = 400
PAGE = 1000
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
            free = await self._pages(caller.tenant, task, None, UNLABELLED) if kind == "unlabelled" else []
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
            images += await self._pages(tenant, task, label, max(2, LABELLED // len(labels)))
        return images

    async def _pages(self, tenant: str, task: str, label: str | None, limit: int) -> list[DatasetImage]:
        images: list[DatasetImage] = []
        before = 0
        while len(images) < limit:
            page = await self._index.page(
                tenant,
                task,
                label=label,
                unlabelled=label is None,
                use=None,
                before=before,
                count=min(PAGE, limit - len(images)),
            )
            images += page.images
            if page.next is None:
                break
            before = int(page.next)
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
