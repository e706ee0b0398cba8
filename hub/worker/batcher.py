"""Batches of images from many tenants: when a batch starts, and which caller gets which result.

`FairQueue` decides the content of a batch. The batcher knows neither adapters nor torch. It runs on one event loop.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

from .fair_queue import BatchSize, FairQueue

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher(Generic[Item, Result]):
    """Collects items while a batch runs, and runs them as the next batch."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        batch_size: Callable[[], BatchSize],
        wait_s: float,
        tenant_limit: int,
        max_running: int = 1,
        images_of: Callable[[Item], int] = lambda _: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run: computes a batch, and returns one result for each item in the same order.
            batch_size: returns the size limits of the next batch.
            wait_s: longest time that a batch waits to become as large as the last one. The first batch after an idle
                time of `wait_s` does not wait.
            tenant_limit: largest number of queued images of one tenant.
            max_running: batches that run at once. A batch starts beside another only if it is full; until then more
                items can join it.
            images_of: returns as how many images an item counts, at least 1.
        """
        self._run = run
        self._batch_size = batch_size
        self._wait_s = wait_s
        self._max_running = max_running
        self._clock = clock
        self._queue: FairQueue[_Entry[Item, Result]] = FairQueue(tenant_limit, lambda entry: images_of(entry.item))
        self._images_of = images_of
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()  # otherwise a task could be garbage-collected
        self._collecting_since_s = clock()  # first item of the next batch, or end of the last batch
        self._last_size = 1
        self._timer: asyncio.TimerHandle | None = None  # of the next look at the queue
        self._is_due = False  # the event loop's next round looks at the queue

    @property
    def queued(self) -> int:
        """Number of images that are in no batch yet."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether no item is queued and no batch runs."""
        return not self._queue and not self._running

    async def submit(self, tenant: str, items: Sequence[Item], weight: float = 1.0) -> list[Result]:
        """Return the results of items, which may be computed in several batches.

        A cancelled call removes its queued items. An item that already runs is computed, and its result dropped.

        Args:
            weight: the tenant's share, relative to other tenants; more than 0.

        Raises:
            LimitReached: the tenant would have more than `tenant_limit` queued images. No item is run.
            Exception: any error of `run` for a batch that contains one of the items.
        """
        now_s = self._clock()
        if not self._queue:
            if not self._running and now_s - self._collecting_since_s > self._wait_s:
                self._last_size = 1  # idle: the next batch starts at once
            self._collecting_since_s = max(self._collecting_since_s, now_s)
        entries: list[_Entry[Item, Result]] = [_Entry(item) for item in items]
        self._queue.push(tenant, entries, weight, now_s)
        self._look_soon()
        try:
            return await asyncio.gather(*(entry.future for entry in entries))
        finally:
            self._abandon(tenant, entries)

    def _abandon(self, tenant: str, entries: Sequence[_Entry[Item, Result]]) -> None:
        """Remove a call's entries without a result from the queue, after a cancellation or a failed batch."""
        without_result = []
        for entry in entries:
            if not entry.future.done():
                entry.future.cancel()
            if entry.future.cancelled():
                without_result.append(entry)
            else:
                entry.future.exception()  # otherwise asyncio logs each further error of the call as never retrieved
        self._queue.discard(tenant, without_result)

    def _look_soon(self) -> None:
        """Start the next batches after all calls that become ready in this round of the event loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._start_batches, context=Context())

    def _start_batches(self) -> None:
        """Start every batch that need not wait, and look at the queue again when the next one has waited.

        A batch has a context of its own, since it belongs to several calls.
        """
        self._is_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while (delay_s := self._delay_s()) <= 0:
            batch = self._queue.pop_batch(self._batch_size(), self._clock())
            self._last_size = sum(self._images_of(entry.item) for entry in batch)
            self._running += 1
            task = loop.create_task(self._compute(batch), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if delay_s != inf:
            self._timer = loop.call_later(delay_s, self._start_batches, context=Context())

    def _delay_s(self) -> float:
        """Return the seconds until the next batch starts; infinity if it cannot start before something changes."""
        if not self._queue or self._running >= self._max_running:
            return inf
        now_s = self._clock()
        if len(self._queue) >= self._queue.batch_limit(self._batch_size(), now_s):
            return 0
        if self._running:
            return inf
        if len(self._queue) >= self._last_size:
            return 0
        return max(0.0, self._collecting_since_s + self._wait_s - now_s)

    async def _compute(self, batch: list[_Entry[Item, Result]]) -> None:
        # A call that was cancelled since `pop_batch` may have released its adapter, whose slot may then be reused.
        # No other code runs on this loop between this line and the first await of `run`.
        batch = [entry for entry in batch if not entry.future.done()]
        found: list[tuple[_Entry[Item, Result], Result]] = []
        failed: list[_Entry[Item, Result]] = []
        error = Exception()
        try:
            if batch:
                found = [*zip(batch, await self._run([entry.item for entry in batch]), strict=True)]
        except Exception as raised:  # any error belongs to the callers of this batch, and must not stop the next one
            failed, error = batch, raised
        finally:
            self._running -= 1
            self._collecting_since_s = self._clock()
            # Before the callers get their results: what they do with these takes the event loop's time.
            self._start_batches()
        for entry, result in found:
            if not entry.future.done():
                entry.future.set_result(result)
        for entry in failed:
            if not entry.future.done():
                entry.future.set_exception(error)
