"""Requests of many tenants -> fair mixed batches.

Knows neither adapters nor torch: an item is whatever `run` takes. Runs on one event loop.

Fairness is deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) with an image as the unit: tenants take turns,
and a turn is worth as many images as the tenant's weight. Who has nothing waiting when its turn comes saves it up, a
few seconds long and a few images at most, and with something saved up the next turn is its own: so who sends less than
its share waits for no turn of who sends more, even with a few images at once. Within a tenant, first come, first
served.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, TypeVar

from ..errors import LimitReached

WINDOW_S = 1.0  # what tenants sent is compared over the last one or two of these
SAVED = 16  # images, for a weight of 1, that a tenant's turns may be worth after it had nothing waiting
UNEVEN = 3.0  # times as many images, for its weight, as another tenant sent in that time
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Entry:
    item: Any
    future: "asyncio.Future[Any]"
    waiting: bool = True


@dataclass
class _Tenant:
    weight: float = 1.0
    deficit: float = 0.0  # images that it may still take in this turn, or has saved up
    sent: float = 0.0  # when it did so last
    waiting: deque[_Entry] = field(default_factory=deque)


class Batcher(Generic[Item, Result]):
    """Collects items while a batch runs, and runs them as the next."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        batch_size: Callable[[bool], int],
        wait_s: float,
        tenant_queue: int,
        in_flight: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run: computes a batch: one result for each item, in their order.
            batch_size: most items in the next batch, by whether one tenant sends much more than another: who sends
                little should not wait for large batches of who sends much.
            wait_s: how long a batch waits, at most, to become as large as the last one. One that comes to an idle
                batcher waits for nothing.
            tenant_queue: most items of a tenant that wait.
            in_flight: batches at once. One beside another starts only when it is full: until then it is better to
                collect.
        """
        self._run = run
        self._batch_size = batch_size
        self._wait_s = wait_s
        self._tenant_queue = tenant_queue
        self._in_flight = in_flight
        self._clock = clock
        self._ring: deque[str] = deque()  # tenants that sent something of late, in the order of their turns
        self._tenants: dict[str, _Tenant] = {}  # the same tenants
        self._waiting = 0
        self._running: set[asyncio.Task[None]] = set()
        self._since = clock()  # when the next batch began to wait for more: its first item, or the end of the last
        self._last_size = 1
        self._window = -inf  # when the present one began
        self._sent: dict[str, float] = {}  # tenant -> images over its weight, in this window and in the one before
        self._sent_before: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that are in no batch yet."""
        return self._waiting

    async def submit(self, tenant: str, items: Sequence[Item], weight: float = 1.0) -> list[Result]:
        """Results of items, which may come from several batches. If the caller is cancelled, what waits is dropped.

        Args:
            weight: the tenant's share beside other tenants; more than 0.

        Raises:
            LimitReached: the tenant would have more than `tenant_queue` items waiting; none of these is run.
            Exception: whatever `run` raised for the batch of one of them.
        """
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        entries = self._enqueue(tenant, items, weight)
        try:
            return await asyncio.gather(*(entry.future for entry in entries))
        finally:
            self._drop(tenant, entries)  # cancelled, or one of them failed: nobody wants the rest

    def _enqueue(self, tenant: str, items: Sequence[Item], weight: float) -> list[_Entry]:
        now = self._clock()
        if not self._waiting and not self._running and now - self._since > self._wait_s:
            self._last_size = 1  # idle
        self._note(tenant, len(items) / weight, now)
        queue = self._tenants.get(tenant)
        waiting = len(queue.waiting) if queue else 0
        if waiting + len(items) > self._tenant_queue:
            raise LimitReached(
                f"{waiting} images of this tenant are waiting for a worker, and at most {self._tenant_queue} may"
            )
        if queue is None:
            queue = self._tenants[tenant] = _Tenant()
            self._ring.appendleft(tenant)
        elif not queue.waiting and queue.deficit >= 1:
            self._ring.remove(tenant)
            self._ring.appendleft(tenant)
        queue.weight, queue.sent = weight, now
        if not self._waiting:
            self._since = max(self._since, now)
        loop = asyncio.get_running_loop()
        entries = [_Entry(item, loop.create_future()) for item in items]
        queue.waiting.extend(entries)
        self._waiting += len(entries)
        self._changed.set()
        return entries

    def _drop(self, tenant: str, entries: list[_Entry]) -> None:
        """Take what is still waiting of `entries` out of the queue."""
        queue = self._tenants.get(tenant)
        for entry in entries:
            if not entry.future.done():
                entry.future.cancel()
            elif not entry.future.cancelled():
                entry.future.exception()  # it has been told of one failure; the others are not news
            if entry.waiting and queue is not None:
                queue.waiting.remove(entry)
                entry.waiting = False
                self._waiting -= 1

    async def _serve(self) -> None:
        while True:
            while (patience := self._patience()) > 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(None if patience == inf else patience):
                        await self._changed.wait()
                except TimeoutError:
                    pass
            batch = self._take()
            task = asyncio.create_task(self._compute(batch))
            self._running.add(task)

    def _patience(self) -> float:
        """Seconds until the next batch should start if nothing changes: 0 is now, infinity not before a change."""
        if not self._waiting or len(self._running) >= self._in_flight:
            return inf
        if self._waiting >= self._most(self._heavy()):
            return 0
        if self._running:
            return inf
        if self._waiting >= self._last_size:
            return 0
        return max(0.0, self._since + self._wait_s - self._clock())

    def _most(self, heavy: Set[str]) -> int:
        """Items of the next batch, but for those that were saved up.

        Where tenants are uneven it is short, but as large as what all but the largest of them have waiting: it takes
        half of that at least, and large batches are faster, so that becomes less.
        """
        if not heavy:
            return self._batch_size(False)
        lighter = self._waiting - max((len(tenant.waiting) for tenant in self._tenants.values()), default=0)
        return max(self._batch_size(True), min(lighter, self._batch_size(False)))

    def _note(self, tenant: str, share: float, now: float) -> None:
        """A tenant sends something, whether or not it is taken."""
        if now - self._window >= WINDOW_S:
            self._sent_before = self._sent if now - self._window < 2 * WINDOW_S else {}
            self._sent, self._window = {}, now
        self._sent[tenant] = self._sent.get(tenant, 0.0) + share

    def _heavy(self) -> Set[str]:
        """Tenants that send much more than the one that sends least."""
        if self._clock() - self._window >= 2 * WINDOW_S:
            return frozenset()
        names = self._sent.keys() | self._sent_before
        sent = {name: self._sent.get(name, 0.0) + self._sent_before.get(name, 0.0) for name in names}
        much = UNEVEN * min(sent.values())
        return {name for name, share in sent.items() if share >= much}

    def _take(self) -> list[_Entry]:
        """The next batch, out of the queues."""
        batch: list[_Entry] = []
        heavy = self._heavy()
        most, full = self._most(heavy), self._batch_size(False)
        while len(batch) < min(most, self._waiting):
            name = self._ring[0]
            tenant = self._tenants[name]
            if not tenant.waiting:
                self._ring.rotate(-1)
                if name not in heavy:
                    tenant.deficit = min(tenant.deficit + tenant.weight, SAVED * tenant.weight)
                if self._clock() - tenant.sent >= 2 * WINDOW_S:
                    self._ring.pop()
                    del self._tenants[name]
                continue
            if tenant.deficit < 1:
                tenant.deficit += tenant.weight
            room = most if name in heavy else full  # what was saved up is taken at once, even into a short batch
            while tenant.waiting and tenant.deficit >= 1 and len(batch) < room:
                entry = tenant.waiting.popleft()
                entry.waiting = False
                batch.append(entry)
                tenant.deficit -= 1
            if tenant.deficit < 1 or not tenant.waiting:
                self._ring.rotate(-1)
        self._waiting -= len(batch)
        self._last_size = len(batch)
        return batch

    async def _compute(self, batch: list[_Entry]) -> None:
        try:
            # Whoever was cancelled since `_take` may have given back what its item needs. From here to `run`'s first
            # wait nothing else happens on this loop.
            batch = [entry for entry in batch if not entry.future.done()]
            if batch:
                results = await self._run([entry.item for entry in batch])
                for entry, result in zip(batch, results, strict=True):
                    if not entry.future.done():  # cancelled meanwhile
                        entry.future.set_result(result)
        except Exception as error:  # whatever it is, it is this batch's, and goes to its callers
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
        finally:
            current = asyncio.current_task()
            assert current is not None  # noqa: S101 (for the type checker)
            self._running.discard(current)
            self._since = self._clock()
            self._changed.set()
