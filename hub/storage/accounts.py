"""Accounts of the store's files that no version refers to, and the turn of the gateway that collects them."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from ..registry.redis.connection import RegistryConnection, tenant_key
from ..registry.redis.scans import scan_hash
from ..registry.redis.scripts import COLLECTION

ORPHANS_PER_READ = 500


class Orphan(NamedTuple):
    """A file that no version refers to. Its bytes count against a tenant."""

    digest: str
    size_bytes: int


class FileRegistry:
    """Orphans and collections. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def due(self, tenant: str, limit: int) -> list[Orphan]:
        """Return orphans of a tenant that a collection may remove now: those that no registration is about to use."""
        now_s, _ = await self._connection.execute(self._redis.time())
        found: list[Orphan] = []
        async for digest, stored in scan_hash(self._connection, tenant_key(tenant, "orphans"), ORPHANS_PER_READ):
            size_bytes, _, due_s = stored.partition(":")
            if int(due_s) <= now_s:
                found.append(Orphan(digest, int(size_bytes)))
            if len(found) == limit:
                break
        return found

    async def orphans(self) -> AsyncIterator[str]:
        """Yield the digests of all tenants' orphans."""
        async for digest, _ in scan_hash(self._connection, "karst:orphans", ORPHANS_PER_READ):
            yield digest

    async def release(self, digest: str) -> None:
        """Stop to count an orphan, because the store has no such file any more."""
        await self._connection.change(COLLECTION, "release", digest=digest)

    async def begin(self, token: str, duration_s: int) -> bool:
        """Take the turn to collect, for so long. Return whether it was free."""
        reply = await self._connection.change(COLLECTION, "begin", token=token, duration_s=duration_s)
        return reply.outcome == "done"

    async def extend(self, token: str, duration_s: int) -> bool:
        """Make the turn last so long from now on. Return whether this gateway still had it."""
        reply = await self._connection.change(COLLECTION, "extend", token=token, duration_s=duration_s)
        return reply.outcome == "done"
