"""So many at once for each tenant, the rest of that tenant in line: no crowd stands before another tenant.

The gateway's part of fairness. The worker's is the batcher, which is out of reach for whoever waits before it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .errors import LimitReached


@dataclass
class _Line:
    turns: asyncio.Semaphore
    present: int = field(default=0)


class Turns:
    """Turns by name; lines that nobody stands in are forgotten."""

    def __init__(self, at_once: int, most: int | None = None) -> None:
        """
        Args:
            at_once: how many of one name may have a turn at the same time.
            most: how many of one name may have a turn or wait for one; None: any number.
        """
        self._at_once = at_once
        self._most = most
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn and hold it.

        Raises:
            LimitReached: too many of this name are there already.
        """
        line = self._lines.setdefault(name, _Line(asyncio.Semaphore(self._at_once)))
        if line.present == self._most:
            raise LimitReached(f"{line.present} calls of this tenant are under way at this gateway, and no more may be")
        line.present += 1
        try:
            async with line.turns:
                yield
        finally:
            line.present -= 1
            if not line.present:
                self._lines.pop(name, None)
