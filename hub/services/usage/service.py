"""The use of a task: counts of its answers by day, and drift. No HTTP, no Ray."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cachetools import LRUCache

from ...admission.authentication import Caller
from ...concurrency import TenantReads, TenantThreads, run_blocking
from ...errors import NotFound, Unavailable
from ...registry.datasets.trainings import TrainingRegistry
from ...registry.datasets.usage import TENTHS, UsageDay, UsageRegistry, VersionCounts, parsed
from ...registry.models import Task
from ...registry.tasks import TaskRegistry
from ...storage.store import Store
from ...usage_schemas import Drift, TaskUsage, UsageCounts, UsageOfDay
from .counter import DAY_S, UsageCounter
from .drift import drift_of

CACHED_SNAPSHOTS = 100  # counts by label of a gateway's last snapshots


class UsageService:
    """Counts of the tasks of a caller's own tenant. Raises `NotFound` for another tenant's task."""

    def __init__(
        self,
        *,
        counter: UsageCounter,
        registry: UsageRegistry,
        tasks: TaskRegistry,
        trainings: TrainingRegistry,
        snapshots: Store,
        reads: TenantReads,
        threads: TenantThreads,
        parse_threads: TenantThreads,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            reads: turns of reads of the registry.
            threads: thread pool for calls to the store.
            parse_threads: thread pool for what reads and calls return.
            clock: seconds since 1970.
        """
        self._counter = counter
        self._registry = registry
        self._tasks = tasks
        self._trainings = trainings
        self._snapshots = snapshots
        self._reads = reads
        self._threads = threads
        self._parse_threads = parse_threads
        self._clock = clock
        self._trained: LRUCache[str, dict[str, int]] = LRUCache(CACHED_SNAPSHOTS)  # by the snapshot's digest

    async def usage(self, caller: Caller, name: str, days: int) -> TaskUsage:
        """Return the counts of the last days, today included, and drift over these days.

        Raises:
            NotFound: no such task.
            Unavailable: the registry or the store is unavailable.
        """
        task_name = caller.own_task(name)
        tenant = caller.tenant
        task = await self._tasks.task(tenant, task_name)
        await self._counter.write()
        async with self._reads.turn(tenant):
            today = int(self._clock() // DAY_S)
            numbers = range(today - days + 1, today + 1)
            texts = await self._registry.read(tenant, task_name, numbers)
        shown, total = await run_blocking(self._parse_threads.of(tenant), _days, numbers, texts)
        drift = await self._drift(tenant, task, total)
        return TaskUsage(task=name, days=shown, total=UsageCounts(**_counts(total)), drift=drift)

    async def _drift(self, tenant: str, task: Task, total: UsageDay) -> Drift | None:
        answered = [(counts.n, int(number)) for number, counts in total.v.items() if number.isdecimal()]
        existing = [(images, number) for images, number in answered if number in task.digests]
        if not existing:
            return None
        _, number = max(existing)
        try:
            info = (await self._tasks.version(tenant, task, number)).info()
        except NotFound:  # deleted in the meantime
            return None
        trained = await self._labels(tenant, task.name, str((info.metrics or {}).get("snapshot")))
        return drift_of(number, total.v[str(number)], trained, info.train_images())

    async def _labels(self, tenant: str, task: str, digest: str) -> Mapping[str, int] | None:
        """Return the labels of a snapshot with their images; None if the task has no such snapshot."""
        # Only the task's own: the metrics of an uploaded file are the client's.
        if digest not in {
            training.snapshot.digest for training in await self._trainings.all(tenant, task, max_bytes=0)
        }:
            return None
        if digest not in self._trained:
            try:
                text = await run_blocking(self._threads.of(tenant), self._snapshots.get, digest)
            except Unavailable:
                return None
            self._trained[digest] = await run_blocking(self._parse_threads.of(tenant), _labels_of, text)
        return self._trained[digest]


def _labels_of(snapshot: bytes) -> dict[str, int]:
    return dict(Counter(label for _, label, _ in json.loads(snapshot)["images"]))


def _days(numbers: Sequence[int], texts: Mapping[int, str]) -> tuple[list[UsageOfDay], UsageDay]:
    """Return the counts of each day, and their sums."""
    found = parsed(texts)
    return [_of_day(number, found.get(number, UsageDay())) for number in numbers], merged(found.values())


def merged(days: Iterable[UsageDay]) -> UsageDay:
    """Return the sums of days."""
    total = UsageDay()
    for day in days:
        total.k, total.c, total.r = total.k + day.k, total.c + day.c, total.r + day.r
        for number, counts in day.v.items():
            total.v[number] = _sum([total.v.get(number, VersionCounts()), counts])
    return total


def _sum(parts: Iterable[VersionCounts]) -> VersionCounts:
    total, labels = VersionCounts(), Counter[str]()
    for part in parts:
        labels.update(part.l)
        total.h = [a + b for a, b in zip(total.h, part.h, strict=True)]
        total.n, total.m, total.u, total.t = total.n + part.n, total.m + part.m, total.u + part.u, total.t + part.t
    total.l = dict(labels)
    return total


def _counts(day: UsageDay) -> dict[str, Any]:
    """Return the members of `UsageCounts`."""
    total = _sum(day.v.values())
    return {
        "images": total.n,
        "by_label": dict(sorted(total.l.items(), key=lambda item: (-item[1], item[0]))),
        "by_version": {number: day.v[number].n for number in sorted(day.v, key=lambda name: (len(name), name))},
        "typicality": round(total.t / total.m, 4) if total.m else None,
        "typicality_images": total.m,
        "typicality_tenths": total.h if total.m else [0] * TENTHS,
        "unknown": total.u,
        "kept": day.k,
        "confirmed": day.c,
        "corrections": day.r,
    }


def _of_day(number: int, day: UsageDay) -> UsageOfDay:
    date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number)
    return UsageOfDay(day=date.date().isoformat(), **_counts(day))
