"""Adapters that a worker loads before their first call: pinned tasks, and adapters that any worker used recently."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from ..errors import NotFound
from ..registry.redis.connection import RegistryConnection
from ..registry.status import StatusBoard
from ..registry.tasks import TaskRegistry
from ..schemas import LATEST


class Prewarming:
    """The registry as a worker uses it. Holds no connection, so that Serve can pickle it for a worker."""

    def __init__(self, redis_url: str, pinned: Sequence[str]) -> None:
        """
        Args:
            pinned: `tenant/task` or `tenant/task@version`; the version is a number or an alias.
        """
        self._redis_url = redis_url
        self._pinned = tuple(pinned)

    async def pinned(self) -> dict[str, str]:
        """Return the digest of each version of the pinned tasks. Tasks that are not registered yet are left out.

        Returns:
            `name:number` -> digest, where the name is as given and the number is the version's.

        Raises:
            Unavailable: the registry does not answer.
        """
        digests: dict[str, str] = {}
        async with self._connection() as connection:
            registry = TaskRegistry(connection)
            for name in self._pinned:
                path, _, version = name.partition("@")
                tenant, _, task = path.partition("/")
                try:
                    found = await registry.task(tenant, task)
                    digests |= {f"{name}:{n}": found.digests[n] for n in found.targets(version or LATEST)}
                except NotFound:
                    continue
        return digests

    async def recent_digests(self, limit: int) -> list[str]:
        """Return the adapters that any worker used, the most recent first.

        Raises:
            Unavailable: the registry does not answer.
        """
        async with self._connection() as connection:
            return await StatusBoard(connection).recent_digests(limit)

    async def record_digests(self, digests: Iterable[str]) -> None:
        """Store that this worker used these adapters just now.

        Raises:
            Unavailable: the registry does not answer.
        """
        async with self._connection() as connection:
            await StatusBoard(connection).record_digests(digests, time.time())

    @asynccontextmanager
    async def status_board(self) -> AsyncIterator[StatusBoard]:
        """Open the place of the workers' status reports."""
        async with self._connection() as connection:
            yield StatusBoard(connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[RegistryConnection]:
        connection = RegistryConnection(self._redis_url)
        try:
            yield connection
        finally:
            await connection.close()
