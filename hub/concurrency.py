"""Per-tenant concurrency limits, groups of coroutines that fail together, and blocking calls in thread pools.

The gateway uses the limits so that one tenant's calls never queue before another tenant's. The worker's batcher has its
own fair queue, which a call reaches only after these limits.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from .errors import LimitReached

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class _TenantQueue:
    used: int = 0  # sum of the sizes of running calls
    calls: int = 0  # running and queued
    queued: deque[tuple[int, "asyncio.Future[None]"]] = field(default_factory=deque)


class TenantConcurrencyLimit:
    """At most `limit` units at once for each tenant; further calls wait in that tenant's own FIFO queue."""

    def __init__(self, limit: int, max_calls: int | None = None) -> None:
        """
        Args:
            limit: units of one tenant that run at the same time.
            max_calls: running and queued calls of one tenant; further calls are refused. None: no bound.
        """
        self._limit = limit
        self._max_calls = max_calls
        self._queues: dict[str, _TenantQueue] = {}

    @property
    def active_tenants(self) -> int:
        """Number of tenants with running or queued calls."""
        return len(self._queues)

    @asynccontextmanager
    async def acquire(self, tenant: str, size: int = 1) -> AsyncIterator[None]:
        """Wait for `size` units and hold them. A call larger than the limit runs alone.

        Raises:
            LimitReached: the tenant has `max_calls` running and queued calls.
        """
        queue = self._queues.setdefault(tenant, _TenantQueue())
        if queue.calls == self._max_calls:
            raise LimitReached(f"Too many concurrent requests for this tenant (limit {self._max_calls}).")
        size = min(size, self._limit)
        queue.calls += 1
        try:
            if queue.queued or queue.used + size > self._limit:
                await self._wait(queue, size)
            else:
                queue.used += size
            try:
                yield
            finally:
                queue.used -= size
                self._start_queued(queue)
        finally:
            queue.calls -= 1
            if not queue.calls:
                self._queues.pop(tenant, None)

    async def _wait(self, queue: _TenantQueue, size: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.queued.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():
                queue.used -= size  # `_start_queued` had granted the units before the cancellation arrived
            elif (size, future) in queue.queued:  # otherwise `_start_queued` has removed the entry
                queue.queued.remove((size, future))
            self._start_queued(queue)
            raise

    def _start_queued(self, queue: _TenantQueue) -> None:
        while queue.queued and queue.used + queue.queued[0][0] <= self._limit:
            size, future = queue.queued.popleft()
            if not future.cancelled():
                queue.used += size
                future.set_result(None)


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. The first failure cancels the other coroutines and is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def run_blocking(executor: Executor | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread pool and return its result.

    Args:
        executor: None for the event loop's default pool. Calls that may block for a minute belong there: otherwise they
            would take the threads of short calls.
    """
    return await asyncio.get_running_loop().run_in_executor(executor, lambda: function(*args, **kwargs))
