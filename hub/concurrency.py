"""So much at once for each tenant, the rest of that tenant in line: no crowd stands before another tenant.

The gateway's part of fairness. The worker's is the batcher, which is out of reach for whoever waits before it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .errors import LimitReached


@dataclass
class _Line:
    used: int = 0
    present: int = 0  # who has a turn or waits for one
    waiting: deque[tuple[int, "asyncio.Future[None]"]] = field(default_factory=deque)


class Turns:
    """Turns by name; lines that nobody stands in are forgotten."""

    def __init__(self, at_once: int, most: int | None = None) -> None:
        """
        Args:
            at_once: how much of one name may have its turn at the same time.
            most: how many of one name may have a turn or wait for one; None: any number.
        """
        self._at_once = at_once
        self._most = most
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def turn(self, name: str, size: int = 1) -> AsyncIterator[None]:
        """Wait for a turn, first come, first served, and hold it. What is larger than `at_once` has its turn alone.

        Raises:
            LimitReached: too many of this name are there already.
        """
        line = self._lines.setdefault(name, _Line())
        if line.present == self._most:
            raise LimitReached(f"{line.present} calls of this tenant are under way at this gateway, and no more may be")
        size = min(size, self._at_once)
        line.present += 1
        try:
            if line.waiting or line.used + size > self._at_once:
                await self._wait(line, size)
            else:
                line.used += size
            try:
                yield
            finally:
                line.used -= size
                self._admit(line)
        finally:
            line.present -= 1
            if not line.present:
                self._lines.pop(name, None)

    async def _wait(self, line: _Line, size: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():
                line.used -= size  # it had just been given its turn
            elif (size, future) in line.waiting:  # else `_admit` has seen it
                line.waiting.remove((size, future))
            self._admit(line)
            raise

    def _admit(self, line: _Line) -> None:
        while line.waiting and line.used + line.waiting[0][0] <= self._at_once:
            size, future = line.waiting.popleft()
            if not future.cancelled():
                line.used += size
                future.set_result(None)
