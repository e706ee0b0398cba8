"""Answers of versions to images of a dataset: from stored features, or from the workers in idle turns."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapters import Adapter

from ...admission.authentication import Caller
from ...admission.quotas import COMPARISONS, COMPARISONS_QUEUED
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...dataset_schemas import DatasetImage
from ...errors import Conflict, Unavailable
from ...registry.datasets.entries import ListedImage
from ...registry.datasets.trainings import TrainingRegistry
from ...registry.models import Task
from ...registry.tasks import TaskRegistry
from ...storage.store import Store
from ..classification import ClassificationService
from ..datasets.features import FeatureService

BATCH_IMAGES = 16  # in one classification
SCORES_AT_ONCE = 2_000_000  # images times labels, 8 MB: a head of 75,000 labels and 10,000 images has 3 GB of scores
Images: TypeAlias = Sequence[DatasetImage] | Sequence[ListedImage]


class VersionAnswers:
    """Best labels that versions of a caller's own task give to images of its dataset."""

    def __init__(
        self,
        *,
        tasks: TaskRegistry,
        trainings: TrainingRegistry,
        adapters: Store,
        images: Store,
        snapshots: Store,
        features: FeatureService,
        classification: ClassificationService,
        threads: TenantThreads,
        parse_threads: TenantThreads,
        fits: TenantThreads,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the stores.
            parse_threads: thread pool for what these calls return.
            fits: thread pool for scores, of a low priority.
        """
        self._tasks = tasks
        self._trainings = trainings
        self._adapters = adapters
        self._images = images
        self._snapshots = snapshots
        self._features = features
        self._classification = classification
        self._threads = threads
        self._parse_threads = parse_threads
        self._fits = fits
        self._limit = TenantConcurrencyLimit(COMPARISONS, COMPARISONS + COMPARISONS_QUEUED)

    @asynccontextmanager
    async def of(self, caller: Caller, task_name: str, references: Sequence[str]) -> AsyncIterator["ChosenVersions"]:
        """Hold one of the tenant's comparisons, and yield the versions of numbers or aliases.

        Raises:
            NotFound: no such task, version or alias.
            Conflict: an alias points at several versions.
            LimitReached: too many comparisons of the tenant wait.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        async with self._limit.acquire(caller.tenant):
            task = await self._tasks.task(caller.tenant, task_name)
            numbers = [_number(task, reference) for reference in references]
            adapters = [await self._adapter(caller.tenant, task.digests[number]) for number in numbers]
            spec = await self._features.spec()
            # Stored features are those that a head expects only with the same preprocessing.
            heads = all(not x.layer_shapes and x.preprocess == dict(spec.preprocess) for x in adapters)
            yield ChosenVersions(self, caller, task_name, numbers, adapters, heads=heads)

    async def trained(self, tenant: str, task: str, adapters: Sequence[Adapter]) -> set[str]:
        """Return the digests of the images that trained the adapters, as far as the task's snapshots tell."""
        named = {str((adapter.metrics or {}).get("snapshot")) for adapter in adapters}
        # Only the task's own: the metrics of an uploaded file are the client's.
        known = {training.snapshot.digest for training in await self._trainings.all(tenant, task, max_bytes=0)}
        found: set[str] = set()
        for digest in named & known:
            text = await run_blocking(self._threads.of(tenant), self._snapshots.get, digest)
            found |= await run_blocking(self._parse_threads.of(tenant), _trained_images, text)
        return found

    async def of_heads(self, tenant: str, adapters: Sequence[Adapter], images: Images) -> list[dict[str, str]]:
        """Return the labels of each head by digest. An unreadable image has none."""
        rows = await self._features.of(tenant, [image.digest for image in images])
        return [await run_blocking(self._fits.of(tenant), _labels_of_head, adapter, rows) for adapter in adapters]

    async def of_engine(self, caller: Caller, task: str, number: int, images: Images) -> dict[str, str]:
        """Return the labels by digest, from the workers, in small parts. An image whose file is lost has none."""
        found = {}
        for start in range(0, len(images), BATCH_IMAGES):
            part = []
            for image in images[start : start + BATCH_IMAGES]:
                try:
                    data = await run_blocking(self._threads.of(caller.tenant), self._images.get, image.digest)
                except Unavailable:
                    continue
                part.append((image.digest, data))
            if part:
                predicted = await self._classification.test(caller, task, str(number), part)
                labels = predicted.version.labels
                for (digest, _), answer in zip(part, predicted.answers, strict=True):
                    found[digest] = labels[int(answer.probabilities.argmax())]
        return found

    async def _adapter(self, tenant: str, digest: str) -> Adapter:
        data = await run_blocking(self._threads.of(tenant), self._adapters.get, digest)
        return await run_blocking(self._parse_threads.of(tenant), Adapter.read, data)


class ChosenVersions:
    """Some versions of one task.

    Attributes:
        heads: whether all are heads on the stored features.
    """

    def __init__(
        self,
        answers: VersionAnswers,
        caller: Caller,
        task: str,
        numbers: Sequence[int],
        adapters: Sequence[Adapter],
        *,
        heads: bool,
    ) -> None:
        self._answers = answers
        self._caller = caller
        self._task = task
        self._adapters = adapters
        self.numbers = numbers
        self.heads = heads

    async def trained(self) -> set[str]:
        """Return the digests of the images that trained one of the versions, as far as snapshots tell."""
        return await self._answers.trained(self._caller.tenant, self._task, self._adapters)

    async def labels(self, images: Images) -> list[dict[str, str]]:
        """Return the best labels of each version by digest. An unreadable image has none.

        Raises:
            LimitReached: a limit of classification.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        if self.heads:
            return await self._answers.of_heads(self._caller.tenant, self._adapters, images)
        return [await self._answers.of_engine(self._caller, self._task, number, images) for number in self.numbers]


def _number(task: Task, reference: str) -> int:
    targets = task.targets(reference)
    if len(targets) > 1:
        listed = ", ".join(map(str, targets))
        raise Conflict(f"The alias {reference!r} points at several versions ({listed}). Name one of them.")
    return next(iter(targets))


def _trained_images(snapshot: bytes) -> set[str]:
    return {image for image, _, use in json.loads(snapshot)["images"] if use == "train"}


def _labels_of_head(adapter: Adapter, rows: Mapping[str, NDArray[np.float16]]) -> dict[str, str]:
    if not rows:
        return {}
    features = np.stack([*rows.values()]).astype(np.float32)  # (n, D)
    weight, bias = adapter.head()
    step = max(1, SCORES_AT_ONCE // len(adapter.labels))
    parts = [features[start : start + step] for start in range(0, len(features), step)]
    chosen = [int(k) for part in parts for k in (part @ weight.T + bias).argmax(1)]
    return {digest: adapter.labels[k] for digest, k in zip(rows, chosen, strict=True)}
