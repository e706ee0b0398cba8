"""Passes of work that can wait, between the batches of classification.

Small passes run one at a time, and only while no image waits for classification. A worker that is never idle runs one
every `longest_wait_s`, so that the work ends under any load. An image that arrives during such a pass waits for it;
during a pass of features, for one block of the backbone.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from ..errors import Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")
POLL_S = 0.005
LONGEST_WAIT_S = 1.0


class IdlePasses(Generic[Item, Result]):
    """Queue of items that are computed while the worker has nothing else to do."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        is_idle: Callable[[], bool],
        *,
        size: int,
        limit: int,
        longest_wait_s: float = LONGEST_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run: computes a pass, and returns one result for each item in the same order.
            is_idle: returns whether no image waits for classification.
            size: items of one pass.
            limit: queued items; further calls are refused.
            longest_wait_s: between two passes of a worker that is never idle.
        """
        self._run = run
        self._is_idle = is_idle
        self._size = size
        self._limit = limit
        self._longest_wait_s = longest_wait_s
        self._clock = clock
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._loop: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of items. A cancelled call removes its queued items.

        Raises:
            Unavailable: too many items are queued.
            Exception: any error of `run` for a pass that contains one of the items.
        """
        if len(self._queue) + len(items) > self._limit:
            raise Unavailable(f"Too many images wait for idle turns of this worker (limit {self._limit}). Retry later.")
        loop = asyncio.get_running_loop()
        entries: list[tuple[Item, asyncio.Future[Result]]] = [(item, loop.create_future()) for item in items]
        self._queue.extend(entries)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run_passes())
        try:
            return await asyncio.gather(*(future for _, future in entries))
        finally:
            for _, future in entries:
                if not future.done():
                    future.cancel()
                elif not future.cancelled():
                    future.exception()  # otherwise asyncio logs that it was never retrieved

    async def _run_passes(self) -> None:
        last_s = self._clock()
        while self._queue:
            while not self._is_idle() and self._clock() - last_s < self._longest_wait_s:
                await asyncio.sleep(POLL_S)
            taken = [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]
            entries = [(item, future) for item, future in taken if not future.done()]
            if not entries:
                continue
            try:
                results = await self._run([item for item, _ in entries])
                for (_, future), result in zip(entries, results, strict=True):
                    if not future.done():
                        future.set_result(result)
            except Exception as error:  # any error belongs to the callers of this pass, and must not stop the next one
                for _, future in entries:
                    if not future.done():
                        future.set_exception(error)
            last_s = self._clock()
