"""What a gateway remembers of the registry, kept true by change events.

Reads of known tasks and keys need no Redis, so classification goes on while it is away. What was read while an
event about it came in is answered but not remembered, so nothing stale can stay.
"""

import asyncio
import logging

from .errors import Unavailable
from .registry import KeyRecord, Registry, Task

logger = logging.getLogger(__name__)

WAIT_MS = 2000
RETRY_S = 0.5


class RegistryCache:
    """Tasks and keys by name, in memory."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tasks: dict[tuple[str, str], Task] = {}
        self._keys: dict[str, KeyRecord] = {}
        self._changes = 0  # counts events; a read that spans one is not remembered
        self._following = False

    async def task(self, tenant: str, name: str) -> Task:
        """
        Raises:
            NotFound: the tenant has no such task.
            Unavailable: not known here, and the registry does not answer.
        """
        found = self._tasks.get((tenant, name))
        if found is None:
            before = self._changes
            found = await self._registry.task(tenant, name)
            if self._following and self._changes == before:
                self._tasks[tenant, name] = found
        return found

    async def key(self, key_hash: str) -> KeyRecord | None:
        """The record of a key by its sha256; None if the hub does not know it.

        Raises:
            Unavailable: not known here, and the registry does not answer.
        """
        found = self._keys.get(key_hash)
        if found is None:
            found = await self._registry.key(key_hash)
            if found is not None:
                self._keys[key_hash] = found
        return found

    def forget(self, tenant: str, name: str) -> None:
        """Read this task anew next time: it was changed."""
        self._changes += 1
        self._tasks.pop((tenant, name), None)

    async def follow(self) -> None:
        """Read change events for ever; runs as a task of the gateway's own. Remembers nothing before its start."""
        last: str | None = None
        while True:
            try:
                oldest, newest = await self._registry.event_span()
                if last is None or not _order(oldest) <= _order(last) <= _order(newest):
                    self._forget_all()  # the first start, or events were missed: a lost stream, a long absence
                    last = newest
                self._following = True
                while True:
                    for event in await self._registry.events(last, WAIT_MS):
                        self.forget(event.tenant, event.task)
                        last = event.id
            except Unavailable as error:
                logger.warning("change events: %s; known tasks are served from memory", error.detail)
            except Exception:  # whatever it is, a gateway that no longer follows must not remember
                logger.exception("change events")
                self._following, last = False, None
                self._forget_all()
            await asyncio.sleep(RETRY_S)

    def _forget_all(self) -> None:
        self._changes += 1
        self._tasks.clear()


def _order(event_id: str) -> tuple[int, int]:
    millis, _, sequence = event_id.partition("-")
    return int(millis), int(sequence or 0)
