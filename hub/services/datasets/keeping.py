"""Classified images that the owner of a task keeps for review: their choice, and their way into the dataset.

A call only chooses, hashes and queues images. One loop per gateway stores them, so no answer waits for the store.
"""

import asyncio
import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import random

import numpy as np
from numpy.typing import NDArray

from adapters.evaluation.intervals import coverage_threshold

from ...admission.quotas import KEPT_QUEUED
from ...concurrency import TenantThreads, run_blocking
from ...coroutines import gather_or_cancel
from ...dataset_schemas import KeptAnswer
from ...errors import HubError
from ...registry.datasets.files import StoredName
from ...registry.datasets.kept import KeptImage, KeptImages
from ...schemas import Keep
from ...storage.store import Store
from ..predictions import Predicted
from ..usage.counter import UsageCounter
from .removal import FileRemoval

logger = logging.getLogger(__name__)

MARGIN = 0.3  # between the two best labels; a smaller one is uncertain
UNTYPICAL = 0.05  # typicality below which an image is uncertain
COVERAGE = 0.9  # an image with several labels in its set of this coverage is uncertain
SAMPLED = 0.1  # share of the images of `sample`
STEP_IMAGES = 16  # stored and listed in one atomic step
QUEUED_BYTES = 64 * 1024**2  # of all tenants per gateway; a quarter of it of one tenant, or one image
PAUSE_S = 60.0  # after a limit of the tenant or an error, in which a task keeps nothing
SETTLE_S = 5.0  # longest wait for an image to be stored
DAY_S, DAY_MS = 86_400, 86_400_000


@dataclass(frozen=True)
class _Queued:
    task: str
    per_day: int
    image: KeptImage
    data: bytes


class Keeper:
    """One gateway's queue of images to keep. `run` must run beside it."""

    def __init__(
        self,
        *,
        kept: KeptImages,
        images: Store,
        removal: FileRemoval,
        threads: TenantThreads,
        usage: UsageCounter,
        count: Callable[[str, int], None] | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store.
            count: counts images by their end: `kept`, `known`, `refused` or `dropped`; None: no counts.
            clock: seconds since 1970.
        """
        self._kept = kept
        self._images = images
        self._removal = removal
        self._threads = threads
        self._usage = usage
        self._metric = count
        self._clock = clock
        self._queues: dict[str, deque[_Queued]] = {}  # by tenant; the first one is next
        self._bytes = Counter[str]()  # queued or being stored, by tenant
        self._pending: set[tuple[str, str, str]] = set()
        self._closed_until: dict[tuple[str, str], float] = {}  # tasks whose day or tenant has no room
        self._work = asyncio.Event()

    async def take(
        self, owner: str, task: str, keep: Keep, predicted: Predicted, images: Sequence[bytes | NDArray[np.uint8]]
    ) -> list[str | None] | None:
        """Queue the images that the task's owner wants, and return their digests; None for images that are not kept.

        Pixels without a file are never kept.

        Returns:
            None if the task keeps no images.
        """
        if keep.images == "none":
            return None
        found: list[str | None] = [None] * len(images)
        if self._closed_until.get((owner, task), 0.0) > self._clock():
            return found
        chosen = [
            (i, data) for i, data in enumerate(images) if isinstance(data, bytes) and _is_wanted(keep, predicted, i)
        ]
        if not chosen:
            return found
        digests = await run_blocking(None, lambda: [hashlib.sha256(data).hexdigest() for _, data in chosen])
        for (i, data), digest in zip(chosen, digests, strict=True):
            if self._enqueue(owner, task, keep, predicted, i, digest, data):
                found[i] = digest
        return found

    async def settled(self, owner: str, task: str, digest: str) -> None:
        """Wait until an image that this gateway has queued is stored, for at most `SETTLE_S`."""
        until_s = time.monotonic() + SETTLE_S
        while (owner, task, digest) in self._pending and time.monotonic() < until_s:
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        """Store queued images until cancelled, one step of each tenant in turn."""
        while True:
            await self._work.wait()
            while self._queues:
                tenant, queue = next(iter(self._queues.items()))
                del self._queues[tenant]
                task = queue[0].task
                step: list[_Queued] = []
                while queue and queue[0].task == task and len(step) < STEP_IMAGES:
                    step.append(queue.popleft())
                if queue:
                    self._queues[tenant] = queue
                await self._store_step(tenant, task, step)
            self._work.clear()

    def _enqueue(
        self, owner: str, task: str, keep: Keep, predicted: Predicted, i: int, digest: str, data: bytes
    ) -> bool:
        name = owner, task, digest
        if name in self._pending:
            return True
        queue = self._queues.get(owner, deque())
        if len(queue) >= KEPT_QUEUED or not self._has_room(owner, len(data)):
            self._count("dropped", 1)
            return False
        answer, labels = predicted.answers[i], predicted.version.labels
        best = int(answer.probabilities.argmax())
        image = KeptImage(
            digest,
            f"classified-{digest[:12]}",
            len(data),
            int(self._clock() * 1000) + keep.days * DAY_MS,
            KeptAnswer(
                version=predicted.version.version,
                label=labels[best],
                score=round(float(answer.probabilities[best]), 6),
                typicality=None if answer.typicality is None else round(answer.typicality, 6),
            ),
        )
        queue.append(_Queued(task, keep.per_day, image, data))
        self._queues.setdefault(owner, queue)
        self._bytes[owner] += len(data)
        self._pending.add(name)
        self._work.set()
        return True

    def _has_room(self, owner: str, size_bytes: int) -> bool:
        """Return whether an image fits. One tenant's large images leave room for those of others."""
        own_bytes = self._bytes[owner]
        fits_own = not own_bytes or own_bytes + size_bytes <= QUEUED_BYTES // 4
        return fits_own and self._bytes.total() + size_bytes <= QUEUED_BYTES

    async def _store_step(self, tenant: str, task: str, step: Sequence[_Queued]) -> None:
        try:
            statuses = await self._store(tenant, task, step)
        except HubError as error:
            logger.warning("%d classified images are not kept: %s", len(step), error.detail)
            statuses = ["error"] * len(step)
        except Exception:
            logger.exception("%d classified images are not kept", len(step))
            statuses = ["error"] * len(step)
        finally:
            for queued in step:
                self._bytes[tenant] -= len(queued.data)
                self._pending.discard((tenant, task, queued.image.digest))
            self._bytes += Counter()  # drops tenants without bytes
        self._usage.kept(tenant, task, statuses.count("added"))
        ends = {"added": "kept", "there": "known", "error": "dropped"}
        for end, images in Counter(ends.get(status, "refused") for status in statuses).items():
            self._count(end, images)
        self._note_room(tenant, task, statuses)

    async def _store(self, tenant: str, task: str, step: Sequence[_Queued]) -> list[str]:
        pool = self._threads.of(tenant)
        await gather_or_cancel(
            run_blocking(pool, self._images.put, queued.image.digest, queued.data) for queued in step
        )
        statuses = await self._kept.keep(tenant, task, [queued.image for queued in step], step[-1].per_day)
        unlisted = [
            StoredName("", queued.image.digest)
            for queued, status in zip(step, statuses, strict=True)
            if status not in ("added", "there", "removing")
        ]
        # Another dataset may have given up the same file between the first write and the listing.
        await gather_or_cancel(
            run_blocking(pool, self._images.put_missing, queued.image.digest, queued.data)
            for queued, status in zip(step, statuses, strict=True)
            if status == "added"
        )
        await self._removal.remove(unlisted)  # otherwise refused images would fill the store
        return statuses

    def _count(self, end: str, images: int) -> None:
        if self._metric is not None:
            self._metric(end, images)

    def _note_room(self, tenant: str, task: str, statuses: Sequence[str]) -> None:
        now = self._clock()
        self._closed_until = {name: until for name, until in self._closed_until.items() if until > now}
        if "day" in statuses:
            self._closed_until[tenant, task] = min((now // DAY_S + 1) * DAY_S, now + PAUSE_S)
        elif "limit" in statuses or "error" in statuses:
            self._closed_until[tenant, task] = now + PAUSE_S


def _is_wanted(keep: Keep, predicted: Predicted, i: int) -> bool:
    match keep.images:
        case "all":
            return True
        case "sample":
            return random() < SAMPLED  # noqa: S311
        case "uncertain":
            return is_uncertain(predicted, i)
    return False


def is_uncertain(predicted: Predicted, i: int) -> bool:
    """Return whether the answer to an image is uncertain.

    It is, if the image is unknown or untypical, or if its label set has several labels. For a version without data for
    label sets, two close probabilities decide.
    """
    answer = predicted.answers[i]
    if answer.typicality is not None and answer.typicality < max(UNTYPICAL, predicted.unknown_below):
        return True
    if len(answer.probabilities) < 2:
        return False
    second, first = np.partition(answer.probabilities, -2)[-2:]
    coverage = predicted.version.coverage
    if coverage:
        try:
            return bool(second >= coverage_threshold(coverage, COVERAGE))
        except ValueError:  # the version has data of other coverages only
            pass
    return bool(first - second < MARGIN)
