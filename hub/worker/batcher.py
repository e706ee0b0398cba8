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

PEAK_WINDOW_S = 1.0  # the peak of images at once is that of the last one to two windows

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Peak:
    """Largest of the numbers noted in the last one to two windows."""

    def __init__(self) -> None:
        self._window_start_s = -inf
        self._current = self._previous = 0

    def note(self, number: int, now_s: float) -> None:
        """Add a number."""
        self._turn(now_s)
        self._current = max(self._current, number)

    def value(self, now_s: float) -> int:
        """Return the peak; 0 if nothing was noted."""
        self._turn(now_s)
        return max(self._current, self._previous)

    def _turn(self, now_s: float) -> None:
        age_s = now_s - self._window_start_s
        if age_s >= PEAK_WINDOW_S:
            self._previous = self._current if age_s < 2 * PEAK_WINDOW_S else 0
            self._current, self._window_start_s = 0, now_s


class Batcher(Generic[Item, Result]):
    """Collects items while a batch runs, and runs them as the next batch.

    Two batches run at once, each on half of the cores, where several calls have enough images for both. Then no core
    is idle while a batch waits for its slower half, or while the answers to a batch go out and new images come in. A
    call that comes alone has all cores. So have the short batches beside a heavy tenant, since the images of other
    tenants wait for their end.
    """

    def __init__(
        self,
        run: Callable[[list[Item], bool], Awaitable[Sequence[Result]]],
        *,
        batch_size: Callable[[], BatchSize],
        wait_s: float,
        tenant_limit: int,
        shared_size: Callable[[], BatchSize | None] = lambda: None,
        always_shared: bool = False,
        images_of: Callable[[Item], int] = lambda _: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run: computes a batch, and returns one result for each item in the same order. Its second argument says
                whether another batch may run at the same time.
            batch_size: returns the size limits of the next batch.
            wait_s: longest time that a batch waits to become as large as the last one. The first batch after an idle
                time of `wait_s` does not wait.
            tenant_limit: largest number of queued images of one tenant.
            shared_size: returns the size limits of a batch beside which another may run; None if only one can run.
            always_shared: two batches may run at once also when one call comes alone.
            images_of: returns as how many images an item counts, at least 1.
        """
        self._run = run
        self._batch_size = batch_size
        self._wait_s = wait_s
        self._shared_size = shared_size
        self._always_shared = always_shared
        self._clock = clock
        self._queue: FairQueue[_Entry[Item, Result]] = FairQueue(tenant_limit, lambda entry: images_of(entry.item))
        self._images_of = images_of
        self._running = 0
        self._is_shared = always_shared  # another batch may start beside those that run
        self._calls = 0  # without all of their results
        self._images = 0  # of batches that run
        self._peak = _Peak()  # images of several calls at once
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
        self._calls += 1
        if self._calls > 1:
            self._peak.note(self._images + len(self._queue), now_s)
        self._look_soon()
        try:
            return await asyncio.gather(*(entry.future for entry in entries))
        finally:
            self._calls -= 1
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
            now_s = self._clock()
            batch = self._queue.pop_batch(self._size(now_s), now_s)
            self._last_size = sum(self._images_of(entry.item) for entry in batch)
            self._running += 1
            self._images += self._last_size
            task = loop.create_task(self._compute(batch, self._is_shared, self._last_size), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if delay_s != inf:
            self._timer = loop.call_later(delay_s, self._start_batches, context=Context())

    def _delay_s(self) -> float:
        """Return the seconds until the next batch starts; infinity if it cannot start before something changes."""
        if not self._queue:
            return inf
        now_s = self._clock()
        should_share = self._always_shared or self._should_share(now_s)
        if not self._running:
            self._is_shared = should_share
        elif self._running > 1 or not (self._is_shared and should_share):
            return inf
        size = self._size(now_s)
        if len(self._queue) >= self._queue.batch_limit(size, now_s):
            return 0
        if self._running:
            return 0 if len(self._queue) >= max(size.beside, self._last_size) else inf
        if len(self._queue) >= self._last_size:
            return 0
        return max(0.0, self._collecting_since_s + self._wait_s - now_s)

    def _should_share(self, now_s: float) -> bool:
        """Return whether the next batch should run beside another one."""
        size = self._shared_size()
        if size is None or len(self._queue) < size.beside or self._calls < 2:
            return False
        return self._peak.value(now_s) >= 2 * size.beside and not self._queue.has_heavy_tenant(now_s)

    def _size(self, now_s: float) -> BatchSize:
        """Return the size limits of the next batch. Two batches at once have half of the images each."""
        size = self._shared_size() if self._is_shared else None
        if size is None or self._always_shared:
            return size or self._batch_size()
        full = max(size.beside, min(size.full, self._peak.value(now_s) // 2))
        return size._replace(full=full, short=full)

    async def _compute(self, batch: list[_Entry[Item, Result]], shared: bool, images: int) -> None:
        # A call that was cancelled since `pop_batch` may have released its adapter, whose slot may then be reused.
        # No other code runs on this loop between this line and the first await of `run`.
        batch = [entry for entry in batch if not entry.future.done()]
        found: list[tuple[_Entry[Item, Result], Result]] = []
        failed: list[_Entry[Item, Result]] = []
        error = Exception()
        try:
            if batch:
                found = [*zip(batch, await self._run([entry.item for entry in batch], shared), strict=True)]
        except Exception as raised:  # any error belongs to the callers of this batch, and must not stop the next one
            failed, error = batch, raised
        finally:
            self._running -= 1
            self._images -= images
            self._collecting_since_s = self._clock()
            # Before the callers get their results: what they do with these takes the event loop's time.
            self._start_batches()
        for entry, result in found:
            if not entry.future.done():
                entry.future.set_result(result)
        for entry in failed:
            if not entry.future.done():
                entry.future.set_exception(error)
