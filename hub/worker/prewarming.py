"""What a worker should have in its slots before anybody asks: pinned tasks, and what was busy of late."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from ..errors import NotFound
from ..registry.connection import Database
from ..registry.status import Board
from ..registry.tasks import Registry
from ..schemas import LATEST


class Warmth:
    """Asks the registry, and tells it. Small and without connections, so that it can be sent to a worker."""

    def __init__(self, redis_url: str, pinned: Sequence[str]) -> None:
        """
        Args:
            pinned: `tenant/task` or `tenant/task@version`, a number or an alias.
        """
        self._redis_url = redis_url
        self._pinned = tuple(pinned)

    async def pinned(self) -> dict[str, str]:
        """Pinned name -> digest, for every name that there is.

        Raises:
            Unavailable: the registry does not answer.
        """
        out: dict[str, str] = {}
        async with self._registry() as registry:
            for name in self._pinned:
                path, _, version = name.partition("@")
                tenant, _, task = path.partition("/")
                try:
                    found = await registry.task(tenant, task)
                    out |= {f"{name}:{n}": found.versions[n].digest for n in found.targets(version or LATEST)}
                except NotFound:
                    continue  # not registered yet
        return out

    async def busy(self, limit: int) -> list[str]:
        """Digests that any worker used, latest first.

        Raises:
            Unavailable: the registry does not answer.
        """
        async with self._registry() as registry:
            return await registry.busy(limit)

    async def note(self, digests: Iterable[str]) -> None:
        """These were used just now.

        Raises:
            Unavailable: the registry does not answer.
        """
        async with self._registry() as registry:
            await registry.note_busy(digests, time.time())

    @asynccontextmanager
    async def board(self) -> AsyncIterator[Board]:
        """Where a worker tells how it is, for as long as the context lasts."""
        database = Database(self._redis_url)
        try:
            yield Board(database)
        finally:
            await database.close()

    @asynccontextmanager
    async def _registry(self) -> AsyncIterator[Registry]:
        database = Database(self._redis_url)
        try:
            yield Registry(database)
        finally:
            await database.close()
