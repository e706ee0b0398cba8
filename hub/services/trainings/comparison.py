"""Comparison of two versions on the same test images of a dataset."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import Adapter
from adapters.evaluation.calibration import accuracy_interval, paired_gain

from ...admission.authentication import Caller
from ...admission.quotas import COMPARISONS, COMPARISONS_QUEUED
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...dataset_schemas import ComparedClass, ComparedImage, ComparedVersion, Comparison
from ...errors import Conflict, Unavailable
from ...registry.datasets.entries import ListedImage
from ...registry.datasets.index import DatasetIndex
from ...registry.datasets.trainings import TrainingRegistry
from ...registry.models import Task
from ...registry.tasks import TaskRegistry
from ...storage.store import Store
from ..classification import ClassificationService
from ..datasets.features import FeatureService

HEAD_IMAGES = 10_000  # compared at most where both versions are heads on stored features
ENGINE_IMAGES = 500  # compared at most where a worker computes the answers
BATCH_IMAGES = 16  # in one classification
MAX_DIFFERING = 1000  # images in a reply


class ComparisonService:
    """Comparisons of versions of a caller's own tasks."""

    def __init__(
        self,
        *,
        index: DatasetIndex,
        trainings: TrainingRegistry,
        tasks: TaskRegistry,
        adapters: Store,
        images: Store,
        snapshots: Store,
        features: FeatureService,
        classification: ClassificationService,
        threads: TenantThreads,
        parse_threads: TenantThreads,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the stores.
            parse_threads: thread pool for what these calls return.
        """
        self._index = index
        self._trainings = trainings
        self._tasks = tasks
        self._adapters = adapters
        self._images = images
        self._snapshots = snapshots
        self._features = features
        self._classification = classification
        self._threads = threads
        self._parse_threads = parse_threads
        self._limit = TenantConcurrencyLimit(COMPARISONS, COMPARISONS + COMPARISONS_QUEUED)

    async def compare(self, caller: Caller, name: str, a: str, b: str) -> Comparison:
        """Compare two versions on the test images that neither was trained on, as far as their snapshots tell.

        Two heads on the frozen features read stored features. Otherwise the images are classified, within the tenant's
        limits.

        Args:
            a, b: version numbers or aliases.

        Raises:
            NotFound: no such task, version or alias.
            Conflict: an alias points at several versions, or no test image is left.
            LimitReached: too many comparisons of the tenant wait, or a limit of classification.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        task_name = caller.own_task(name)
        async with self._limit.acquire(caller.tenant):
            task = await self._tasks.task(caller.tenant, task_name)
            numbers = [_number(task, reference) for reference in (a, b)]
            adapters = [await self._adapter(caller.tenant, task.digests[number]) for number in numbers]
            dataset = await self._index.all(caller.tenant, task_name)
            tested = [image for image in dataset if image.use == "test" and image.label is not None]
            trained = await self._trained(caller.tenant, task_name, adapters)
            unseen = sorted((image for image in tested if image.digest not in trained), key=lambda image: image.digest)
            both_heads = not any(adapter.layers for adapter in adapters) and await self._use_features(adapters)
            images = unseen[: HEAD_IMAGES if both_heads else ENGINE_IMAGES]
            if both_heads:
                rows = await self._features.of(caller.tenant, [image.digest for image in images])
                answers = [await self._of_head(caller.tenant, adapter, rows) for adapter in adapters]
            else:
                answers = [await self._of_engine(caller, task_name, number, images) for number in numbers]
            compared = [image for image in images if all(image.digest in answer for answer in answers)]
            left_out = len(tested) - len(unseen) + len(images) - len(compared)
            parse = self._parse_threads.of(caller.tenant)
            return await run_blocking(
                parse, _comparison, task_name, numbers, answers, compared, left_out, len(unseen) - len(images)
            )

    async def _adapter(self, tenant: str, digest: str) -> Adapter:
        data = await run_blocking(self._threads.of(tenant), self._adapters.get, digest)
        return await run_blocking(self._parse_threads.of(tenant), Adapter.read, data)

    async def _use_features(self, adapters: Sequence[Adapter]) -> bool:
        """Return whether the stored features are those that the adapters' heads expect."""
        spec = await self._features.spec()
        return all(adapter.preprocess == dict(spec.preprocess) for adapter in adapters)

    async def _trained(self, tenant: str, task: str, adapters: Sequence[Adapter]) -> set[str]:
        """Return the digests of the images that trained the adapters, as far as the task's snapshots tell."""
        named = {str((adapter.metrics or {}).get("snapshot")) for adapter in adapters}
        # Only the task's own: the metrics of an uploaded file are the client's.
        known = {training.snapshot.digest for training in await self._trainings.all(tenant, task)}
        found: set[str] = set()
        for digest in named & known:
            text = await run_blocking(self._threads.of(tenant), self._snapshots.get, digest)
            found |= await run_blocking(self._parse_threads.of(tenant), _trained_images, text)
        return found

    async def _of_head(self, tenant: str, adapter: Adapter, rows: Mapping[str, NDArray[np.float16]]) -> dict[str, str]:
        return await run_blocking(self._threads.of(tenant), _answers_of_head, adapter, rows)

    async def _of_engine(self, caller: Caller, task: str, number: int, images: Sequence[ListedImage]) -> dict[str, str]:
        """Classify images in small parts. An image whose file is lost has no answer."""
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


def _number(task: Task, reference: str) -> int:
    targets = task.targets(reference)
    if len(targets) > 1:
        listed = ", ".join(map(str, targets))
        raise Conflict(f"The alias {reference!r} points at several versions ({listed}). Name one of them.")
    return next(iter(targets))


def _trained_images(snapshot: bytes) -> set[str]:
    return {image for image, _, use in json.loads(snapshot)["images"] if use == "train"}


def _answers_of_head(adapter: Adapter, rows: Mapping[str, NDArray[np.float16]]) -> dict[str, str]:
    if not rows:
        return {}
    features = torch.from_numpy(np.stack([*rows.values()]).astype(np.float32))  # (n, D)
    tensors = adapter.tensors
    logits = features @ tensors["head.weight"].float().T + tensors["head.bias"].float()  # (n, K)
    chosen = logits.argmax(1).tolist()
    return {digest: adapter.labels[k] for digest, k in zip(rows, chosen, strict=True)}


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
    right = [torch.tensor([answer[image.digest] == image.label for image in images]) for answer in answers]
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
            a=round(float(right[0][at].double().mean()), 4),
            b=round(float(right[1][at].double().mean()), 4),
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
