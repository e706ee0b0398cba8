"""Counts of answers in a gateway's memory, written to the registry every few seconds.

A classification only adds numbers in memory, so it never waits for Redis. While Redis does not answer, the counts of a
bounded number of tasks and labels wait; a gateway that is killed loses the counts since its last write.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from uuid import uuid4

from ...admission.quotas import USAGE_LABELS, USAGE_QUEUED
from ...registry.datasets.usage import OTHER, TENTHS, DayName, UsageDay, UsageRegistry, VersionCounts
from ...registry.redis.repetition import repeat
from ..predictions import Predicted

WRITE_S = 5.0
QUEUED = 10 * USAGE_QUEUED  # counts of all tenants that wait in a gateway
CALL_COUNTS = 2000  # counts in one call, so that it takes Redis a few milliseconds
DAY_S = 86_400


class UsageCounter:
    """One gateway's counts. `run` must run beside it, and `write` writes the last ones."""

    def __init__(
        self,
        registry: UsageRegistry,
        *,
        count_lost: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            count_lost: counts answers without room in memory; None: no counts.
            clock: seconds since 1970.
        """
        self._registry = registry
        self._count_lost = count_lost
        self._clock = clock
        self._gateway = uuid4().hex
        self._number = 0  # of the last call
        self._days: dict[DayName, UsageDay] = {}
        self._queued: Counter[str] = Counter()  # counts by tenant
        self._queued_total = 0
        self._calls: deque[tuple[int, Mapping[DayName, UsageDay]]] = deque()  # the same again until Redis confirms them
        self._writing = asyncio.Lock()

    def answered(self, tenant: str, task: str, predicted: Predicted) -> None:
        """Count the answers to the images of a call. Never raises and never waits."""
        version = str(predicted.version.version)
        day = self._day(tenant, task)
        if day is None or (version not in day.v and not self._has_room(tenant)):
            self._lose(len(predicted.answers))
            return
        if version not in day.v:
            day.v[version] = VersionCounts()
            self._enqueue(tenant)
        counts, unknown = day.v[version], predicted.unknown
        for answer in predicted.answers:
            label = predicted.version.labels[int(answer.probabilities.argmax())]
            if label not in counts.l and (len(counts.l) >= USAGE_LABELS or not self._has_room(tenant)):
                label = OTHER
            if label not in counts.l:
                self._enqueue(tenant)
            counts.l[label] = counts.l.get(label, 0) + 1
            if answer.typicality is not None:
                counts.h[min(int(answer.typicality * TENTHS), TENTHS - 1)] += 1
                counts.m += 1
                counts.t += answer.typicality
        counts.n += len(predicted.answers)
        counts.u += sum(unknown or ())

    def kept(self, tenant: str, task: str, images: int) -> None:
        """Count images that the task's dataset has kept."""
        if (day := self._day(tenant, task)) is not None:
            day.k += images

    def reviewed(self, tenant: str, task: str, *, correct: bool) -> None:
        """Count an answer that feedback has confirmed or corrected."""
        if (day := self._day(tenant, task)) is not None:
            day.c += correct
            day.r += not correct

    async def run(self) -> None:
        """Write the counts every `WRITE_S` until cancelled."""
        # The connection logs why Redis does not answer; the counts wait.
        await repeat(self.write, WRITE_S, "writing counts of answers", logging.DEBUG)

    async def write(self) -> None:
        """Write the counts of all answers until now.

        Raises:
            Unavailable: Redis does not answer; the counts wait for the next call.
        """
        async with self._writing:
            await self._write_calls()
            self._calls.extend(self._numbered())  # once: under load further answers come during each write
            await self._write_calls()

    async def _write_calls(self) -> None:
        while self._calls:
            number, days = self._calls[0]
            await self._registry.add(self._gateway, number, days)
            self._calls.popleft()

    def _numbered(self) -> Iterator[tuple[int, Mapping[DayName, UsageDay]]]:
        """Yield the counts in calls of a limited size. New counts begin with zero."""
        days, self._days = self._days, {}
        self._queued.clear()
        self._queued_total = 0
        part: dict[DayName, UsageDay] = {}
        size = 0
        for name, day in days.items():
            part[name] = day
            size += 1 + sum(1 + len(counts.l) for counts in day.v.values())
            if size >= CALL_COUNTS:
                self._number += 1
                yield self._number, part
                part, size = {}, 0
        if part:
            self._number += 1
            yield self._number, part

    def _day(self, tenant: str, task: str) -> UsageDay | None:
        """Return today's counts of a task; None if there is no room for them."""
        name = DayName(tenant, task, int(self._clock() // DAY_S))
        if name not in self._days:
            if not self._has_room(tenant):
                return None
            self._days[name] = UsageDay()
            self._enqueue(tenant)
        return self._days[name]

    def _has_room(self, tenant: str) -> bool:
        return self._queued[tenant] < USAGE_QUEUED and self._queued_total < QUEUED

    def _enqueue(self, tenant: str) -> None:
        self._queued[tenant] += 1
        self._queued_total += 1

    def _lose(self, images: int) -> None:
        if self._count_lost is not None:
            self._count_lost(images)
