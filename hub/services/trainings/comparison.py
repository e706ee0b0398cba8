"""Comparison of two versions on the same test images of a dataset."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from adapters.evaluation.intervals import accuracy_interval, paired_gain

from ...admission.authentication import Caller
from ...concurrency import TenantThreads, run_blocking
from ...dataset_schemas import ComparedClass, ComparedImage, ComparedVersion, Comparison
from ...errors import Conflict
from ...registry.datasets.entries import ListedImage
from ...registry.datasets.index import DatasetIndex
from .answers import VersionAnswers

HEAD_IMAGES = 10_000  # compared at most where both versions are heads on stored features
ENGINE_IMAGES = 500  # compared at most where a worker computes the answers
MAX_DIFFERING = 1000  # images in a reply


class ComparisonService:
    """Comparisons of versions of a caller's own tasks."""

    def __init__(self, index: DatasetIndex, answers: VersionAnswers, parse_threads: TenantThreads) -> None:
        """
        Args:
            parse_threads: thread pool for the figures.
        """
        self._index = index
        self._answers = answers
        self._parse_threads = parse_threads

    async def compare(self, caller: Caller, name: str, a: str, b: str) -> Comparison:
        """Compare two versions on the test images that neither was trained on, as far as their snapshots tell.

        Two heads on the frozen features read stored features. Otherwise workers classify the images in idle turns,
        within the tenant's limits.

        Args:
            a, b: version numbers or aliases.

        Raises:
            NotFound: no such task, version or alias.
            Conflict: an alias points at several versions, or no test image is left.
            LimitReached: too many comparisons of the tenant wait, or a limit of classification.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        task = caller.own_task(name)
        async with self._answers.of(caller, task, [a, b]) as versions:
            dataset = await self._index.all(caller.tenant, task)
            trained = await versions.trained()
            threads = self._parse_threads.of(caller.tenant)
            tested, unseen = await run_blocking(threads, _unseen, dataset, trained)
            images = unseen[: HEAD_IMAGES if versions.heads else ENGINE_IMAGES]
            answers = await versions.labels(images)
            compared = [image for image in images if all(image.digest in answer for answer in answers)]
            left_out = tested - len(unseen) + len(images) - len(compared)
            return await run_blocking(
                threads,
                _comparison,
                task,
                versions.numbers,
                answers,
                compared,
                left_out,
                len(unseen) - len(images),
            )


def _unseen(dataset: Sequence[ListedImage], trained: AbstractSet[str]) -> tuple[int, list[ListedImage]]:
    """Return the number of labelled test images, and those that trained no version, in order of their digests."""
    tested = [image for image in dataset if image.use == "test" and image.label is not None]
    unseen = [image for image in tested if image.digest not in trained]
    return len(tested), sorted(unseen, key=lambda image: image.digest)


def _comparison(
    task: str,
    numbers: Sequence[int],
    answers: Sequence[Mapping[str, str]],
    images: Sequence[ListedImage],
    left_out: int,
    beyond_limit: int,
) -> Comparison:
    """Return the figures of a comparison.

    Raises:
        Conflict: there are no images.
    """
    if not images:
        raise Conflict(
            "The dataset has no test image to compare on that neither version was trained on. Add labelled images "
            "with the split test."
        )
    right = [np.array([answer[image.digest] == image.label for image in images]) for answer in answers]
    versions = []
    for number, hits in zip(numbers, right, strict=True):
        count = int(hits.sum())
        low, high = accuracy_interval(count, len(images))
        accuracy = round(count / len(images), 4)
        versions.append(
            ComparedVersion(version=number, right=count, accuracy=accuracy, interval=(round(low, 4), round(high, 4)))
        )
    gain, error = paired_gain(*right)
    members = defaultdict(list)
    for i, image in enumerate(images):
        members[str(image.label)].append(i)
    classes = [
        ComparedClass(
            label=label,
            images=len(at),
            a=round(float(right[0][at].mean()), 4),
            b=round(float(right[1][at].mean()), 4),
        )
        for label, at in sorted(members.items())
    ]
    differing = [image for image in images if answers[0][image.digest] != answers[1][image.digest]]
    return Comparison(
        task=task,
        images=len(images),
        left_out=left_out,
        beyond_limit=beyond_limit,
        a=versions[0],
        b=versions[1],
        gain=round(gain, 4),
        standard_error=round(error, 4),
        better="b" if gain > error else "a" if -gain > error else None,
        classes=classes,
        differing=len(differing),
        differ=[
            ComparedImage(
                digest=image.digest,
                name=image.name,
                label=str(image.label),
                a=answers[0][image.digest],
                b=answers[1][image.digest],
            )
            for image in differing[:MAX_DIFFERING]
        ],
    )
