"""Scans of large hashes in parts, so that Redis serves others in between."""

from collections.abc import AsyncIterator

from .connection import RegistryConnection, as_hash


async def scan_hash(connection: RegistryConnection, key: str, count: int) -> AsyncIterator[tuple[str, str]]:
    """Yield each field of a hash with its value, about `count` per read. A field may come twice while the hash changes.

    Raises:
        Unavailable: Redis does not answer.
    """
    cursor = 0
    while True:
        cursor, found = await connection.execute(connection.redis.hscan(key, cursor, count=count))
        for field, value in as_hash(found).items():
            yield field, value
        if cursor == 0:
            return
