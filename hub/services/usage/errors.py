"""Errors of one gateway's replies by kind, added to the hub's counts every few seconds."""

import logging
from collections import Counter

from ...observability.request_context import RequestContext
from ...registry.redis.repetition import repeat
from ...registry.status import StatusBoard

WRITE_S = 2.0


class ErrorCounter:
    """Counts of refused and failed requests. `run` must run beside it.

    While Redis does not answer, the counts wait in memory, which the number of kinds bounds. A reply that Redis sends
    too late makes the counter add the same errors twice: the counts are for a view of the hub, not for accounts.
    """

    def __init__(self, board: StatusBoard) -> None:
        self._board = board
        self._counts = Counter[tuple[int, str]]()

    def count(self, context: RequestContext, status: int) -> None:
        """Count a request that has ended, if its reply is an error. Never waits."""
        if status >= 400:
            self._counts[status, context.error or f"http-{status}"] += 1

    async def run(self) -> None:
        """Write the counts every `WRITE_S` until cancelled."""
        # The connection logs why Redis does not answer; the counts wait.
        await repeat(self.write, WRITE_S, "writing counts of errors", logging.DEBUG)

    async def write(self) -> None:
        """Write all counts.

        Raises:
            Unavailable: Redis does not answer; the counts wait for the next call.
        """
        if not self._counts:
            return
        written, self._counts = self._counts, Counter()
        try:
            await self._board.count_errors(written)
        except BaseException:
            self._counts.update(written)
            raise
