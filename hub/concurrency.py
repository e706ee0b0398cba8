"""Per-tenant concurrency limits, and thread pools with turns by tenant.

The gateway uses them so that one tenant's calls never queue before another tenant's. The worker's batcher has its own
fair queue, which a call reaches only after these limits.
"""

import asyncio
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from .errors import LimitReached

P = ParamSpec("P")
T = TypeVar("T")
ACTIVE_S = 10.0  # a tenant counts as active for this long after its last call
REST_RATIO = 3.0  # rest of a tenant after a call that slows others, relative to the call's time
LOW_PRIORITY = 5  # nice value: about a quarter of a core beside a thread of normal priority
MAX_CHARGES = 1024  # tenants with a charge that are remembered before paid charges are removed


@dataclass
class _TenantQueue:
    used: int = 0  # sum of the sizes of running calls
    calls: int = 0  # running and queued
    queued: deque[tuple[int, "asyncio.Future[None]"]] = field(default_factory=deque)


class TenantConcurrencyLimit:
    """At most `limit` units at once for each tenant; further calls wait in that tenant's own FIFO queue."""

    def __init__(self, limit: int | Callable[[str], int], max_calls: int | None = None) -> None:
        """
        Args:
            limit: units of one tenant that run at the same time. A function returns a tenant's limit of this moment.
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
        release = await self.hold(tenant, size)
        try:
            yield
        finally:
            release()

    async def hold(self, tenant: str, size: int = 1) -> Callable[[], None]:
        """Wait for units as `acquire` does; return the function that releases them, to be called exactly once.

        Raises:
            LimitReached: the tenant has `max_calls` running and queued calls.
        """
        queue = self._queues.setdefault(tenant, _TenantQueue())
        if queue.calls == self._max_calls:
            raise LimitReached(f"Too many concurrent requests for this tenant (limit {self._max_calls}).")
        size = min(size, self._now(tenant))
        queue.calls += 1
        try:
            if queue.queued or queue.used + size > self._now(tenant):
                await self._wait(tenant, queue, size)
            else:
                queue.used += size
        except BaseException:
            self._end(tenant, queue)
            raise
        return partial(self._release, tenant, queue, size)

    def _release(self, tenant: str, queue: _TenantQueue, size: int) -> None:
        queue.used -= size
        self._start_queued(tenant, queue)
        self._end(tenant, queue)

    def _end(self, tenant: str, queue: _TenantQueue) -> None:
        queue.calls -= 1
        if not queue.calls:
            self._queues.pop(tenant, None)

    async def _wait(self, tenant: str, queue: _TenantQueue, size: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.queued.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():
                queue.used -= size  # `_start_queued` had granted the units before the cancellation arrived
            elif (size, future) in queue.queued:  # otherwise `_start_queued` has removed the entry
                queue.queued.remove((size, future))
            self._start_queued(tenant, queue)
            raise

    def _start_queued(self, tenant: str, queue: _TenantQueue) -> None:
        # A call of an idle tenant starts in any case: the limit may have fallen below its size while it was queued.
        while queue.queued and (not queue.used or queue.used + queue.queued[0][0] <= self._now(tenant)):
            size, future = queue.queued.popleft()
            if not future.cancelled():
                queue.used += size
                future.set_result(None)

    def _now(self, tenant: str) -> int:
        return self._limit if isinstance(self._limit, int) else self._limit(tenant)


class ActiveTenants:
    """The tenants that made a call in the last `ACTIVE_S` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._called_s: dict[str, float] = {}  # least recent first

    def note(self, tenant: str) -> None:
        """Note a call."""
        self._called_s.pop(tenant, None)
        self._called_s[tenant] = self._clock()
        self._forget()

    def others(self, tenant: str) -> int:
        """Return the number of active tenants besides this one."""
        self._forget()
        return len(self._called_s) - (tenant in self._called_s)

    def limit(self, alone: int, beside: int) -> Callable[[str], int]:
        """Return the function of a limit that is lower for a tenant while another tenant is active.

        Args:
            alone: limit of the only active tenant.
            beside: limit beside others; never above `alone`.
        """
        return lambda tenant: min(alone, beside) if self.others(tenant) else alone

    def _forget(self) -> None:
        oldest_s = self._clock() - ACTIVE_S
        while self._called_s and next(iter(self._called_s.values())) < oldest_s:
            self._called_s.pop(next(iter(self._called_s)))


class TenantTurns:
    """Slots that waiting tenants take in turns, fair by cost: start-time fair queueing (Goyal et al., SIGCOMM 1996).

    A free slot goes to the waiting tenant that was charged least. A tenant that was idle starts level with the others,
    so it saves no turns and waits for no turns of the past.
    """

    def __init__(self, slots: int, tenant_slots: int) -> None:
        """
        Args:
            slots: calls that run at the same time.
            tenant_slots: calls of one tenant that run at the same time.
        """
        self._free = slots
        self._tenant_slots = tenant_slots
        self._queues: dict[str, deque[tuple[float, asyncio.Future[None]]]] = {}
        self._running: Counter[str] = Counter()
        self._charged: dict[str, float] = {}
        self._level = 0.0  # charge at which the last call started

    @property
    def active_tenants(self) -> int:
        """Number of tenants with running or waiting calls."""
        return len(self._running.keys() | self._queues.keys())

    async def acquire(self, tenant: str, cost: float = 1.0) -> None:
        """Wait for a slot and hold it until `release`."""
        if self._free and not self._queues and self._running[tenant] < self._tenant_slots:
            self._start(tenant, cost)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant, deque()).append((cost, future))
        self._start_waiting()
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # `_start_waiting` had granted the slot before the cancellation arrived
                self.release(tenant)
            elif tenant in self._queues:
                self._leave(tenant, (cost, future))
            raise

    def release(self, tenant: str, rest_s: float = 0.0) -> None:
        """Free the slot of a tenant.

        Args:
            rest_s: time for which the tenant still counts as running this call. Other tenants get the slot at once.
        """
        self._free += 1
        if rest_s:
            asyncio.get_running_loop().call_later(rest_s, self._end, tenant)
            self._start_waiting()
        else:
            self._end(tenant)

    def _end(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._start_waiting()

    def _start(self, tenant: str, cost: float) -> None:
        self._free -= 1
        self._running[tenant] += 1
        self._level = max(self._level, self._charged.get(tenant, 0.0))
        self._charged[tenant] = self._level + cost
        if len(self._charged) > MAX_CHARGES:
            self._charged = {name: charge for name, charge in self._charged.items() if charge > self._level}

    def _start_waiting(self) -> None:
        while self._free:
            ready = [name for name in self._queues if self._running.get(name, 0) < self._tenant_slots]
            if not ready:
                return
            tenant = min(ready, key=lambda name: max(self._level, self._charged.get(name, 0.0)))
            cost, future = first = self._queues[tenant][0]
            self._leave(tenant, first)
            if not future.cancelled():
                self._start(tenant, cost)
                future.set_result(None)

    def _leave(self, tenant: str, entry: "tuple[float, asyncio.Future[None]]") -> None:
        queue = self._queues[tenant]
        if entry in queue:  # otherwise `_start_waiting` has removed it
            queue.remove(entry)
        if not queue:
            del self._queues[tenant]


class TenantReads:
    """Turns for calls that take the time of the event loop and of Redis, which all tenants share.

    Beside other active tenants a place rests `REST_RATIO` times as long as its call took. So one tenant's calls, one
    after another, take a part of that time only.
    """

    def __init__(self, tenant_calls: int, active: ActiveTenants) -> None:
        """
        Args:
            tenant_calls: calls of one tenant that run or rest at the same time.
            active: active tenants of the gateway.
        """
        self._turns = TenantTurns(sys.maxsize, tenant_calls)
        self._active = active

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for one of the tenant's places and hold it."""
        await self._turns.acquire(tenant)
        began_s = time.monotonic()
        try:
            yield
        finally:
            rests = self._active.others(tenant)
            self._turns.release(tenant, REST_RATIO * (time.monotonic() - began_s) if rests else 0.0)


class TenantThreads:
    """Thread pool that tenants use in turns.

    A call whose request ends keeps its thread and its tenant's share until it returns, because Python cannot stop it.
    """

    def __init__(
        self, executor: Executor, threads: int, tenant_threads: int, resting: ActiveTenants | None = None
    ) -> None:
        """
        Args:
            executor: thread pool with `threads` threads.
            tenant_threads: calls of one tenant that run at the same time.
            resting: active tenants of the gateway, for calls that hold Python's interpreter lock. Beside other active
                tenants, a tenant's next call waits `REST_RATIO` times as long as its last one took. Otherwise a tenant
                with calls one after another would hold the lock all the time, and the event loop would get it too
                rarely.
        """
        self._executor = executor
        self._turns = TenantTurns(threads, tenant_threads)
        self._resting = resting

    def of(self, tenant: str) -> "TenantPool":
        """Return the pool for calls of one tenant."""
        return TenantPool(self, tenant)

    async def run(self, tenant: str, function: Callable[[], T]) -> T:
        """Run a blocking function when it is the tenant's turn, and return its result."""
        if self._resting is not None:
            self._resting.note(tenant)
        await self._turns.acquire(tenant)
        began_s = time.monotonic()
        call = asyncio.get_running_loop().run_in_executor(self._executor, function)
        call.add_done_callback(partial(self._end, tenant, began_s))
        await asyncio.wait((call,))  # a cancellation does not reach `call`
        return call.result()

    def _end(self, tenant: str, began_s: float, call: "asyncio.Future[object]") -> None:
        rests = self._resting is not None and self._resting.others(tenant)
        self._turns.release(tenant, REST_RATIO * (time.monotonic() - began_s) if rests else 0.0)
        call.cancelled() or call.exception()  # otherwise asyncio logs an error that no request retrieved


@dataclass(frozen=True)
class TenantPool:
    """One tenant's calls in a pool."""

    threads: TenantThreads
    tenant: str


Pool = Executor | TenantPool | None


def lower_priority() -> None:
    """Let the calling thread run while other threads and processes leave it a core. Only Linux has this for a thread.

    It is for threads without Python's interpreter lock: otherwise threads of normal priority would wait for them.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        # Never a higher priority than that of the process, which only root may set.
        os.setpriority(os.PRIO_PROCESS, thread, max(LOW_PRIORITY, os.getpriority(os.PRIO_PROCESS, thread)))


async def run_blocking(pool: Pool, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread pool and return its result.

    Args:
        pool: a tenant's pool takes turns with those of other tenants. None is the event loop's default pool.
    """
    call = partial(function, *args, **kwargs)
    if isinstance(pool, TenantPool):
        return await pool.threads.run(pool.tenant, call)
    return await asyncio.get_running_loop().run_in_executor(pool, call)
