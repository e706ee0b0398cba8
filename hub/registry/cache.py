"""A gateway's cache of tasks, keys and tenants, kept current by change events.

Reads of cached tasks and keys need no Redis, so classification continues while Redis is unavailable. A value that was
read while an event arrived is returned but not cached; otherwise the cache could keep a stale value. A gateway that
got no answer from the registry for five minutes rejects all keys, since one of them may be revoked.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from typing import TypeVar

from cachetools import LRUCache

from ..admin_schemas import TenantInfo
from ..errors import Unavailable
from .events import Event, EventLog, is_full
from .keys import KeyRecord, KeyRegistry
from .models import Task
from .tasks import TaskRegistry
from .tenants import TenantRegistry
from .versions import ServedVersion

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
EVENT_WAIT_MS = 500
RETRY_INTERVAL_S = 0.25  # so that a change reaches every gateway within two seconds, a reconnection included
MAX_TASKS, MAX_KEYS, MAX_TENANTS = 20_000, 20_000, 20_000
MAX_TASK_NAMES = 100_000  # in the cached lists of tenants' tasks
MAX_VERSION_BYTES = 64 * 1024**2  # of the texts of cached versions
KEY_TRUST_S = 300.0


class RegistryCache:
    """Tasks, keys and tenants by name, in the memory of one gateway. `follow` must run beside it."""

    def __init__(
        self,
        *,
        tasks: TaskRegistry,
        keys: KeyRegistry,
        tenants: TenantRegistry,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task_registry = tasks
        self._key_registry = keys
        self._tenant_registry = tenants
        self._events = events
        self._clock = clock
        self._tasks: LRUCache[tuple[str, str], Task] = LRUCache(MAX_TASKS)
        self._names: LRUCache[str, Sequence[str]] = LRUCache(MAX_TASK_NAMES, lambda names: len(names) + 1)
        self._keys: LRUCache[str, KeyRecord] = LRUCache(MAX_KEYS)
        self._tenants: LRUCache[str, TenantInfo] = LRUCache(MAX_TENANTS)
        self._versions: LRUCache[tuple[str, str, int, str], tuple[ServedVersion, int]] = LRUCache(
            MAX_VERSION_BYTES, lambda entry: entry[1]
        )
        self._invalidations = 0  # a value that was read across an invalidation is not cached
        self._following = False
        self._resynchronising = False
        self._last_contact_s = clock()

    async def task(self, tenant: str, name: str) -> Task:
        """Return a tenant's task.

        Raises:
            NotFound: the task does not exist.
            Unavailable: the task is not cached, and the registry does not answer.
        """
        return await self._read(self._tasks, (tenant, name), lambda: self._task_registry.task(tenant, name))

    async def task_names(self, tenant: str) -> Sequence[str]:
        """Return the names of a tenant's own tasks, in order.

        Raises:
            Unavailable: the list is not cached, and the registry does not answer.
        """
        return await self._read(self._names, tenant, lambda: self._task_registry.task_names(tenant))

    def cached_task(self, tenant: str, name: str) -> Task | None:
        """Return a tenant's task if it is cached."""
        return self._tasks.get((tenant, name))

    async def version(self, tenant: str, task: Task, number: int) -> ServedVersion:
        """Return what a classification needs of a version. A version never changes, so no event invalidates it.

        Raises:
            NotFound: the version was deleted since the task was read.
            Unavailable: the version is not cached, and the registry does not answer.
        """
        key = tenant, task.name, number, task.digests[number]
        cached = self._versions.get(key)
        if cached is not None:
            return cached[0]
        stored = await self._task_registry.version(tenant, task, number)
        served = stored.served()
        self._versions[key] = served, len(stored.text)
        return served

    async def key(self, id: str) -> KeyRecord | None:
        """Return the record of a key by its public id, or None if the hub does not know it.

        The caller must compare the key: an id is only a part of its hash.

        Raises:
            Unavailable: the key is not cached, and the registry does not answer; or it did not answer for too long.
        """
        if self._clock() - self._last_contact_s > KEY_TRUST_S:
            message = (
                f"The registry has not answered for {KEY_TRUST_S:g} s, so no API key can be verified. Retry later."
            )
            raise Unavailable(message)
        record = self._keys.get(id)
        if record is None:
            invalidations = self._invalidations
            record = await self._key_registry.find(id)
            if record is not None:
                self._store(self._keys, id, record, invalidations)
        return record

    async def tenant(self, tenant: str) -> TenantInfo:
        """Return a tenant.

        Raises:
            NotFound: the tenant does not exist.
            Unavailable: the tenant is not cached, and the registry does not answer.
        """
        return await self._read(self._tenants, tenant, lambda: self._tenant_registry.get(tenant))

    def invalidate_task(self, tenant: str, name: str) -> None:
        """Drop a task that was changed."""
        self._invalidations += 1
        self._tasks.pop((tenant, name), None)
        self._names.pop(tenant, None)

    def invalidate_tenant(self, tenant: str) -> None:
        """Drop a tenant with its tasks and keys."""
        self._invalidations += 1
        self._tenants.pop(tenant, None)
        self._names.pop(tenant, None)
        for task in [task for task in self._tasks if task[0] == tenant]:
            del self._tasks[task]
        for id in [id for id, record in self._keys.items() if record.tenant == tenant]:
            del self._keys[id]

    def invalidate_key(self, id: str) -> None:
        """Drop a key that was changed."""
        self._invalidations += 1
        self._keys.pop(id, None)

    def resynchronise(self) -> None:
        """Drop everything and read change events from their end: another server may lack the last changes."""
        self._resynchronising = True
        self._clear()

    async def follow(self) -> None:
        """Read change events until cancelled. Nothing is cached before the first contact with the registry."""
        last: dict[str, str] = {}
        while True:
            try:
                await self._catch_up(last)
                self._following = True
                while not self._resynchronising:
                    self._last_contact_s = self._clock()
                    events = await self._events.read(last, EVENT_WAIT_MS)
                    for event in events:
                        self._invalidate(event)
                        last[event.stream] = event.id
                    if is_full(events):
                        await self._catch_up(last)
            except Unavailable as error:
                logger.warning("change events are unavailable, cached tasks stay in use: %s", error.detail)
            except Exception:  # any error: without events the cache would become stale
                logger.exception("change events failed, the cache is cleared")
                self._following = False
                last.clear()
                self._clear()
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _catch_up(self, last: dict[str, str]) -> None:
        """Clear the cache and go to the end of the events, unless every event after `last` is kept."""
        spans = await self._events.spans()
        if self._resynchronising or not all(
            stream in last and span.has(last[stream]) for stream, span in spans.items()
        ):
            self._resynchronising = False
            self._clear()  # at the start, and after lost events: a new stream or a long absence
            last.update({stream: span.newest for stream, span in spans.items()})

    def _invalidate(self, event: Event) -> None:
        match event.kind:
            case "task":
                self.invalidate_task(event.tenant, event.name)
            case "key":
                self.invalidate_key(event.name)
            case _:
                self.invalidate_tenant(event.name)

    async def _read(self, cache: LRUCache[K, V], key: K, read: Callable[[], Awaitable[V]]) -> V:
        value = cache.get(key)
        if value is None:
            invalidations = self._invalidations
            value = await read()
            self._store(cache, key, value, invalidations)
        return value

    def _store(self, cache: LRUCache[K, V], key: K, value: V, invalidations: int) -> None:
        if self._following and self._invalidations == invalidations:
            with suppress(ValueError):  # a list that is larger than the whole cache
                cache[key] = value

    def _clear(self) -> None:
        self._invalidations += 1
        self._tasks.clear()
        self._names.clear()
        self._keys.clear()
        self._tenants.clear()
